"""The benchmark of generation as a user runs it, on a tiny pipeline."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from scripts import DOMAINS, EXAMPLES, run_each, save_backbone, write_letters
from tiny import tiny_pipeline


WAYS = [
    "gradient LoRA",
    "SetFit",
    "mean adapter, imprinted head",
    *(f"generated, {steps} step{'s' if steps > 1 else ''}" for steps in (20, 8, 4, 2, 1)),
    "generated, best of 8 and of what is free",
    "generated, mean of 8",
    "generated, 5 steps of refinement",
]
EPISODES, REPEATS, BATCHES = 3, 1, ["1", "8", "64"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of the results, and how each command ended."""
    root = tmp_path_factory.mktemp("benchmark")
    pipe, backbone = tiny_pipeline()
    pipe.save_pretrained(root / "pipeline")
    save_backbone(backbone, root / "backbone")
    write_letters(root / "source", backbone)
    family = {
        "name": "tiny",
        "pipeline": str(root / "pipeline"),
        "backbone": str(root / "backbone"),
        "sources": [{"dataset_name": "source", "group_column": "domain"}],
        "split": "train",
        "query_split": "test",
        "validation_domains": DOMAINS[1:2],
        "validation_kinds": ["2x1"],
        "test_domains": DOMAINS[2:],
        "kinds": ["2x1"],
    }
    (root / "families.json").write_text(json.dumps([family, family | {"name": "other"}]))
    command = [EXAMPLES / "benchmark_generation.py", "--data_root", root, "--families", root / "families.json"]
    command += ["--episodes", EPISODES, "--repeats", REPEATS, "--gradient_episodes", 2, "--setfit_episodes", 1]
    command += "--gradient_steps 1 2 --gradient_learning_rates 0.001 --validation_episodes 2 --adapters 5".split()
    outputs = ["--output", root / "runs" / "results.json", "--pictures", root / "pictures"]
    return root, run_each(
        {
            "run": [*command, *outputs, "--only", "tiny"],
            "unknown": [*command, "--only", "huge", "--output", root / "no" / "file"],
        }
    )


def test_every_way_is_judged_and_timed(ended: tuple[Path, dict]) -> None:
    root, found = ended
    code, printed, said = found["run"]
    assert code == 0, said
    (family,) = json.loads((root / "runs" / "results.json").read_text())["families"]
    rows = family["rows"]["2x1"]
    assert [row["way"] for row in rows] == WAYS
    for row in rows:
        assert len(row["accuracy"]) == {"gradient LoRA": 2, "SetFit": 1}.get(row["way"], EPISODES)
        batches = BATCHES if re.fullmatch(r"generated, \d+ steps?", row["way"]) else ["1"]
        assert list(row["seconds"]) == batches and all(len(own) == REPEATS for own in row["seconds"].values())
        assert re.search(rf"^\| {row['way']} +\| [01]\.\d{{4}} \(", printed, re.MULTILINE)
    assert [row["batch"] for row in family["floors"]] == [1, 8, 64]
    assert all(row["products"] == family["floors"][0]["products"] > 0 for row in family["floors"])
    whole = family["parts"].pop("call")
    assert sum(family["parts"].values()) == pytest.approx(whole, rel=0.5)
    assert list(family["memory"]) == BATCHES and family["serving"]["adapters"] == 5


def test_every_bar_is_printed_and_every_picture_drawn(ended: tuple[Path, dict]) -> None:
    root, found = ended
    printed = found["run"][1].splitlines()
    names = [re.match(r"bar (\w+): \S+ \(goal [<>]= [\d.]+\) (?:met|missed)$", line)[1] for line in printed[-7:]]
    assert names == [
        "time_over_gradient_lora_worst_row",
        "points_over_gradient_lora_worst_row",
        "points_20_steps_over_4_worst_row",
        "adapters_a_second_batch_64_over_1_worst_row",
        "call_over_floor_and_features_worst_family",
        "swap_ms_worst_family",
        "mixed_batch_of_5_over_plain_backbone_worst_family",
    ]
    for name in ("generation_time", "generation_steps"):
        with Image.open(root / "pictures" / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 10  # not blank


def test_unknown_families_are_refused(ended: tuple[Path, dict]) -> None:
    root, found = ended
    code, printed, said = found["unknown"]
    assert code == 1 and not printed
    assert "There are no families ['huge']: expected some of ['tiny', 'other']" in said.splitlines()[-1]
    assert not (root / "no").exists()
