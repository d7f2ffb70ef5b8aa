"""Runs of the scripts that are killed, that meet another run in their folder, whose disk is full, or that are two processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from reliability import Reliability
from safetensors.torch import load_file
from scripts import EXAMPLES, LAUNCH, Collected, call, collecting, command_line, run_each, start, training

from mcdi_hf.utils.run_folder import latest_checkpoint


SETTINGS = {"max_train_steps": 6, "validation_steps": 2, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
SETTINGS |= {"tasks_per_step": 2, "inner_steps": 1, "task_loss_weight": 0.0, "validation_tasks": ["2x1"]}
# Before which file operation a run is killed: as the first pipeline is moved in, as a second checkpoint is, and as an old
# one is deleted. `make reliability` tries more.
SOME_KILLS = (42, 60, 62)
ALL_KILLS = (3, 5, 20, 28, 36, 42, 46, 48, 50, 51, 54, 57, 58, 60, 61, 62, 65, 68, 71, 72, 73)
SOME_LAUNCHES, ALL_LAUNCHES = 2, 20


@pytest.fixture(scope="module")
def command(collected: Collected) -> list:
    """Meta-training, with everything but its output folder."""
    arguments = training(collected.root, trajectories=str(collected.trajectories / "trajectories"), **SETTINGS)
    return [EXAMPLES / "train_mcdi.py", *command_line(arguments, "output_dir")]


@pytest.fixture(scope="module")
def straight(command: list, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a run comes to that nothing disturbed. It has a process of its own, as those that are killed: in one that ran
    many tests before, the last bit may differ."""
    folder = tmp_path_factory.mktemp("straight")
    code, _, said = run_each({"straight": [*command, "--output_dir", folder]})["straight"]
    assert code == 0, said[-2000:]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint_6"]
    return made(folder)


def made(folder: Path) -> dict:
    """The pipeline, the curve, and the name and weights of the newest checkpoint. A kill may leave an older one, too."""
    newest = latest_checkpoint(folder / "checkpoints")
    paths = [*sorted(folder.glob("pipeline/*/*.safetensors")), newest / "model.safetensors"]
    weights = {str(path.relative_to(folder)): load_file(path) for path in paths}
    index = (folder / "pipeline" / "model_index.json").read_text()
    return {"weights": weights, "index": index, "curve": json.loads((folder / "curve.json").read_text())}


def same(one: dict, two: dict, tolerance: float = 0.0) -> bool:
    if one["weights"].keys() != two["weights"].keys() or (one["index"], one["curve"]) != (two["index"], two["curve"]):
        return False
    pairs = [(own[key], two["weights"][name][key]) for name, own in one["weights"].items() for key in own]
    return all(torch.allclose(first, second, rtol=0, atol=tolerance) for first, second in pairs)


def test_killed_runs_come_to_the_same_end(
    command: list, straight: dict, thorough: bool, reliability: Reliability, tmp_path: Path
) -> None:
    numbers = ALL_KILLS if thorough else SOME_KILLS
    folders = {str(number): tmp_path / str(number) for number in numbers}
    run = {name: [*command, "--output_dir", folder] for name, folder in folders.items()}
    kills = {name: (folder, int(name)) for name, folder in folders.items()}
    ended = run_each(run, kills=kills)
    assert {code for code, _, _ in ended.values()} == {-9}
    for folder in folders.values():  # a state that was being written when the run was killed
        for file in folder.glob("checkpoints/.part/*"):
            file.write_bytes(file.read_bytes()[:100])
    ended = run_each({name: [*one, "--resume_from_checkpoint", "latest"] for name, one in run.items()})
    for name, folder in folders.items():
        assert ended[name][0] == 0, ended[name][2][-2000:]
        found, _ = reliability.attempt(
            "meta-trainings after kill -9, resumed", lambda: made(folder), same=lambda one: same(one, straight)
        )
        assert same(found, straight), name


