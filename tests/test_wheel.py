"""The wheel alone, in an environment of its own: it collects, trains and generates by three calls of the public API."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from string import ascii_lowercase

import pytest
from peft import AutoPeftModelForSequenceClassification
from scripts import save_backbone, write_letters
from tiny import tiny_backbone


ROOT = Path(__file__).parents[1]

THREE_CALLS = """
import json, sys
from mcdi_hf import (
    MCDiPipeline, MCDiTrainer, MCDiTrainingArguments, Source, TrajectoryArguments, TrajectoryCollector
)
import mcdi_hf

root = sys.argv[1]
sources = [Source(f"{root}/source", group_column="domain")]
trajectories = TrajectoryCollector(
    TrajectoryArguments(
        output_dir=f"{root}/trajectories", pretrained_model_name_or_path=f"{root}/backbone", held_out_domains=["west"],
        ways=[2, 3], shots=[1, 3], queries_per_class=2, rank=2, layers=[1], num_tasks=3, shared_steps=2,
        max_train_steps=3,
    ),
    sources,
).collect()
folder = MCDiTrainer(
    args=MCDiTrainingArguments(
        output_dir=f"{root}/generator", dim=16, num_layers=1, shots=[1, 2], train_batch_size=2, tasks_per_step=1,
        max_train_steps=2, num_validation_episodes=2, validation_queries=2, validation_tasks=["2x1"],
    ),
    trajectories=trajectories,
    sources=sources,
).train()
adapter = MCDiPipeline.from_pretrained(folder)({"one": ["a b", "c"], "two": ["d e"]}).adapters[0]
adapter.save_pretrained(f"{root}/adapter")
print(json.dumps([mcdi_hf.__file__, adapter.labels, all(v.isfinite().all().item() for v in adapter.tensors.values())]))
"""


def run(*command: str | Path) -> str:
    # No PYTHONPATH, which would lead to the checkout.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=300, env=variables)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment with the wheel, and with this one's other packages behind it."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "src", checkout / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", checkout, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    shutil.rmtree(checkout)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", next(tmp_path.glob("*.whl")))
    # A path added this way is not searched for .pth files, so the editable checkout does not come along.
    (own,) = (tmp_path / "fresh" / "lib").glob("*/site-packages")
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_three_calls_of_the_wheel(python: Path, tmp_path: Path) -> None:
    backbone = tiny_backbone("default")
    save_backbone(backbone, tmp_path / "backbone")
    write_letters(tmp_path / "source", backbone)
    file, labels, finite = json.loads(run(python, "-c", THREE_CALLS, tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "fresh") and labels == ["one", "two"] and finite
    # The command of the wheel makes an adapter of 40 rows, which peft loads without this package's classes.
    rows = [
        (f"{letter} {word}", label)
        for label, word in (("one", "x y"), ("two", "z"))
        for letter in ascii_lowercase[:20]
    ]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    given = ["--pipeline", tmp_path / "generator" / "pipeline", "--output_dir", tmp_path / "made"]
    assert "1 were made" in run(python.parent / "mcdi-hf", "generate", tmp_path / "rows.csv", *given)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "made", num_labels=2)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "backbone")
    # The card's template is a file of the package, which a wheel may lack.
    assert "one" in (tmp_path / "adapter" / "README.md").read_text()
