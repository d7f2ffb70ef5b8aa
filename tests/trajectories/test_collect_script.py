"""The collection script as a person runs it: killed, spread over processes, out of space, dry, and on every family."""

import json
import os
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import FakeHub
from scripts import DOMAINS, EXAMPLES, LAUNCH, call, refused, save_backbone, start, write_letters, write_split
from tiny import tiny_backbone, tiny_image_backbone, tiny_image_dataset, tiny_language_model

from mcdi_hf import AdapterLayout, load_trajectories
from mcdi_hf.trajectories.dataset import split_weights


SCRIPT = EXAMPLES / "collect_trajectories.py"
SMALL = (
    "--ways 2 3 --examples_per_class 6 6 --rank 2 --shared_steps 3 --train_batch_size 4 --max_train_steps 6".split()
)
NUM_TASKS = 8


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The script with everything but its output folder."""
    root = tmp_path_factory.mktemp("collect")
    backbone = tiny_backbone()
    source = write_letters(root / "source", backbone)
    options = ["--pretrained_model_name_or_path", save_backbone(backbone, root / "backbone"), "--dataset_name", source]
    options += ["--group_column", "domain", "--train_groups", *DOMAINS[:2], "--query_split", "validation", *SMALL]
    return [SCRIPT, *options, "--layers", "1", "--token_dim", "20", "--num_tasks", NUM_TASKS, "--max_stack_size", "2"]


@pytest.fixture(scope="module")
def straight(command: list, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, call(*command, "--output_dir", folder)


def shards(folder: Path) -> dict[str, bytes]:
    """Every shard that a loader would see, checked to be whole."""
    found = {}
    for path in sorted((folder / "trajectories" / "data").glob("*.parquet")):
        first, last = (int(number) for number in path.stem.split("-")[1:])
        assert pyarrow.parquet.read_table(path)["task"].to_pylist() == list(range(first, last + 1))
        found[path.name] = path.read_bytes()
    return found


def kill_when(process, condition) -> None:
    """SIGKILL the process and all that it started as soon as the condition holds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_summary_tells_what_was_made(straight: tuple[Path, str]) -> None:
    folder, printed = straight
    trajectories, made = load_trajectories(str(folder / "trajectories"))
    assert f"{NUM_TASKS} trajectories" in printed and len(trajectories) == NUM_TASKS
    for group in set(trajectories["group"][:]):
        count = list(trajectories["group"][:]).count(group)
        assert any(line.split() == [group, str(count)] for line in printed.splitlines())
    assert f"{np.mean(trajectories['accuracy'][:]):.3f}" in printed
    assert made["settings"]["num_steps"] == 6 and made["stack_size"] == 2
    assert list(trajectories[0]["steps"]) == [0, 2, 4, 6] and np.ptp(trajectories[0]["weights"], axis=0).any()


