"""Folders with truncated files and flipped bits load as before, load other valid numbers, or are refused by name."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from random_trajectories import check_rows, codec_of, filled
from reliability import Reliability
from tiny import tiny_backbone, tiny_pipeline

from mcdi_hf import AdapterCodec, MCDiPipeline, load_trajectories


TRUNCATIONS, FLIPS, MUTATIONS = 8, 25, 300
TASKS = range(5)
# What a fuzzer puts where something else was.
VALUES = [None, True, -1, 0, 1, 10**12, 0.5, -1e308, "", "../x", "é\x00", [], [[]], {}, {"a": 1}, [1, "a", None]]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MCDiPipeline]:
    folder = tmp_path_factory.mktemp("sound") / "pipe"
    tiny_pipeline()[0].save_pretrained(folder)
    return folder, MCDiPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def codec() -> AdapterCodec:
    return codec_of()


@pytest.fixture(scope="module")
def trajectories(codec: AdapterCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "trajectories"
    filled(folder, codec, range(3), range(3, 5)).finish()
    return folder


def damages(data: bytes, draw: random.Random) -> list[bytes]:
    """Copies of a file that end too early, and copies with one bit flipped, half of these near the ends."""
    cut = [
        data[:length] for length in (0, 1, len(data) - 1, *(draw.randrange(len(data)) for _ in range(TRUNCATIONS - 3)))
    ]
    flipped = []
    for index in range(FLIPS):
        at = draw.randrange(len(data)) if index % 2 else draw.choice((1, -1)) * draw.randrange(1, min(2000, len(data)))
        flipped.append(bytearray(data))
        flipped[-1][at] ^= 1 << draw.randrange(8)
    return [*cut, *map(bytes, flipped)]


def is_same(loaded: MCDiPipeline, pipe: MCDiPipeline) -> bool:
    configs = [
        {name: {key: one.config[key] for key in one.config if key[0] != "_"} for name, one in two.components.items()}
        for two in (loaded, pipe)
    ]
    weights = [
        {name: one.state_dict() for name, one in two.components.items() if name != "scheduler"}
        for two in (loaded, pipe)
    ]
    return configs[0] == configs[1] and all(
        weights[0][name][key].equal(value) for name, state in weights[1].items() for key, value in state.items()
    )


def is_finite(pipe: MCDiPipeline) -> bool:
    parts = [pipe.denoiser, pipe.task_encoder, pipe.codec]
    return all(value.isfinite().all() for part in parts for value in part.state_dict().values())


def test_damaged_pipelines(pipe: tuple[Path, MCDiPipeline], reliability: Reliability, tmp_path: Path) -> None:
    sound, expected = pipe
    folder = Path(shutil.copytree(sound, tmp_path / "pipe"))
    seen = {"refused": 0, "loaded": 0}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for index, damaged in enumerate(damages(data, random.Random(path.name))):
            path.write_bytes(damaged)
            loaded, said = reliability.attempt(
                "damaged pipeline folders",
                lambda: MCDiPipeline.from_pretrained(folder),
                # a config may be the one that is right: the file that does not fit it is named then
                path.name,
                str(path.parent),
                same=lambda loaded: is_same(loaded, expected),
            )
            seen["refused" if said else "loaded"] += 1
            assert said or index >= TRUNCATIONS or path.suffix == ".json" and damaged + b"\n" == data, path
            assert said or is_finite(loaded)
        path.write_bytes(data)
    assert min(seen.values()) > 20


def test_damaged_trajectories(
    trajectories: Path, codec: AdapterCodec, reliability: Reliability, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trajectories, tmp_path / "all"))

    def is_same(rows: list[dict]) -> bool:
        check_rows(rows, codec, TASKS)  # a weight that is another one is a failure: the pages have checksums
        return True

    for path in [*sorted((folder / "data").iterdir()), folder / "trajectories.json"]:
        data = path.read_bytes()
        for index, damaged in enumerate(damages(data, random.Random(path.name))):
            path.write_bytes(damaged)
            rows, said = reliability.attempt(
                "damaged trajectory folders",
                lambda: list(load_trajectories(str(folder))[0]),
                path.name,
                f"{folder / 'codec'} is of another layout",
                same=is_same,
            )
            assert said or index >= TRUNCATIONS or path.suffix == ".json" and damaged + b"\n" == data, path
        path.write_bytes(data)


def test_missing_and_foreign_shards(trajectories: Path, codec: AdapterCodec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trajectories, tmp_path / "all"))
    first, last = sorted((folder / "data").iterdir())
    data = first.read_bytes()
    other = filled(tmp_path / "other", codec_of(r=3), range(3))
    first.write_bytes(next(iter(other.shards.values())).read_bytes())
    with pytest.raises(ValueError, match=f"{first.name} is damaged: .*another layout"):
        load_trajectories(str(folder))
    first.write_bytes(data)
    last.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{last.name} holds the tasks \[0, 1, 2\]: expected \[3, 4\]"):
        load_trajectories(str(folder))
    first.unlink()
    with pytest.raises(ValueError, match=r"missing: \[0, 1, 2\]"):
        load_trajectories(str(folder))


def mutate(values: Any, draw: random.Random) -> Any:
    """JSON with one thing in it deleted, renamed, doubled or replaced."""
    places, queue = [], [values]
    while queue:
        one = queue.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        places += [(one, key) for key in keys]
        queue += [one[key] for key in keys if isinstance(one[key], dict | list)]
    holder, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "_x", "../x", f"{key}s"])] = holder.pop(key)
    elif kind == 2 and type(holder[key]) in (int, float):
        holder[key] = holder[key] * draw.choice([-1, 2, 1000, 10**12])
    else:
        holder[key] = draw.choice(VALUES)
    return values


def usable(pipe: MCDiPipeline) -> None:
    """Generate an adapter for the backbone that it was made for, whatever name its config gives now."""
    pipe.set_progress_bar_config(disable=True)
    pipe.backbone = tiny_backbone()
    (adapter,) = pipe({"one": ["a b", "c"], "other": ["d", "e f"]}, num_inference_steps=1).adapters
    assert {key: tuple(value.shape) for key, value in adapter.tensors.items()} == pipe.codec.layout.shapes(2)


def test_fuzzed_configs(pipe: tuple[Path, MCDiPipeline], reliability: Reliability, tmp_path: Path) -> None:
    sound, expected = pipe
    folder, draw = Path(shutil.copytree(sound, tmp_path / "pipe")), random.Random(0)
    paths = sorted(folder.rglob("*.json"))
    for index in range(MUTATIONS):
        path = paths[index % len(paths)]
        text = path.read_text()
        path.write_text(json.dumps(mutate(json.loads(text), draw)))
        part = "fuzzed configs of pipelines"
        loaded, said = reliability.attempt(
            part, lambda: MCDiPipeline.from_pretrained(folder), str(folder), same=lambda one: is_same(one, expected)
        )
        if not said:  # what was let through must work, or say why not
            errors = "hold NaN or inf", "strength is", "backbone", "LoraConfig"
            reliability.attempt("adapters after fuzzed configs", lambda: usable(loaded), *errors)
        path.write_text(text)


def test_fuzzed_descriptions_of_trajectories(
    trajectories: Path, reliability: Reliability, tmp_path: Path, codec: AdapterCodec
) -> None:
    folder, draw = Path(shutil.copytree(trajectories, tmp_path / "all")), random.Random(1)
    path = folder / "trajectories.json"
    text = path.read_text()
    for _ in range(MUTATIONS):
        path.write_text(json.dumps(mutate(json.loads(text), draw)))
        reliability.attempt(
            "fuzzed descriptions of trajectories",
            lambda: load_trajectories(str(folder), streaming=True)[1],
            str(folder),
            same=lambda record: record == json.loads(text),
        )
