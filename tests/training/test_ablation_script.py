"""The ablation of meta-training as a user runs it: every setting trained for two steps from tiny trajectories."""

import json
import re
from pathlib import Path

import pytest
from scripts import DOMAINS, EXAMPLES, Collected, run_each


NAMES = ["Mc-Di", "Mv-Di", "Tw-Di", "single level (OCD)"]


@pytest.fixture(scope="module")
def ended(collected: Collected, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The results' folder, and how each command ended."""
    folder = tmp_path_factory.mktemp("ablation") / "made"
    data = ["--pretrained_model_name_or_path", collected.backbone, "--dataset_name", collected.source]
    data += ["--trajectories", collected.trajectories / "trajectories"]
    command = [EXAMPLES / "ablate_meta_training.py", *data, "--kind", "2x1", "--episodes", 4, "--seeds", 0]
    command += ["--reptile_steps", 2, "--reptile_shots", 4, "--output_dir", folder]
    # The rest is for train_mcdi.py.
    configs = [folder.with_name(name) for name in ("config.json", "edited.json")]
    for path, layers in zip(configs, (1, 2)):
        path.write_text(json.dumps({"dim": 16, "num_layers": layers}))
    command += "--max_train_steps 2 --validation_tasks 2x1 --num_validation_episodes 2".split()
    command += ["--validation_domains", DOMAINS[2], "--config", configs[0]]
    return folder, run_each(
        {
            "first": [*command, "--test_domains", DOMAINS[2]],
            "second": [*command, "--test_domains", DOMAINS[2]],
            "other": [*command, "--test_domains", DOMAINS[2], "--max_train_steps", 3, "--temperature", 0.5],
            "edited": [*command, "--test_domains", DOMAINS[2], "--config", configs[1]],
            "leak": [*command, "--test_domains", *DOMAINS[1:], "--output_dir", folder.with_name("leak")],
        }
    )


def test_every_setting_is_trained_and_printed(ended: tuple[Path, dict]) -> None:
    folder, found = ended
    code, printed, said = found["first"]
    assert code == 0, said
    rows = dict(re.findall(r"^(\S.*?) {2,}(\d+\.\d\d) +\(0\.00\)", printed, re.MULTILINE))
    assert list(rows) == ["frozen, imprinted", "shared start, imprinted", *NAMES, "REPTILE"]
    assert all(0 <= float(value) <= 100 for value in rows.values())
    goal = r"bar mc_over_mv_over_tw: -?[01]\.\d{4} \(goal > 0\) (met|missed)"
    assert re.fullmatch(goal, printed.splitlines()[-1])
    pipelines = [folder / f"{name.split()[0]}-0" / "pipeline" / "model_index.json" for name in NAMES]
    assert all(path.exists() for path in pipelines)


def test_a_second_run_trains_nothing(ended: tuple[Path, dict]) -> None:
    first, second = (ended[1][name] for name in ("first", "second"))
    assert second[0] == 0 and second[1] == first[1]
    for name in ("REPTILE", "best="):  # in their bars of progress
        assert name in first[2] and name not in second[2]


def test_other_settings_and_leaks_are_refused_before_any_work(ended: tuple[Path, dict]) -> None:
    folder, found = ended
    code, printed, said = found["other"]
    line = said.splitlines()[-1]
    assert code == 1 and not printed and "temperature is 1.0 there, 0.5 here" in line and "train_mcdi.py is [" in line
    code, printed, said = found["edited"]
    assert code == 1 and "'num_layers': 1} there, {'dim': 16, 'num_layers': 2} here" in said.splitlines()[-1]
    code, printed, said = found["leak"]
    assert code == 1 and not printed and f"were made on the test domains ['{DOMAINS[1]}']" in said.splitlines()[-1]
    assert not list(folder.with_name("leak").rglob("*"))
