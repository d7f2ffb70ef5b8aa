"""Weight preparation: killed, spread over processes, out of space, and dry."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
from datasets import load_dataset
from fake_hub import FakeHub
from safetensors import safe_open
from safetensors.torch import save_file
from scripts import (
    CLASSES,
    DOMAINS,
    EXAMPLES,
    LAUNCH,
    call,
    collecting,
    command_line,
    run_each,
    save_backbone,
    start,
    training,
    write_letters,
    write_split,
)
from tiny import tiny_backbone

from mcdi_hf import (
    MCDiTrainer,
    Source,
    TrajectoryArguments,
    TrajectoryCollector,
    TrajectoryFolder,
    load_trajectories,
)
from mcdi_hf.data.sources import load_table


SCRIPT, NUM_TASKS = EXAMPLES / "collect_trajectories.py", 12


class Setting:
    """A tiny backbone and data set, and what is made of them, long enough that a run can be caught in the middle."""

    def __init__(self, root: Path) -> None:
        backbone = tiny_backbone()
        self.root, self.backbone = root, save_backbone(backbone, root / "backbone")
        self.sources = [Source(str(write_letters(root / "source", backbone)), group_column="domain")]

    def arguments(self, folder: Path, **changes) -> TrajectoryArguments:
        values = {"shared_steps": 40, "validation_steps": 10, "max_train_steps": 24, "num_tasks": NUM_TASKS}
        values |= {"held_out_domains": DOMAINS[2:], "validation_domains": DOMAINS[2:], "num_validation_episodes": 2}
        values |= {"validation_tasks": ["2x1"], "train_domains": None}
        return collecting(self.backbone, folder, **(values | changes))

    def collect(self, folder: Path, **changes) -> TrajectoryFolder:
        return TrajectoryCollector(self.arguments(folder, **changes), self.sources).collect()

    def command(self, folder: Path, **changes) -> list:
        """The script's command for the same."""
        data = ["--dataset_name", self.sources[0].dataset_name, "--group_column", "domain"]
        return [SCRIPT, *data, *command_line(self.arguments(folder, **changes))]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("collect"))


@pytest.fixture(scope="module")
def straight(setting: Setting) -> Path:
    """The folder of a run that nothing disturbed."""
    return setting.collect(setting.root / "straight").folder.parent


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


def test_the_script_makes_what_the_collector_makes_and_tells_it(
    setting: Setting, straight: Path, tmp_path: Path
) -> None:
    printed = call(*setting.command(tmp_path / "run"))
    assert visible(tmp_path / "run") == visible(straight)
    trajectories, made, _ = load_trajectories(str(straight / "trajectories"))
    assert f"{NUM_TASKS} trajectories" in printed and len(trajectories) == NUM_TASKS
    for group in set(trajectories["group"][:]):
        count = list(trajectories["group"][:]).count(group)
        assert any(line.split() == [group, str(count)] for line in printed.splitlines())
    assert f"{np.mean(trajectories['accuracy'][:]):.3f}" in printed
    assert made["settings"]["num_steps"] == 24 and made["stack_size"] == 2
    assert list(trajectories[0]["steps"]) == [0, 8, 16, 24] and np.ptp(trajectories[0]["weights"], axis=0).any()


def test_a_run_that_is_killed_twice_continues_to_the_same_bytes(
    setting: Setting, straight: Path, tmp_path: Path
) -> None:
    folder, hidden = tmp_path / "killed", tmp_path / "hidden"
    command = setting.command(folder, cache_dir=hidden)  # the undisturbed run has the hidden states in memory
    process = start(*command)
    wait_for(process, lambda: any(hidden.glob("*.npy")))
    wait_for(process, lambda: (folder / "shared_checkpoint.safetensors").exists())
    kill(process)  # the shared start is on its way
    assert visible(folder).keys() == {"shared_checkpoint.safetensors"}
    (folder / ".shared_adapter.safetensors.part").write_bytes(b"half")
    process = start(*command)
    wait_for(process, lambda: len(list(folder.glob("trajectories/data/*.parquet"))) >= 2)
    kill(process)
    before = times(folder)
    assert 2 <= len(shards(folder)) < NUM_TASKS / 2
    (folder / "trajectories" / "data" / f".train-{NUM_TASKS - 2:06d}-{NUM_TASKS - 1:06d}.parquet.part").write_bytes(
        b""
    )
    setting.collect(folder, cache_dir=hidden)
    assert len(shards(folder)) == NUM_TASKS / 2 and visible(folder) == visible(straight)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was computed twice
    assert len(list(hidden.glob("*.npy"))) == 2  # of the training and of the validation examples


