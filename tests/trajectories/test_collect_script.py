"""The collection script as a person runs it: killed, spread over processes, out of space, dry, and on every family."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import FakeHub
from peft import LoraConfig, get_peft_model_state_dict
from scripts import (
    CLASSES,
    DOMAINS,
    EXAMPLES,
    LAUNCH,
    call,
    run_each,
    save_backbone,
    start,
    write_letters,
    write_split,
)
from tiny import in_peft, tiny_backbone, tiny_image_backbone, tiny_image_dataset, tiny_language_model

from mcdi_hf import AdapterLayout, FrozenBackbone, load_trajectories
from mcdi_hf.trajectories.dataset import split_weights


SCRIPT = EXAMPLES / "collect_trajectories.py"
SMALL = (
    "--ways 2 3 --examples_per_class 6 6 --rank 2 --shared_steps 3 --train_batch_size 4 --max_train_steps 6".split()
)
NUM_TASKS = 12


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The script with everything but its output folder."""
    root = tmp_path_factory.mktemp("collect")
    backbone = tiny_backbone()
    source = write_letters(root / "source", backbone)
    options = ["--pretrained_model_name_or_path", save_backbone(backbone, root / "backbone"), "--dataset_name", source]
    options += ["--group_column", "domain", "--train_domains", *DOMAINS[:2], "--query_split", "validation", *SMALL]
    # Long enough that a run can be caught in the middle.
    options += "--shared_steps 60 --max_train_steps 24 --layers 1 --token_dim 20 --max_stack_size 2".split()
    return [SCRIPT, *options, "--num_tasks", NUM_TASKS]


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


