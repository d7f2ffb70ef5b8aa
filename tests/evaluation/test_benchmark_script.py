"""The benchmark of training as a user runs it, on a tiny family."""

import json
import re
import shutil
from pathlib import Path

import pytest
from scripts import DOMAINS, EXAMPLES, Collected, run_each


KINDS, SEEDS, EPISODES = ["2x1", "3x2"], [0, 1], 4
# What each bar is called in the output, behind the family's name.
BARS = {
    "paper": "accuracy",
    "half_of_frozen_error": "error_over_frozen_error",
    "five_points_over_frozen": "over_frozen",
    "over_shared": "over_shared",
    "three_points_over_shared": "over_shared",
    "shuffling_costs_five_points": "over_shuffled",
    "best_free_rival": "over_best_free_rival",
}
WAYS = [
    "frozen + imprinted head",
    "one shared adapter",
    "frozen + logistic regression",
    "mean adapter, imprinted head",
    "nearest training adapter",
    "gradient LoRA on the same shots",
    "generated, one draw",
    "generated, mean of 8",
    "generated, another task's condition",
]


def write_families(path: Path, **changes) -> Path:
    """One family, of the pipeline that `ended` trains, beside one that is never asked for."""
    family = {
        "name": "tiny",
        "pipeline": str(path.parent / "generator" / "pipeline"),
        "trajectories": "collected/trajectories",
        "backbone": "backbone",
        "sources": [{"dataset_name": "source", "group_column": "domain"}],
        "test_domains": DOMAINS[2:],
        "validation_domains": DOMAINS[2:],
        "split": "train",
        "query_split": "test",
        "kinds": KINDS,
        "validation_kinds": KINDS,
        "bars": list(BARS),
    }
    path.write_text(json.dumps([family | changes, {**family, "name": "other"}]))
    return path


