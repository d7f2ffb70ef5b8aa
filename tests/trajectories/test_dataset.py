"""Trajectories come back to the bit, from a folder and from the Hub; others are refused, and it is said why."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from fake_hub import FakeHub
from huggingface_hub import HfApi
from random_trajectories import DESCRIPTION, MAX_WAYS, check_rows, files, filled, layout_of, random_rows

from mcdi_hf import AdapterLayout
from mcdi_hf.trajectories.dataset import final_adapters, load_trajectories


REPO = "tester/trajectories"


@pytest.fixture(scope="module")
def layout() -> AdapterLayout:
    return layout_of()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_back_to_the_bit_and_in_order(layout: AdapterLayout, tmp_path: Path, streaming: bool) -> None:
    filled(tmp_path / "lr=0.1" / "all", layout, range(3, 5), range(3))
    loaded, record = load_trajectories(str(tmp_path / "lr=0.1" / "all"), layout, streaming=streaming)
    assert record == {**DESCRIPTION, "layout": layout.to_dict(), "max_ways": MAX_WAYS}
    rows = list(loaded)
    check_rows(rows, layout, range(5))
    assert rows[1]["weights"].dtype == np.float32 and rows[1]["weights"].shape == (4, layout.numel + MAX_WAYS * 17)


@pytest.mark.parametrize("streaming", [False, True])
def test_trajectories_from_the_hub(hub: FakeHub, layout: AdapterLayout, tmp_path: Path, streaming: bool) -> None:
    trajectories = filled(tmp_path / "all", layout, range(2), range(2, 5))
    trajectories.finish()
    pushed = files(tmp_path / "all")
    (tmp_path / "all" / "data" / ".train-000005-000006.parquet.part").write_bytes(b"PAR1 and no end")
    info = trajectories.push_to_hub(REPO, private=True, commit_message="Hand over")
    assert info.commit_message == "Hand over" and HfApi().repo_info(REPO, repo_type="dataset").private
    assert hub.files(REPO, kind="dataset") == {".gitattributes": b"", **pushed}
    loaded, record = load_trajectories(REPO, layout, streaming=streaming)
    assert record["base_model"] == DESCRIPTION["base_model"]
    check_rows(list(loaded), layout, range(5))
    check_rows(list(load_dataset(REPO, split="train", streaming=streaming)), layout, range(5))
    with pytest.raises(ValueError, match="self.query.rank is 2 there, 3 here"):
        load_trajectories(REPO, layout_of(r=3), streaming=streaming)


def test_a_pushed_data_set_replaces_the_shards_before_it(hub: FakeHub, layout: AdapterLayout, tmp_path: Path) -> None:
    filled(tmp_path / "small", layout, range(2), range(2, 4)).push_to_hub(REPO)
    trajectories = filled(tmp_path / "large", layout, range(3), range(3, 6))
    info = trajectories.push_to_hub(REPO, create_pr=True)
    check_rows(list(load_trajectories(REPO)[0]), layout, range(4))
    check_rows(list(load_dataset(REPO, split="train", revision=info.pr_revision)), layout, range(6))
    trajectories.push_to_hub(REPO, revision="main")
    check_rows(list(load_trajectories(REPO)[0]), layout, range(6))


def test_what_is_no_trajectory_data_set_on_the_hub(hub: FakeHub) -> None:
    HfApi().create_repo(REPO, repo_type="dataset")
    with pytest.raises(ValueError, match="on the Hub is no trajectory data set: it has no trajectories.json"):
        load_trajectories(REPO)
    for name in ("tester/nothing", "runs/no/such/folder"):
        with pytest.raises(ValueError, match=f"{name} is neither a folder nor a data set"):
            load_trajectories(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_anybody_can_load_the_folder(layout: AdapterLayout, tmp_path: Path, streaming: bool) -> None:
    trajectories = filled(tmp_path / "all", layout, range(2), range(2, 4))
    trajectories.finish()
    loaded = load_dataset(str(tmp_path / "all"), split="train", streaming=streaming)
    assert loaded.features == trajectories.features
    check_rows(list(loaded), layout, range(4))


def test_trajectories_without_a_head(tmp_path: Path) -> None:
    layout = layout_of(task_type=None)
    assert layout.head_keys == ()
    trajectories = filled(tmp_path / "all", layout, range(3))
    loaded, _ = load_trajectories(str(tmp_path / "all"), layout)
    check_rows(list(loaded), layout, range(3))
    assert loaded[0]["weights"].shape == (3, layout.numel)
    trajectories.finish()
    assert "head" not in (tmp_path / "all" / "README.md").read_text()


def test_folders_of_one_name_are_not_taken_for_each_other(layout: AdapterLayout, tmp_path: Path) -> None:
    for place in ("one", "two"):
        trajectories = filled(tmp_path / place / "all", layout)
        trajectories.append([row | {"group": place} for row in random_rows(layout, range(2))])
        trajectories.finish()
        os.utime(next(iter(trajectories.shards.values())), (0, 0))
        for loaded in (
            load_trajectories(str(tmp_path / place / "all"))[0],
            load_dataset(str(tmp_path / place / "all"))["train"],
        ):
            assert list(loaded["group"][:]) == [place, place]


def test_final_adapters_are_the_last_rows(layout: AdapterLayout, tmp_path: Path) -> None:
    filled(tmp_path / "all", layout, range(2))
    loaded, _ = load_trajectories(str(tmp_path / "all"))
    for row, tensors in zip(random_rows(layout, range(2)), final_adapters(loaded, layout), strict=True):
        flat = torch.cat([value.flatten(1) for value in tensors.values()], dim=1)
        assert flat.equal(torch.from_numpy(row["weights"][-1:]))
        assert tensors[layout.head_keys[0]].shape == (1, len(row["classes"]), 16)


def test_unfinished_collections_are_refused(layout: AdapterLayout, tmp_path: Path) -> None:
    trajectories = filled(tmp_path / "all", layout)
    for read in (trajectories.finish, lambda: load_trajectories(str(tmp_path / "all"))):
        with pytest.raises(ValueError, match="holds no trajectories yet"):
            read()
    trajectories.append(random_rows(layout, range(2, 4)))
    trajectories.append(random_rows(layout, range(5, 6)))
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


def test_a_stray_parquet_file_is_refused(layout: AdapterLayout, tmp_path: Path) -> None:
    filled(tmp_path / "all", layout, range(2))
    Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "all" / "data" / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet is no shard"):
        load_trajectories(str(tmp_path / "all"))


def test_trajectories_of_other_adapters_are_refused(layout: AdapterLayout, tmp_path: Path) -> None:
    filled(tmp_path / "all", layout, range(2))
    other = layout_of(r=3, target_modules=["query", "key"], task_type=None).to_dict() | {"token_dim": 20}
    with pytest.raises(ValueError) as raised:
        load_trajectories(str(tmp_path / "all"), AdapterLayout.from_dict(other))
    for difference in (
        "self.query.rank is 2 there, 3 here",
        "layer.1.attention.self.value is missing here",
        "layer.2.attention.self.key is missing there",
        "layout.head_name is 'classifier' there, None here",
        "layout.token_dim is 768 there, 20 here",
    ):
        assert difference in str(raised.value)
    turned = layout.to_dict() | {"modules": layout.to_dict()["modules"][::-1]}
    with pytest.raises(ValueError, match="in another order"):
        load_trajectories(str(tmp_path / "all"), AdapterLayout.from_dict(turned))