def test_a_second_run_is_refused(
    command: list, collected: Collected, reliability: Reliability, tmp_path: Path
) -> None:
    data = ["--dataset_name", collected.source, "--group_column", "domain"]
    collect = [EXAMPLES / "collect_trajectories.py", *data, *command_line(collecting(collected.backbone, tmp_path))]
    commands = {"train": [*command, "--output_dir", tmp_path], "collect": collect}
    with FileLock(tmp_path / ".lock"):  # this process is the first run
        ended = run_each(commands)
        launched = start(*LAUNCH, "--num_processes", "2", *commands["train"])
        said = {name: error for name, (_, _, error) in ended.items()} | {
            "launch": launched.communicate(timeout=120)[1]
        }
    assert [code for code, _, _ in ended.values()] == [1, 1] and launched.returncode != 0
    for name in said:

        def refuse(text: str = said[name]) -> None:
            raise OSError(next(line for line in text.splitlines() if line.startswith("error: ")))

        message = f"error: Another run writes to {tmp_path}: wait for its end"
        _, found = reliability.attempt("second runs in one folder", refuse, message)
        assert found
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_an_earlier_run_is_not_mixed_with_another(command: list, collected: Collected, tmp_path: Path) -> None:
    shutil.copytree(collected.trajectories, tmp_path / "checkpoints" / "checkpoint_0")
    ended = run_each({"again": [*command, "--output_dir", tmp_path]})["again"]
    assert ended[0] == 1 and ended[2].splitlines()[-1].startswith(f"error: {tmp_path} holds checkpoints of an earlier")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_a_full_disk_is_one_clear_line(
    command: list, straight: dict, reliability: Reliability, tmp_path: Path
) -> None:
    # Fewer bytes than the copy of the trajectories in the cache takes, than the denoiser, and than a checkpoint's model,
    # which is both parts of the generator and so larger than any file of the pipeline.
    (model,) = (own for name, own in straight["weights"].items() if name.startswith("checkpoints"))
    size = sum(value.numel() * value.element_size() for value in model.values())
    limits = {"cache": 3000, "pipeline": 20_000, "checkpoint": size}
    wanted = {
        "cache": f"to the cache of datasets in {tmp_path / 'cache'}: File too large",
        "pipeline": f"{tmp_path / 'pipeline' / 'pipeline'}: Error while serializing",
        "checkpoint": f"{tmp_path / 'checkpoint' / 'checkpoints' / 'checkpoint_2'}: Error while serializing",
    }
    commands = {name: [*command, "--output_dir", tmp_path / name] for name in limits}
    ended = run_each(commands, limits, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    for name, (code, _, said) in ended.items():

        def refuse(text: str = said) -> None:
            raise OSError(text.splitlines()[-1])

        _, found = reliability.attempt("full disks", refuse, wanted[name])
        assert code == 1 and found.startswith("error: ") and "Traceback" not in said
    assert not (tmp_path / "pipeline" / "pipeline").exists()
    assert not list((tmp_path / "checkpoint" / "checkpoints").glob("checkpoint_*"))
    assert (tmp_path / "checkpoint" / "pipeline" / "model_index.json").exists()


def test_launches_of_two_processes_end(
    command: list, straight: dict, thorough: bool, reliability: Reliability, tmp_path: Path
) -> None:
    for number in range(ALL_LAUNCHES if thorough else SOME_LAUNCHES):
        folder = tmp_path / str(number)

        def launch(folder: Path = folder) -> dict:
            call(*LAUNCH, "--num_processes", "2", *command, "--output_dir", folder)  # 300 seconds at most
            return made(folder)

        found, _ = reliability.attempt("launches of two processes", launch, same=lambda one: same(one, straight, 1e-4))
        assert same(found, straight, 1e-4)
        assert len(list(folder.glob("checkpoints/*/random_states_*.pkl"))) == 2