@pytest.fixture(scope="module")
def ended(collected: Collected, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of the results, and how each command ended."""
    root = tmp_path_factory.mktemp("benchmark")
    train = [EXAMPLES / "train_mcdi.py", "--pretrained_model_name_or_path", collected.backbone]
    train += ["--trajectories", collected.trajectories / "trajectories", "--validation_domains", DOMAINS[2]]
    train += "--validation_tasks 2x1 --num_validation_episodes 2 --dim 16 --num_layers 1 --max_train_steps 2".split()
    train += ["--output_dir", root / "generator"]
    fixed = [EXAMPLES / "benchmark_training.py", "--data_root", collected.root, "--runs_root", collected.root]
    fixed += ["--cache_dir", root / "cache", "--seeds", *SEEDS, "--episodes", EPISODES, "--gradient_episodes", 2]
    fixed += "--shared_steps 2 --gradient_steps 1 2 --gradient_learning_rates 0.001".split()
    families = write_families(root / "families.json")
    command = [*fixed, "--families", families, "--only", "tiny", "--output"]
    unknown_bar = write_families(root / "unknown_bar.json", bars=["paper", "moon"])
    untuned = write_families(root / "untuned.json", validation_kinds=["2x1"])
    leak = write_families(root / "leak.json", test_domains=DOMAINS[1:])
    # What a run that was interrupted after its first rows leaves behind.
    begun = write_families(root / "begun.json", kinds=["2x1"])
    half = [*fixed, "--only", "tiny", "--output", root / "half" / "results.jsonl", "--families"]
    return root, run_each(
        {
            "train": train,
            "first": [*command, root / "results.jsonl"],
            "second": [*command, root / "results.jsonl"],
            "half": [*half, begun, "--seeds", 0],
            "resumed": [*half, families],
            "other_episodes": [*command, root / "results.jsonl", "--episodes", EPISODES + 1],
            "unknown_family": [*fixed, "--families", families, "--only", "huge", "--output", root / "no" / "file"],
            "unknown_bar": [*fixed, "--families", unknown_bar, "--output", root / "no" / "file"],
            "untuned": [*fixed, "--families", untuned, "--output", root / "no" / "file"],
            "leak": [*fixed, "--families", leak, "--only", "tiny", "--output", root / "leak.jsonl"],
        }
    )


def tables(printed: str) -> str:
    return printed[printed.index("tiny: accuracy") :]


def test_every_way_and_every_bar_is_printed(ended: tuple[Path, dict]) -> None:
    root, found = ended
    for name in ("train", "first"):
        code, printed, said = found[name]
        assert code == 0, said
    lines = [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["seed"]) for line in lines] == [(kind, seed) for kind in KINDS for seed in SEEDS]
    for line in lines:
        assert list(line["accuracy"]) == WAYS
        for name, values in line["accuracy"].items():
            few = name == "gradient LoRA on the same shots"
            assert len(values) == (2 if few else EPISODES) and all(0 <= value <= 1 for value in values)
    rows = tables(printed).splitlines()
    for number, way in enumerate(WAYS, start=2):
        assert rows[number].startswith(way) and len(re.findall(r"[01]\.\d{4} \(", rows[number])) == len(KINDS)
    bars = re.findall(r"^bar tiny_(\w+): \S+ \(goal [<>]=? [\d.]+\) (?:met|missed)$", printed, re.MULTILINE)
    assert bars == list(BARS.values())
    assert "other: accuracy" not in printed


def test_an_interrupted_run_goes_on_to_the_same_tables(ended: tuple[Path, dict]) -> None:
    root, found = ended
    first, second, resumed = (found[name] for name in ("first", "second", "resumed"))
    assert second[0] == 0 and second[1].strip() == tables(first[1]).strip()
    assert "tiny" not in second[2]  # no bar of progress: nothing was computed
    assert resumed[0] == 0 and tables(resumed[1]) == tables(first[1])
    assert "shared adapter, seed 0" in first[2] and "shared adapter, seed 0" not in resumed[2]
    files = sorted(path.name for path in (root / "half").iterdir())
    assert files == sorted(path.name for path in root.glob("results.*"))
    for name in files:
        assert (root / "half" / name).read_bytes() == (root / name).read_bytes()


def test_what_cannot_be_done_is_refused_before_any_work(ended: tuple[Path, dict]) -> None:
    root, found = ended
    wanted = {
        "other_episodes": f"was made with --episodes [{EPISODES}], not {EPISODES + 1}: take another --output",
        "unknown_family": "There are no families ['huge']: expected some of ['tiny', 'other']",
        "unknown_bar": "The family 'tiny' has the bars ['moon']: expected some of ['best_free_rival',",
        "untuned": "The family 'tiny' has test tasks of [2] shots but no validation_kinds",
    }
    for name, text in wanted.items():
        code, printed, said = found[name]
        assert code == 1 and not printed and text in said.splitlines()[-1]
    assert not (root / "no").exists()


def test_another_generator_has_other_results(ended: tuple[Path, dict]) -> None:
    root, found = ended
    generator = shutil.copytree(root / "generator" / "pipeline", root / "retrained")
    command = [EXAMPLES / "benchmark_training.py", "--data_root", root, "--output", root / "results.jsonl"]
    command += ["--episodes", EPISODES, "--only", "tiny", "--families"]
    same = [*command, write_families(root / "moved.json", pipeline=str(generator))]
    index = json.loads((generator / "model_index.json").read_text())
    weaker = shutil.copytree(generator, root / "weaker")
    (weaker / "model_index.json").write_text(json.dumps(index | {"strength": 0.25}))
    other = [*command, write_families(root / "weaker.json", pipeline=str(weaker))]
    ends = run_each({"same": [*same, "--seeds", *SEEDS], "other": [*other, "--seeds", *SEEDS]})
    assert ends["same"][0] == 0 and ends["same"][1].strip() == found["second"][1].strip()
    code, printed, said = ends["other"]
    assert code == 1 and not printed and "made with other generators of ['tiny']" in said.splitlines()[-1]


def test_domains_that_the_generator_was_trained_on_are_no_test(ended: tuple[Path, dict]) -> None:
    root, found = ended
    code, printed, said = found["leak"]
    assert code == 1 and not printed and f"'tiny' were made on ['{DOMAINS[1]}']" in said.splitlines()[-1]
    assert not list(root.glob("leak*.safetensors"))
