"""A folder of trajectories holds whole shards or none, and goes on with what was made in the same way only."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from random_trajectories import DESCRIPTION, check_rows, codec_of, encoder_of, files, filled, random_rows
from versions import CARDS_ASK_ENDPOINT

from mcdi_hf import AdapterCodec
from mcdi_hf.trajectories.dataset import load_trajectories
from mcdi_hf.trajectories.description import package_versions
from mcdi_hf.trajectories.folder import TrajectoryFolder


@pytest.fixture(scope="module")
def codec() -> AdapterCodec:
    return codec_of()


def test_an_interrupted_collection_gives_the_same_bytes(codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "straight" / "all", codec, range(2), range(2, 4)).finish()
    again = tmp_path / "again" / "all"
    filled(again, codec, range(2))
    # What a kill between the first byte and the move leaves behind.
    (again / "data" / ".train-000002-000003.parquet.part").write_bytes(b"PAR1 and no end")
    continued = TrajectoryFolder.create(again, codec, encoder_of(codec), DESCRIPTION)
    assert continued.numbers == {0, 1}
    assert len(load_trajectories(str(again))[0]) == 2
    continued.append(random_rows(codec, range(2, 4)))
    continued.finish()
    assert continued.numbers == {0, 1, 2, 3}
    assert files(again) == files(tmp_path / "straight" / "all")
    assert len(load_trajectories(str(again))[0]) == 4  # not the cached two


def test_the_card_tells_how_the_trajectories_were_made(codec: AdapterCodec, tmp_path: Path) -> None:
    trajectories = filled(tmp_path / "letters", codec, range(4))
    assert "has not been finished" in (tmp_path / "letters" / "README.md").read_text()
    trajectories.finish()
    summary = trajectories.summary()
    rows = random_rows(codec, range(4))
    assert summary["tasks"] == 4 and summary["groups"] == {"north": 2, "south": 2}
    assert summary["accuracy"] == (0.375, 0.125) and summary["train_accuracy"] == (0.75, 0.0)
    assert summary["losses"].keys() == {4, 8, 12}
    assert summary["losses"][4] == pytest.approx(np.mean([row["losses"][0] for row in rows]))
    assert summary["losses"][12] == pytest.approx(np.mean([row["losses"][2] for row in rows if len(row["steps"]) > 3]))
    card = DatasetCard.load(tmp_path / "letters" / "README.md")
    if CARDS_ASK_ENDPOINT:
        card.validate()
    assert card.data.size_categories == ["n<1K"] and "lora" in card.data.tags
    for line in (
        "| held-out accuracy, mean (sd) over the tasks | 0.375 (0.125) |",
        "| tasks of each group | `north` 2, `south` 2 |",
        "| `base_model.fingerprint` | `0123` |",
        "| `settings.learning_rate` | `0.001` |",
        '| `sources.0.groups` | `["north", "a\\|b"]` |',
        'load_trajectories("letters")',
        "`(steps, 8)`: the coefficients z, module by module",
        "| the same of the shared adapter | 0.125 (0.000) |",
    ):
        assert line in card.text
    assert "lora_config.bias" not in card.text and "has not been finished" not in card.text


def test_a_folder_of_other_settings_is_not_continued(codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "all", codec, range(2))
    before = files(tmp_path)
    changed = {"settings": {"learning_rate": 0.01, "seeds": (0, 1)}, "extra": 1}
    with pytest.raises(ValueError) as raised:
        filled(tmp_path / "all", codec_of(r=3), **changed)
    message = str(raised.value)
    assert "settings.learning_rate is 0.001 there, 0.01 here" in message and "extra is missing there" in message
    assert "layer.1.attention.self.query.rank is 2 there, 3 here" in message and "another folder" in message
    assert "seeds" not in message and files(tmp_path) == before


def test_a_folder_of_other_things_is_left_alone(codec: AdapterCodec, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no trajectories.json"):
        TrajectoryFolder.create(tmp_path, codec, encoder_of(codec), {})
    assert files(tmp_path) == {"README.md": b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 1}, r"successive numbers; got \[1, 3\]"),
        ({"task": 4}, r"successive numbers; got \[4, 3\]"),
        ({"weights": np.full((3, 900), np.nan, dtype=np.float32)}, "weights of shape"),
        ({"losses": [0.5]}, "1 losses"),
        ({"steps": [0, 1]}, "2 steps"),
    ],
)
def test_rows_that_do_not_fit_are_refused(codec: AdapterCodec, tmp_path: Path, change: dict, message: str) -> None:
    trajectories = filled(tmp_path / "all", codec, range(2))
    before = files(tmp_path)
    first, second = random_rows(codec, range(2, 4))
    with pytest.raises(ValueError, match=message):
        trajectories.append([first | change, second])
    assert files(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_diverged_are_refused(codec: AdapterCodec, tmp_path: Path, value: float) -> None:
    trajectories = filled(tmp_path / "all", codec)
    rows = random_rows(codec, range(2))
    rows[1]["weights"][-1, 5] = value
    with pytest.raises(ValueError, match="weights of task 1 are not finite"):
        trajectories.append(rows)
    assert trajectories.numbers == set()


def test_tasks_that_are_there_are_refused(codec: AdapterCodec, tmp_path: Path) -> None:
    trajectories = filled(tmp_path / "all", codec, range(3))
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"holds the tasks \[2\] already"):
        trajectories.append(random_rows(codec, range(2, 5)))
    assert files(tmp_path) == before


# A file that grows beyond the limit is the same error as a full disk.
APPEND_WITH_LIMIT = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from random_trajectories import codec_of, random_rows
from mcdi_hf.trajectories.folder import TrajectoryFolder

rows = random_rows(codec_of(), range(2, 4))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
TrajectoryFolder(Path(sys.argv[1])).append(rows)
"""


def test_a_full_disk_leaves_whole_shards_only(codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "all", codec, range(2))
    before = files(tmp_path)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", APPEND_WITH_LIMIT, str(tmp_path / "all"), str(tests), str(tests.parent)]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    message = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1 and "train-000002-000003.parquet: File too large" in message
    assert "written before is whole" in message and "run the same command again" in message
    assert files(tmp_path) == before
    filled(tmp_path / "all", codec, range(2, 4))
    check_rows(list(load_trajectories(str(tmp_path / "all"))[0]), codec, range(4))


def test_a_folder_below_a_file_is_a_clear_error(codec: AdapterCodec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Could not write .*codec: Not a directory"):
        TrajectoryFolder.create(tmp_path / "file" / "all", codec, encoder_of(codec), DESCRIPTION)


def test_package_versions_are_those_installed() -> None:
    versions = package_versions()
    assert torch.__version__.startswith(versions["torch"]) and versions["numpy"] == np.__version__
    assert versions.keys() == {"mcdi_hf", "torch", "transformers", "peft", "datasets", "numpy"}