@pytest.mark.parametrize("moment", ["shared start", "second shard"])
def test_a_killed_run_continues_to_the_same_bytes(
    moment: str, command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    process = start(*command, "--output_dir", folder)
    if moment == "shared start":
        kill_when(process, folder.exists)
        assert not (folder / "shared_adapter.safetensors").exists()
        (folder / ".shared_adapter.safetensors.part").write_bytes(b"half")
    else:
        kill_when(process, lambda: len(list(folder.glob("trajectories/data/*.parquet"))) >= 2)
        assert len(shards(folder)) < NUM_TASKS / 2
        (folder / "trajectories" / "data" / ".train-000006-000007.parquet.part").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    call(*command, "--output_dir", folder)
    assert shards(folder) == shards(straight[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was computed twice


def test_two_processes_make_what_one_does_and_one_finishes_what_two_began(
    command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    launch = [*LAUNCH, "--num_processes", "2"]
    call(*launch, *command, "--output_dir", tmp_path / "two")
    assert shards(tmp_path / "two") == shards(straight[0])
    # Each process takes every second stack, so the third and last of one are written before all of the other's.
    process = start(*launch, *command, "--output_dir", tmp_path / "killed")
    kill_when(process, lambda: any((tmp_path / "killed").glob("trajectories/data/train-00000[26]*.parquet")))
    call(*command, "--output_dir", tmp_path / "killed")
    assert shards(tmp_path / "killed") == shards(straight[0])


def test_more_tasks_extend_and_other_settings_are_refused(
    command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    few = [NUM_TASKS // 2 + 1 if part == NUM_TASKS else part for part in command]
    call(*few, "--output_dir", tmp_path)
    before = shards(tmp_path)
    call(*command, "--output_dir", tmp_path)
    assert before.items() < shards(tmp_path).items()
    tasks = load_trajectories(str(tmp_path / "trajectories"))[0]["task"][:]
    assert tasks.tolist() == list(range(NUM_TASKS))
    said = refused(*command, "--learning_rate", "0.5", "--output_dir", tmp_path)
    assert "settings.learning_rate is 0.001 there, 0.5 here" in said


def test_a_disk_or_a_folder_that_cannot_be_written_is_one_clear_line(command: list, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(*command, "--output_dir", tmp_path / "file" / "below")
    assert said.startswith("error: ") and "Not a directory" in said

    for limit, name in ((2500, "shared_adapter.safetensors"), (6000, "data/train-000000-000001.parquet")):
        full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        said = refused(*command, "--output_dir", tmp_path / "full", preexec=full)
        assert said.startswith("error: ") and f"{name}: File too large" in said and "same command again" in said
        assert shards(tmp_path / "full") == {} and not list((tmp_path / "full").rglob("*.part"))
    said = refused(*command, "--num_tasks", 10**10, "--output_dir", tmp_path / "huge")
    assert said.startswith("error: ") and "MB left; the trajectories need" in said
    assert not (tmp_path / "huge").exists()


def test_a_dry_run_tells_and_writes_nothing(command: list, tmp_path: Path) -> None:
    plenty = call(*command, "--dry_run", "--max_stack_size", "999", "--output_dir", tmp_path / "dry")
    names = ["tasks", "examples", "weights", "stacks", "data set", "estimated time"]
    assert [line[:16].strip() for line in plenty.splitlines()] == names
    assert f"{NUM_TASKS}, of 8 classes in 2 groups" in plenty and "128 LoRA weights in 8 tokens" in plenty
    tight = call(*command, "--dry_run", "--memory_budget", "0.0005", "--output_dir", tmp_path / "dry")
    sizes = [int(text.splitlines()[3].split()[1]) for text in (tight, plenty)]
    assert 1 <= sizes[0] < sizes[1]
    assert not (tmp_path / "dry").exists()


def test_a_leak_is_named(command: list, tmp_path: Path) -> None:
    said = refused(*command, "--held_out_groups", "south", "--output_dir", tmp_path / "leak")
    assert "training and held_out share the classes ['south/south_0'" in said


def test_images_with_rotations_and_views(tmp_path: Path) -> None:
    backbone = tiny_image_backbone()
    write_split(tmp_path / "omniglot", "train", tiny_image_dataset(rows_per_class=6))
    options = ["--pretrained_model_name_or_path", save_backbone(backbone, tmp_path / "vit"), "--pooling", "default"]
    options += ["--dataset_name", tmp_path / "omniglot", "--input_columns", "image", "--label_column", "character"]
    options += "--group_column alphabet --rotations --num_views 2 --num_tasks 4 --target_modules q_proj v_proj".split()
    options += [*SMALL, "--examples_per_class", "4", "4", "--queries_per_class", "2", "--layers", "1", "2"]
    call(SCRIPT, *options, "--token_dim", "20", "--shared_steps", "2", "--output_dir", tmp_path / "made")
    trajectories, made = load_trajectories(str(tmp_path / "made" / "trajectories"))
    classes = {name for row in trajectories["classes"][:] for name in row}
    assert any(name.endswith("rotated 90") for name in classes) and not all("rotated" in name for name in classes)
    layout = AdapterLayout.from_dict(made["layout"])
    row = trajectories[0]
    tensors = split_weights(torch.from_numpy(row["weights"]), len(row["classes"]), layout)
    layout.check(tensors)
    assert made["lora_config"]["modules_to_save"] == ["classifier"] and made["num_views"] == 2


def test_a_language_model_and_a_mixture_with_pairs(tmp_path: Path) -> None:
    backbone = tiny_language_model()
    random = np.random.default_rng(0)

    def texts() -> list[str]:
        return [" ".join(random.choice(list("abcdefgh"), size=4)) for _ in range(24)]

    labels = [index % 2 for index in range(24)]
    for name, columns, names in (("single", ["text"], ["a", "b"]), ("pairs", ["one", "two"], ["x", "y"])):
        features = Features({column: Value("string") for column in columns} | {"label": ClassLabel(names=names)})
        rows = {column: texts() for column in columns} | {"label": labels}
        write_split(tmp_path / name, "train", Dataset.from_dict(rows, features=features))
    mixture = [{"dataset_name": "single"}, {"dataset_name": "pairs", "input_columns": ["one", "two"]}]
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    options = ["--mixture", tmp_path / "mixture.json", "--mixture_root", tmp_path, "--pooling", "last_token"]
    options += ["--pretrained_model_name_or_path", save_backbone(backbone, tmp_path / "llama"), *SMALL]
    options += "--ways 2 2 --target_modules q_proj v_proj --layers 2 --token_dim 20 --num_tasks 6".split()
    call(SCRIPT, *options, "--output_dir", tmp_path / "made")
    trajectories, made = load_trajectories(str(tmp_path / "made" / "trajectories"))
    found = {(group, *sorted(classes)) for group, classes in zip(trajectories["group"][:], trajectories["classes"][:])}
    assert found == {("single", "a", "b"), ("pairs", "x", "y")}
    layout = AdapterLayout.from_dict(made["layout"])
    assert layout.head_name is None and trajectories[0]["weights"].shape == (4, layout.numel)
    assert made["lora_config"]["task_type"] == "CAUSAL_LM"


def test_the_data_set_goes_to_the_hub(hub: FakeHub, command: list, straight: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(straight[0], tmp_path / "run")  # all is there: the script has only to finish and push
    push = ["--push_to_hub", "--hub_dataset_id", "tester/trajectories", "--output_dir", tmp_path / "run"]
    call(*command, *push, HF_HUB_OFFLINE="0")
    pushed, made = load_trajectories("tester/trajectories")
    local, record = load_trajectories(str(straight[0] / "trajectories"))
    assert made == record and len(pushed) == NUM_TASKS
    assert all(one["weights"].tobytes() == two["weights"].tobytes() for one, two in zip(pushed, local))