def visible(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock and those that are marked as half."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part" and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL the process and all that it started, which a launcher puts into sessions of their own."""
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()
    process.communicate()


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_the_summary_tells_what_was_made(straight: tuple[Path, str]) -> None:
    folder, printed = straight
    trajectories, made = load_trajectories(str(folder / "trajectories"))
    assert f"{NUM_TASKS} trajectories" in printed and len(trajectories) == NUM_TASKS
    for group in set(trajectories["group"][:]):
        count = list(trajectories["group"][:]).count(group)
        assert any(line.split() == [group, str(count)] for line in printed.splitlines())
    assert f"{np.mean(trajectories['accuracy'][:]):.3f}" in printed
    assert made["settings"]["num_steps"] == 24 and made["stack_size"] == 2
    assert list(trajectories[0]["steps"]) == [0, 8, 16, 24] and np.ptp(trajectories[0]["weights"], axis=0).any()


def test_a_run_that_is_killed_twice_continues_to_the_same_bytes(
    command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    cached = ["--cache_dir", tmp_path / "hidden"]  # the undisturbed run has them in memory
    process = start(*command, "--output_dir", folder, *cached)
    wait_for(process, folder.exists)
    time.sleep(0.1)
    kill(process)  # the shared start is on its way
    assert visible(folder) == {}
    (folder / "shared_adapter.safetensors.part").write_bytes(b"half")
    (folder / ".shared_adapter.safetensors.part").write_bytes(b"half")
    process = start(*command, "--output_dir", folder, *cached)
    wait_for(process, lambda: len(list(folder.glob("trajectories/data/*.parquet"))) >= 2)
    kill(process)
    before = times(folder)
    assert 2 <= len(shards(folder)) < NUM_TASKS / 2
    (folder / "trajectories" / "data" / f".train-{NUM_TASKS - 2:06d}-{NUM_TASKS - 1:06d}.parquet.part").write_bytes(
        b""
    )
    call(*command, "--output_dir", folder, *cached)
    assert len(shards(folder)) == NUM_TASKS / 2 and visible(folder) == visible(straight[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was computed twice
    assert len(list((tmp_path / "hidden").glob("*.npy"))) == 1


def test_two_processes_make_what_one_does_and_one_finishes_what_two_began(
    command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    launch, folder = [*LAUNCH, "--num_processes", "2"], tmp_path / "killed"
    call(*launch, *command, "--output_dir", tmp_path / "two")
    assert visible(tmp_path / "two") == visible(straight[0])
    # Each process takes every second stack: one that stands still leaves its own out, and nobody else makes them.
    names = list(shards(straight[0]))
    process = start(*launch, *command, "--output_dir", folder)
    wait_for(process, lambda: any(folder.glob("trajectories/data/*.parquet")))
    workers = psutil.Process(process.pid).children(recursive=True)
    (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    second.suspend()
    wait_for(process, lambda: set(names[::2]) <= shards(folder).keys())
    time.sleep(0.5)  # enough for a stack more
    kill(process)
    assert not set(names[1::2]) <= shards(folder).keys()
    before = times(folder)
    call(*command, "--output_dir", folder)
    assert visible(folder) == visible(straight[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_more_tasks_extend_the_data_set_and_go_to_the_hub(
    hub: FakeHub, command: list, straight: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    before, whole = times(folder), shards(folder)
    push = ["--push_to_hub", "--hub_dataset_id", "tester/trajectories", "--output_dir", folder]
    call(*command, "--num_tasks", NUM_TASKS + 3, *push, HF_HUB_OFFLINE="0")
    assert whole.items() < shards(folder).items()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    local, record = load_trajectories(str(folder / "trajectories"))
    assert local["task"][:].tolist() == list(range(NUM_TASKS + 3))
    pushed, made = load_trajectories("tester/trajectories")
    assert made == record and pushed.features == local.features
    for one, two in zip(pushed.with_format(None), local.with_format(None), strict=True):
        assert one == two


@pytest.fixture(scope="module")
def refused(command: list, straight: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder, and what was said on stderr by each command that could not be done there."""
    root = tmp_path_factory.mktemp("refused")
    (root / "file").write_text("")
    shutil.copytree(straight[0], root / "made")
    options = {
        "below": ["--output_dir", root / "file" / "below"],
        "start": ["--output_dir", root / "start"],
        "shard": ["--output_dir", root / "shard"],
        "huge": ["--output_dir", root / "huge", "--num_tasks", 10**9],
        "leak": ["--output_dir", root / "leak", "--held_out_domains", DOMAINS[1], DOMAINS[2]],
        "unknown": ["--output_dir", root / "unknown", "--held_out_domains", "east"],
        "rank": ["--output_dir", root / "made", "--rank", 3],
        "learning_rate": ["--output_dir", root / "made", "--learning_rate", 0.5],
        "num_targets": ["--output_dir", root / "made", "--num_targets", 2],
    }
    # 1500 bytes are fewer than the shared start takes, 6000 more than that but fewer than a shard.
    ended = run_each({name: command + added for name, added in options.items()}, {"start": 1500, "shard": 6000})
    assert all(code == 1 and not printed for code, printed, _ in ended.values())
    return root, {name: said for name, (_, _, said) in ended.items()}


def test_a_disk_or_a_folder_that_cannot_be_written_is_one_clear_line(refused: tuple[Path, dict]) -> None:
    root, said = refused
    for name in ("below", "start", "shard", "huge"):
        assert said[name].splitlines()[-1].startswith("error: ") and "Traceback" not in said[name]
    assert "Not a directory" in said["below"]
    for name, file in (("start", "shared_adapter.safetensors"), ("shard", "train-000000-000001.parquet")):
        line = said[name].splitlines()[-1]
        assert f"{file}: File too large" in line and "run the same command again" in line
    assert [path.name for path in (root / "start").rglob("*")] == [".lock"]
    assert shards(root / "shard") == {} and not list((root / "shard").rglob("*.part"))
    assert "MB left; the trajectories need" in said["huge"] and not (root / "huge").exists()
    assert "lower layers" in said["shard"] and "lower layers" not in said["huge"]  # refused before the work


def test_other_settings_in_the_same_folder_are_named(refused: tuple[Path, dict], straight: tuple[Path, str]) -> None:
    root, said = refused
    assert "lora_config.r is 2 there, 3 here" in said["rank"]
    assert "settings.learning_rate is 0.001 there, 0.5 here" in said["learning_rate"]
    assert "settings.num_targets is 3 there, 2 here" in said["num_targets"]
    assert visible(root / "made") == visible(straight[0])


def test_leaks_and_unknown_domains_are_named(refused: tuple[Path, dict]) -> None:
    root, said = refused
    classes = [f"{DOMAINS[1]}/{DOMAINS[1]}_{number}" for number in range(CLASSES)]
    assert f"training and held_out share the classes {classes}" in said["leak"]
    assert "no domains ['east']" in said["unknown"]
    assert not (root / "leak").exists() and not (root / "unknown").exists()


def test_a_dry_run_tells_and_writes_nothing(command: list, tmp_path: Path) -> None:
    options = ["--dry_run", "--max_stack_size", 999, "--output_dir", tmp_path / "dry", "--memory_budget"]
    budgets = {"plenty": 0.5, "tight": 0.0005, "none": 0.00001}
    ended = run_each({name: [*command, *options, budget] for name, budget in budgets.items()})
    plenty, tight = ended["plenty"][1], ended["tight"][1]
    names = ["tasks", "examples", "weights", "stacks", "data set", "estimated time"]
    assert [line[:16].strip() for line in plenty.splitlines()] == names
    assert f"{NUM_TASKS}, of 8 classes in 2 groups" in plenty and "128 LoRA weights in 8 tokens" in plenty
    sizes = [int(text.splitlines()[3].split()[1]) for text in (tight, plenty)]
    assert 1 <= sizes[0] < sizes[1]
    code, _, said = ended["none"]
    assert code == 1 and "ValueError: One task takes" in said.splitlines()[-1]
    assert all("shared start:" not in said for _, _, said in ended.values())
    assert not (tmp_path / "dry").exists()


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
    trained = FrozenBackbone.from_pretrained(str(tmp_path / "vit"), pooling="default")
    model = in_peft(trained, LoraConfig(**made["lora_config"]), tensors, -1)
    state = get_peft_model_state_dict(model)
    assert state.keys() == tensors.keys() and all(state[key].equal(tensors[key][-1]) for key in state)
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
