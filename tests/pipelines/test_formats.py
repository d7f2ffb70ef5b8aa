"""Folders that an earlier version saved still load, and those of a later one are refused by name.

`fixtures/format_1` was saved at commit 35b1aa2, before files told their format: a pipeline with its backbone, what it then
generated, and trajectories.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from kinds import TEXTS
from random_trajectories import check_rows, codec_of, filled
from safetensors.torch import load_file

from mcdi_hf import MCDiPipeline
from mcdi_hf.trajectories.dataset import load_trajectories
from mcdi_hf.trajectories.description import FORMAT_VERSION
from mcdi_hf.trajectories.folder import RECORD, TrajectoryFolder


SAVED = Path(__file__).parents[1] / "fixtures" / "format_1"


def test_a_pipeline_of_the_first_format_generates_what_it_did(tmp_path: Path) -> None:
    pipe = MCDiPipeline.from_pretrained(SAVED / "pipeline")
    settings = {"num_candidates": 2, "num_inference_steps": 3, "generator": torch.manual_seed(0)}
    found = pipe(TEXTS, **settings).adapters[0].tensors
    expected = load_file(SAVED / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_format_version"] == 1
    MCDiPipeline.from_pretrained(tmp_path / "again")


def test_trajectories_of_the_first_format_are_read_and_continued(tmp_path: Path) -> None:
    folder = shutil.copytree(SAVED / "trajectories", tmp_path / "trajectories")
    codec = codec_of()
    check_rows(list(load_trajectories(str(folder))[0]), codec, range(2))
    assert TrajectoryFolder(folder).record["format_version"] == FORMAT_VERSION == 1
    assert json.loads((filled(tmp_path / "new", codec, range(2)).folder / RECORD).read_text())["format_version"] == 1


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_format_that_is_not_known_is_refused_by_name(version: object, tmp_path: Path) -> None:
    for name, file, key in (
        ("pipeline", "model_index.json", "_format_version"),
        ("trajectories", RECORD, "format_version"),
    ):
        path = shutil.copytree(SAVED / name, tmp_path / name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: version}))
    with pytest.raises(ValueError, match=rf"model_index.json is of format {version!r}.*reads up to 1. Upgrade"):
        MCDiPipeline.from_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=rf"{RECORD} is of format {version!r}.*reads up to 1. Upgrade"):
        TrajectoryFolder(tmp_path / "trajectories")
