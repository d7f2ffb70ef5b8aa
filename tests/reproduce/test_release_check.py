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
from versions import needs


ROOT, REPRODUCE = EXAMPLES.parent, EXAMPLES / "reproduce"
SCRIPT = REPRODUCE / "release_check.py"
pytestmark = [
    needs("huggingface_hub", "2", "knows other errors of the network: releases are checked with the newest"),
    needs("transformers", "5.9", "has other names in a ViT"),
]
RELEASES = sorted(path.parent.name for path in (ROOT / "model_cards").glob("*/model_index.json"))
TEMPLATE = """---
license: mit
library_name: diffusers
tags: [mcdi, lora, peft, weight-generation]
---
# tiny

## What it was trained on

Letters, by `examples/train_mcdi.py`.

## How good it is

{% include "tables.md" %}

## Limits

Letters.
"""


def write_release(folder: Path, first: str, second: str) -> None:
    """Write the figures of a release, and its card by hand: what `write_cards.py` shall make of them."""
    results = json.loads((folder / "results.json").read_text())
    results["tables"][0]["rows"]["generated"] = {"2x1": float(first), "3x2": float(second)}
    (folder / "results.json").write_text(json.dumps(results))
    table = f"""| accuracy | 2-way 1-shot | 3-way 2-shot | Mc-Di minus it, points |
|---|---|---|---|
| frozen | 0.500 | 0.400 | +1.0 ±0.5 |
| **generated** | **{first}** | **{second}** | - |
| half a 95 % interval over episodes | 0.01 | 0.02 | |

A note.

Measured by `python examples/gone.py`. To measure again, see `examples/train_mcdi.py`."""
    (folder / "README.md").write_text(TEMPLATE.replace('{% include "tables.md" %}', table))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one release whose card is not written yet, with its template and data set."""
    root = tmp_path_factory.mktemp("releases")
    pipe, backbone = tiny_pipeline()
    folder = root / "cards" / "tiny"
    pipe.save_pretrained(folder)
    save_backbone(backbone, folder / "backbone")
    (root / "cards" / "README.md").write_text("| `tiny` | a release |")
    write_letters(root / "data" / "letters", backbone)
    (root / "templates").mkdir()
    (root / "templates" / "tiny.md").write_text(TEMPLATE)
    tables = (REPRODUCE / "cards" / "tables.md").read_text().replace("examples/benchmark", "examples/train_mcdi.py")
    (root / "templates" / "tables.md").write_text(tables)
    source = {"dataset_name": "letters", "group_column": "domain", "domain_column": "domain"}
    table = {
        "title": "accuracy",
        "candidates": 2,
        "generated": "generated",
        "tasks": {"sources": [source], "domains": DOMAINS[:2], "split": "train", "query_split": "test"},
        "columns": {"2x1": "2-way 1-shot", "3x2": "3-way 2-shot"},
        "digits": 3,
        "rows": {"frozen": {"2x1": 0.5, "3x2": 0.4}},
        "bold": ["generated"],
        "half_interval": {"2x1": 0.01, "3x2": 0.02},
        "minus": {"frozen": "+1.0 ±0.5", "generated": "-"},
        "notes": ["A note."],
    }
    results = {"command": "python examples/gone.py", "tables": [table]}
    (folder / "results.json").write_text(json.dumps(results))
    return root


def check(root: Path, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, SCRIPT, "--model_cards", root / "cards", "--templates", root / "templates", *options]
    ended = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=300)
    assert ended.returncode in (0, 1) and "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


def test_the_releases_are_as_their_cards_say() -> None:
    printed = call(SCRIPT)
    assert len(RELEASES) >= 2 and "WRONG" not in printed
    for name in RELEASES:
        assert re.search(rf"^{name}: loads, and generates from (texts|images)", printed, re.M)


def test_the_releases_pass_the_checks_of_metadata(hub: FakeHub) -> None:
    for path in (ROOT / "model_cards").glob("*/README.md"):
        ModelCard.load(path).validate()


def test_figures_are_measured_again(place: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(place, tmp_path / "all"))
    options = ["--data_root", str(root / "data"), "--episodes", "20"]
    write_release(root / "cards" / "tiny", "0.010", "0.999")
    code, printed, _ = check(root, *options)
    found = dict(re.findall(r"WRONG: (\d)x\d: [\d.]+ on the card, ([\d.]+) measured", printed))
    assert code == 1 and found.keys() == {"2", "3"} and all(0.1 < float(value) < 0.99 for value in found.values())
    write_release(root / "cards" / "tiny", found["2"], found["3"])
    code, printed, _ = check(root, *options)
    assert code == 0 and printed.count("tolerance 0.") == 2


def test_a_hub_that_is_not_there_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(shutil.copytree(place, tmp_path / "all"))
    write_release(root / "cards" / "tiny", "0.500", "0.500")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    code, printed, errors = check(root)
    assert code == 1 and not printed
    assert errors.splitlines()[-1].startswith("error: the Hub cannot be reached") and "HF_HUB_OFFLINE=1" in errors


WRONG = {
    "license: mit\n": "must be one of",
    "peft, ": "its card has no tags ['peft']",
    "## Limits\n": "its card has no section 'Limits'",
    "by `examples/train_mcdi.py`": "its card names examples/train_mcdi_old.py, which is not there",
    "| 0.500 |": "its card is not what its template and results.json give: run write_cards.py",
}


def test_what_is_wrong_with_a_card_is_said(place: Path, hub: FakeHub, tmp_path: Path) -> None:
    root = Path(shutil.copytree(place, tmp_path / "all"))
    card = root / "cards" / "tiny" / "README.md"
    write_release(card.parent, "0.500", "0.500")
    text = card.read_text()
    text = text.replace("**0.500**", "**0.50**", 1)
    card.write_text(text)
    assert "run write_cards.py" in check(root)[1]
    text = text.replace("**0.50**", "**0.500**")
    card.write_text(text)
    assert check(root)[0] == 0
    changed = {"by `examples/train_mcdi.py`": "by `examples/train_mcdi_old.py`", "| 0.500 |": "| 0.510 |"}
    for part in WRONG:
        assert text.count(part) == 1
        text = text.replace(part, changed.get(part, ""))
    card.write_text(text.replace("library_name", "license: mine\nlibrary_name"))
    (root / "cards" / "README.md").write_text("")
    code, printed, _ = check(root)
    assert code == 1 and printed.count("WRONG") == len(WRONG) + 1
    for message in [*WRONG.values(), "README.md does not list it", "the Hub refuses its card"]:
        assert message in printed