def test_two_processes_make_what_one_does_and_one_finishes_what_two_began(
    setting: Setting, straight: Path, tmp_path: Path
) -> None:
    launch, folder = [*LAUNCH, "--num_processes", "2"], tmp_path / "killed"
    call(*launch, *setting.command(tmp_path / "two"))
    assert visible(tmp_path / "two") == visible(straight)
    # Each process takes every second stack: one that stands still leaves its own out, and nobody else makes them.
    names = list(shards(straight))
    process = start(*launch, *setting.command(folder))
    wait_for(process, lambda: any(folder.glob("trajectories/data/*.parquet")))
    workers = psutil.Process(process.pid).children(recursive=True)
    (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    second.suspend()
    wait_for(process, lambda: set(names[::2]) <= shards(folder).keys())
    time.sleep(0.5)  # enough for a stack more
    kill(process)
    assert not set(names[1::2]) <= shards(folder).keys()
    before = times(folder)
    setting.collect(folder)
    assert visible(folder) == visible(straight)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_more_tasks_extend_the_data_set_and_go_to_the_hub(
    hub: FakeHub, setting: Setting, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    before, whole = times(folder), shards(folder)
    setting.collect(folder, num_tasks=NUM_TASKS + 3, push_to_hub=True, hub_dataset_id="tester/trajectories")
    assert whole.items() < shards(folder).items()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    local, record, _ = load_trajectories(str(folder / "trajectories"))
    assert local["task"][:].tolist() == list(range(NUM_TASKS + 3))
    pushed, made, codec = load_trajectories("tester/trajectories")
    assert made == record and codec.head.feature_norm > 0 and pushed.features == local.features
    for one, two in zip(pushed.with_format(None), local.with_format(None), strict=True):
        assert one == two


def test_a_disk_or_a_folder_that_cannot_be_written_is_one_clear_line(
    setting: Setting, straight: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    # all but shards and checkpoint, which are small and large
    begun = shutil.ignore_patterns("*.parquet", "shared_checkpoint*", ".lock")
    shutil.copytree(straight, tmp_path / "shard", ignore=begun)
    commands = {
        "below": setting.command(tmp_path / "file" / "below"),
        "start": setting.command(tmp_path / "start"),
        "shard": setting.command(tmp_path / "shard"),
        "huge": setting.command(tmp_path / "huge", num_tasks=10**12),
    }
    # The first are fewer bytes than a checkpoint of the shared start takes, the second fewer than a shard.
    ended = run_each(commands, {"start": 1500, "shard": 5000})
    said = {name: text for name, (_, _, text) in ended.items()}
    for name, (code, printed, text) in ended.items():
        assert code == 1 and not printed
        assert text.splitlines()[-1].startswith("error: ") and "Traceback" not in text, name
    assert "Not a directory" in said["below"]
    for name, file in (("start", "shared_checkpoint.safetensors"), ("shard", "train-000000-000001.parquet")):
        line = said[name].splitlines()[-1]
        assert f"{file}: File too large" in line and "run the same command again" in line
    assert [path.name for path in (tmp_path / "start").rglob("*")] == [".lock"]
    assert shards(tmp_path / "shard") == {} and not list((tmp_path / "shard").rglob("*.part"))
    assert "MB left; the trajectories need" in said["huge"] and not (tmp_path / "huge").exists()
    assert "lower layers" in said["shard"] and "lower layers" not in said["huge"]  # refused before the work


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 3}, "lora_config.r is 2 there, 3 here"),
        ({"learning_rate": 0.5}, "settings.learning_rate is 0.15 there, 0.5 here"),
        ({"num_targets": 2}, "settings.num_targets is 3 there, 2 here"),
    ],
)
def test_other_settings_in_the_same_folder_are_named(
    setting: Setting, straight: Path, changes: dict, message: str
) -> None:
    before = visible(straight)
    with pytest.raises(ValueError, match=message):
        setting.collect(straight, **changes)
    assert visible(straight) == before
    setting.collect(straight)  # the lock was given back
    assert visible(straight) == before


