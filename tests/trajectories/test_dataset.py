"""Trajectories come back to the bit, from a folder and from the Hub; others are refused, and it is said why."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from fake_hub import FakeHub
from huggingface_hub import HfApi
from random_trajectories import DESCRIPTION, check_rows, codec_of, encoder_of, files, filled, random_rows

from mcdi_hf import AdapterCodec
from mcdi_hf.trajectories.dataset import load_task_encoder, load_trajectories, local_targets


REPO = "tester/trajectories"


@pytest.fixture(scope="module")
def codec() -> AdapterCodec:
    return codec_of()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_back_to_the_bit_and_in_order(codec: AdapterCodec, tmp_path: Path, streaming: bool) -> None:
    filled(tmp_path / "lr=0.1" / "all", codec, range(3, 5), range(3))
    loaded, record, read = load_trajectories(str(tmp_path / "lr=0.1" / "all"), streaming=streaming)
    assert record == {**DESCRIPTION, "layout": codec.layout.to_dict(), "format_version": 1}
    assert all(value.equal(codec.state_dict()[name]) for name, value in read.state_dict().items())
    rows = list(loaded)
    check_rows(rows, codec, range(5))
    assert rows[1]["weights"].dtype == np.float32 and rows[1]["weights"].shape == (4, codec.filled.numel())


@pytest.mark.parametrize("streaming", [False, True])
def test_trajectories_from_the_hub(hub: FakeHub, codec: AdapterCodec, tmp_path: Path, streaming: bool) -> None:
    trajectories = filled(tmp_path / "all", codec, range(2), range(2, 5))
    trajectories.finish()
    pushed = files(tmp_path / "all")
    (tmp_path / "all" / "data" / ".train-000005-000006.parquet.part").write_bytes(b"PAR1 and no end")
    info = trajectories.push_to_hub(REPO, private=True, commit_message="Hand over")
    assert info.commit_message == "Hand over" and HfApi().repo_info(REPO, repo_type="dataset").private
    assert hub.files(REPO, kind="dataset") == {".gitattributes": b"", **pushed}
    loaded, record, read = load_trajectories(REPO, streaming=streaming)
    assert record["base_model"] == DESCRIPTION["base_model"] and read.head == codec.head
    for place in (REPO, str(tmp_path / "all")):
        encoder, expected = load_task_encoder(place), encoder_of(codec)
        assert all(value.equal(expected.state_dict()[name]) for name, value in encoder.state_dict().items())
        assert "_name_or_path" not in encoder.config
    check_rows(list(loaded), codec, range(5))
    check_rows(list(load_dataset(REPO, split="train", streaming=streaming)), codec, range(5))


def test_a_missing_task_encoder_is_named(codec: AdapterCodec, tmp_path: Path) -> None:
    folder = filled(tmp_path / "all", codec, range(2)).folder
    (folder / "task_encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="task_encoder is no task encoder: .*Get it again"):
        load_task_encoder(str(folder))


def test_a_pushed_data_set_replaces_the_shards_before_it(hub: FakeHub, codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "small", codec, range(2), range(2, 4)).push_to_hub(REPO)
    trajectories = filled(tmp_path / "large", codec, range(3), range(3, 6))
    info = trajectories.push_to_hub(REPO, create_pr=True)
    check_rows(list(load_trajectories(REPO)[0]), codec, range(4))
    check_rows(list(load_dataset(REPO, split="train", revision=info.pr_revision)), codec, range(6))
    trajectories.push_to_hub(REPO, revision="main")
    check_rows(list(load_trajectories(REPO)[0]), codec, range(6))


def test_what_is_no_trajectory_data_set_on_the_hub(hub: FakeHub) -> None:
    HfApi().create_repo(REPO, repo_type="dataset")
    with pytest.raises(ValueError, match="on the Hub is no trajectory data set: it has no trajectories.json"):
        load_trajectories(REPO)
    for name in ("tester/nothing", "runs/no/such/folder"):
        with pytest.raises(ValueError, match=f"{name} is neither a folder nor a data set"):
            load_trajectories(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_anybody_can_load_the_folder(codec: AdapterCodec, tmp_path: Path, streaming: bool) -> None:
    trajectories = filled(tmp_path / "all", codec, range(2), range(2, 4))
    trajectories.finish()
    loaded = load_dataset(str(tmp_path / "all"), split="train", streaming=streaming)
    assert loaded.features == trajectories.features
    check_rows(list(loaded), codec, range(4))


def test_trajectories_without_a_head(tmp_path: Path) -> None:
    codec = codec_of(task_type=None)
    assert codec.layout.head_keys == ()
    filled(tmp_path / "all", codec, range(3)).finish()
    loaded, _, read = load_trajectories(str(tmp_path / "all"))
    check_rows(list(loaded), codec, range(3))
    assert read.layout.head_keys == ()


def test_a_codec_that_is_missing_or_of_another_layout_is_refused(codec: AdapterCodec, tmp_path: Path) -> None:
    folder = filled(tmp_path / "all", codec, range(2)).folder
    codec_of(r=3).save_pretrained(folder / "codec")
    with pytest.raises(ValueError, match="codec is of another layout than the trajectories beside it"):
        load_trajectories(str(folder))
    shutil.rmtree(folder / "codec")
    with pytest.raises(ValueError, match="codec is no codec"):
        load_trajectories(str(folder))


def test_folders_of_one_name_are_not_taken_for_each_other(codec: AdapterCodec, tmp_path: Path) -> None:
    for place in ("one", "two"):
        trajectories = filled(tmp_path / place / "all", codec)
        trajectories.append([row | {"group": place} for row in random_rows(codec, range(2))])
        trajectories.finish()
        os.utime(next(iter(trajectories.shards.values())), (0, 0))
        for loaded in (
            load_trajectories(str(tmp_path / place / "all"))[0],
            load_dataset(str(tmp_path / place / "all"))["train"],
        ):
            assert list(loaded["group"][:]) == [place, place]


def test_local_targets_are_the_coefficients_behind_the_start(codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "all", codec).append(
        [
            row | {"steps": [0, 4], "losses": [0.5], "weights": row["weights"][:2]}
            for row in random_rows(codec, range(3))
        ]
    )
    loaded, _, read = load_trajectories(str(tmp_path / "all"))
    targets = local_targets(loaded, read)
    assert targets.shape == (3, 1, *codec.filled.shape)
    for found, row in zip(targets, random_rows(codec, range(3))):
        assert found.flatten().equal(torch.from_numpy(row["weights"][1]))


def test_unfinished_collections_are_refused(codec: AdapterCodec, tmp_path: Path) -> None:
    trajectories = filled(tmp_path / "all", codec)
    for read in (trajectories.finish, lambda: load_trajectories(str(tmp_path / "all"))):
        with pytest.raises(ValueError, match="holds no trajectories yet"):
            read()
    trajectories.append(random_rows(codec, range(2, 4)))
    trajectories.append(random_rows(codec, range(5, 6)))
    for read in (
        trajectories.finish,
        lambda: load_trajectories(str(tmp_path / "all")),
        lambda: trajectories.push_to_hub("tester/never"),
    ):
        with pytest.raises(ValueError, match=r"up to 5 are missing: \[0, 1, 4\]\. Run the same collection again"):
            read()
    (tmp_path / "all" / "trajectories.json").unlink()
    with pytest.raises(ValueError, match="all is no trajectory data set: it has no trajectories.json"):
        load_trajectories(str(tmp_path / "all"))


def test_a_stray_parquet_file_is_refused(codec: AdapterCodec, tmp_path: Path) -> None:
    filled(tmp_path / "all", codec, range(2))
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "all" / "data" / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet is no shard"):
        load_trajectories(str(tmp_path / "all"))
