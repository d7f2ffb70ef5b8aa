"""`make release-check` on the releases themselves, and on one that was made to be wrong in every way."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from scripts import DOMAINS, EXAMPLES, call, save_backbone, write_letters
from tiny import tiny_pipeline


ROOT = EXAMPLES.parent
SCRIPT = EXAMPLES / "release_check.py"
CARD = """---
license: mit
library_name: diffusers
tags: [mcdi, lora, peft, weight-generation]
---
# tiny

    pipe(support, num_candidates=2)

## What it was trained on

Letters, by `examples/train_mcdi.py`.

## How good it is

| accuracy | 2-way 1-shot | 3-way 2-shot |
|---|---|---|
| frozen + imprinted head | 0.500 | 0.400 |
| **generated, mean of 8 draws** | {first} | {second} |

60 episodes a column; see [docs/results/tiny.md](../docs/results/tiny.md).

## Limits

Letters.
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one release whose card is not written yet, with its family, data set and result file."""
    root = tmp_path_factory.mktemp("releases")
    pipe, backbone = tiny_pipeline()
    pipe.save_pretrained(root / "cards" / "tiny")
    save_backbone(backbone, root / "cards" / "tiny" / "backbone")
    (root / "cards" / "README.md").write_text("| `tiny` | a release |")
    write_letters(root / "data" / "letters", backbone)
    source = {"dataset_name": "letters", "group_column": "domain", "domain_column": "domain"}
    family = {"name": "tiny", "pipeline": "model_cards/tiny", "sources": [source], "test_domains": DOMAINS[:2]}
    (root / "families.json").write_text(json.dumps([family | {"split": "train", "query_split": "test"}]))
    accuracy = {"frozen + imprinted head": {"2x1": {"a-0": [0.4, 0.6]}, "3x2": {"a-0": [0.3, 0.5]}}}
    (root / "results").mkdir()
    (root / "results" / "tiny.json").write_text(json.dumps({"tables": [{"accuracy": accuracy}]}))
    return root


def check(root: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, SCRIPT, "--model_cards", root / "cards", "--families", root / "families.json"]
    command += ["--results", root / "results", *options]
    ended = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=300)
    assert ended.returncode in (0, 1) and "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout


def test_the_releases_are_as_their_cards_say() -> None:
    printed = call(SCRIPT)
    names = [path.parent.name for path in (ROOT / "model_cards").glob("*/model_index.json")]
    assert len(names) >= 4 and "WRONG" not in printed
    for name in names:
        assert re.search(rf"^{name}: loads, and generates from (texts|images|features); \d+ figures", printed, re.M)


def test_the_releases_pass_the_checks_of_metadata(hub: FakeHub) -> None:
    for path in (ROOT / "model_cards").glob("*/README.md"):
        ModelCard.load(path).validate()


def test_figures_are_measured_again(place: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(place, tmp_path / "all"))
    card = root / "cards" / "tiny" / "README.md"
    (root / "docs").mkdir()
    options = ["--data_root", str(root / "data"), "--episodes", "20"]
    card.write_text(CARD.format(first="0.01", second="0.999").replace("docs/results/tiny.md", "tiny.md"))
    code, printed = check(root, *options)
    found = dict(re.findall(r"WRONG: (\d)x\d: [\d.]+ on the card, ([\d.]+) measured", printed))
    assert code == 1 and found.keys() == {"2", "3"} and all(0.1 < float(value) < 0.99 for value in found.values())
    right = CARD.format(first=found["2"], second=found["3"]).replace("docs/results/tiny.md", "tiny.md")
    card.write_text(right)
    code, printed = check(root, *options)
    assert code == 0 and printed.count("apart by chance") == 2 and "4 figures on its card" in printed


WRONG = {
    "license: mit\n": "must be one of",
    "peft, ": "its card has no tags ['peft']",
    "## Limits\n": "its card has no section 'Limits'",
    "train_mcdi.py": "its card names examples/train_mcdi_old.py, which is not there",
    "| 0.500 |": "its card says 0.51 for frozen + imprinted head, 2x1; tiny.json says 0.5000",
}


def test_what_is_wrong_with_a_card_is_said(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    root = Path(shutil.copytree(place, tmp_path / "all"))
    card = root / "cards" / "tiny" / "README.md"
    text = CARD.format(first="0.5", second="0.5").replace("docs/results/tiny.md", "tiny.md")
    card.write_text(text)
    assert check(root)[0] == 0
    changed = {"train_mcdi.py": "train_mcdi_old.py", "| 0.500 |": "| 0.510 |"}
    for part in WRONG:
        assert text.count(part) == 1
        text = text.replace(part, changed.get(part, ""))
    card.write_text(text.replace("library_name", "license: mine\nlibrary_name"))
    (root / "cards" / "README.md").write_text("")
    code, printed = check(root)
    assert code == 1 and printed.count("WRONG") == len(WRONG) + 1
    for message in [*WRONG.values(), "README.md does not list it", "the Hub refuses its card"]:
        assert message in printed