def test_leaks_and_unknown_domains_are_named(setting: Setting, tmp_path: Path) -> None:
    classes = ", ".join(f"'{DOMAINS[1]}/{DOMAINS[1]}_{number}'" for number in range(CLASSES))
    for changes, message in (
        (
            {"train_domains": DOMAINS[:2], "held_out_domains": DOMAINS[1:]},
            f"training and held_out share the classes .{classes}",
        ),
        (
            {"train_domains": None, "held_out_domains": ["east"], "validation_domains": None},
            r"no domains \['east'\] to hold out",
        ),
        ({"validation_tasks": ["2x0"]}, "The kind of tasks '2x0' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            setting.collect(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_and_writes_nothing(setting: Setting, tmp_path: Path) -> None:
    printed = call(*setting.command(tmp_path / "dry"), "--dry_run")
    told = {line[:16].strip(): line[17:] for line in printed.splitlines()}
    assert list(told) == ["tasks", "examples", "weights", "data set", "estimated time"]
    assert told["tasks"] == f"{NUM_TASKS}, of 8 classes in 2 groups"
    assert told["weights"] == "4 numbers in 2 tokens, for 128 of LoRA"
    assert not (tmp_path / "dry").exists()


def test_texts_of_a_test_set_are_left_out_and_counted(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = load_dataset(setting.sources[0].dataset_name)["train"]
    write_split(
        tmp_path / "test_set", "test", table.select([0, 1]).map(lambda row: {"text": row["text"].upper() + " !"})
    )
    name = str(tmp_path / "test_set")
    arguments = setting.arguments(tmp_path / "run", exclude_texts_of=[name], shared_steps=1, num_tasks=2)
    collector = TrajectoryCollector(arguments, setting.sources)
    left_out = {row["text"] for row in table.select([0, 1])}
    assert not left_out & set(collector.table["input"][:]) and collector.removed >= 2
    collector.collect()
    assert f"{collector.removed} training rows are texts of {name}: left out." in capsys.readouterr().out
    _, made, _ = load_trajectories(str(tmp_path / "run" / "trajectories"))
    assert made["exclude_texts_of"] == [name]


def test_a_shared_start_made_anew_otherwise_continues_nothing(
    setting: Setting, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    path = folder / "shared_adapter.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: 1.001 * file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, path, metadata)  # as another machine's rounding would
    with pytest.raises(ValueError, match="trajectories in the basis of another shared adapter"):
        setting.collect(folder, num_tasks=NUM_TASKS + 2)
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match="shared_adapter.safetensors is damaged"):
        setting.collect(folder)
    assert shards(folder) == shards(straight)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crossed_share": 0.5, "ways": [3, 4]}, "crossed_share needs ways from 2 on"),
        ({"own_share": 1.5}, "own_share is 1.5: expected a share from 0 to 1"),
        ({"ways": [1, 3]}, r"ways is \[1, 3\]: expected 2 classes or more"),
        ({"examples_per_class": 4}, "examples_per_class is 4: expected 5 or more"),
        ({"held_out_domains": []}, r"validation_domains has \['west'\], which held_out_domains has not"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    setting: Setting, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setting.arguments(tmp_path / "run", **changes)


def test_classes_are_held_out_of_a_flat_data_set(setting: Setting, tmp_path: Path) -> None:
    """With text and label alone a generator is trained, and chosen on classes that no trajectory is of."""
    flat = {"held_out_domains": [], "validation_domains": None, "shared_steps": 2, "num_tasks": 2}
    name = setting.sources[0].dataset_name
    with pytest.raises(ValueError, match="Nothing is held out.*held_out_classes for a data set without domains"):
        TrajectoryCollector(setting.arguments(tmp_path / "made", **flat), [Source(name)])
    assert not (tmp_path / "made").exists()
    command = [SCRIPT, "--dataset_name", name, "--held_out_classes", "0.3"]
    call(*command, *command_line(setting.arguments(tmp_path / "made", **flat)))
    trajectories, made, _ = load_trajectories(str(tmp_path / "made" / "trajectories"))
    assert "held-out classes" not in made["train_domains"]
    trainer = MCDiTrainer(training(tmp_path / "run", validation_domains=None), tmp_path / "made" / "trajectories")
    assert trainer.data.domains == ["held-out classes"]
    seen = {name for row in trajectories["classes"][:] for name in row} | set(trainer.data.rows.groups["all"])
    judged = {name for tasks in trainer.data.validation.values() for task in tasks for name in task.classes}
    known = load_dataset(name, split="train").features["label"].names
    assert len(judged) >= 2 and not judged & seen and judged | seen <= set(known)


def test_what_cannot_be_held_out_is_refused(setting: Setting) -> None:
    name = setting.sources[0].dataset_name
    for changes, message in (
        ({"held_out_classes": 1.0}, "held_out_classes is 1.0: expected a share"),
        ({"held_out_classes": 0.2, "group_column": "domain"}, "without groups: hold out domains"),
    ):
        with pytest.raises(ValueError, match=message):
            Source(name, **changes)
    with pytest.raises(ValueError, match=r"classes: holding out \d+ leaves too few"):
        load_table([Source(name, held_out_classes=0.99)], ["train"], None)
