"""Trajectories of random coefficients, in folders, and what they must come back as."""

from pathlib import Path

import numpy as np
import torch
from tiny import random_codec, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterCodec, TaskEncoder
from mcdi_hf.trajectories.folder import TrajectoryFolder


DESCRIPTION = {
    "lora_config": {"r": 2, "lora_alpha": 4, "bias": None},
    "base_model": {"name_or_path": "tiny", "revision": "main", "fingerprint": "0123"},
    "settings": {"learning_rate": 0.001, "seeds": [0, 1]},
    "sources": [{"name": "letters", "groups": ["north", "a|b"]}],
}


def codec_of(**overrides: object) -> AdapterCodec:
    return random_codec(tiny_backbone(), tiny_lora_config(**overrides))


def encoder_of(codec: AdapterCodec) -> TaskEncoder:
    """A task encoder that proposes something."""
    torch.manual_seed(0)
    encoder = TaskEncoder(codec.layout.feature_dim + 16, *codec.filled.shape, dim=8, num_directions=6)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


def random_rows(codec: AdapterCodec, numbers: range) -> list[dict]:
    """Rows that depend on their numbers only, with two to four classes and two or three local targets."""
    rows = []
    for number in numbers:
        random = np.random.default_rng(number)
        ways, steps = 2 + number % 3, [0, 4, 8, 12][: 3 + number % 2]
        rows.append(
            {
                "task": number,
                "group": ["north", "south"][number % 2],
                "classes": [f"class_{index}" for index in range(ways)],
                "support": [random.integers(0, 99, size=2 + index).tolist() for index in range(ways)],
                "steps": steps,
                "losses": random.random(len(steps) - 1, dtype=np.float32).tolist(),
                "train_accuracy": 0.75,
                "start_accuracy": 0.125,
                "accuracy": 0.25 if number % 2 else 0.5,
                "weights": random.standard_normal((len(steps), codec.filled.numel()), dtype=np.float32),
            }
        )
    return rows


def filled(folder: Path, codec: AdapterCodec, *shards: range, **changes: object) -> TrajectoryFolder:
    trajectories = TrajectoryFolder.create(folder, codec, encoder_of(codec), {**DESCRIPTION, **changes})
    for numbers in shards:
        trajectories.append(random_rows(codec, numbers))
    return trajectories


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_rows(found: list[dict], codec: AdapterCodec, numbers: range) -> None:
    """The rows are those of `random_rows`, to the bit."""
    assert [int(row["task"]) for row in found] == list(numbers)
    for row, expected in zip(found, random_rows(codec, numbers), strict=True):
        assert np.asarray(row["weights"], dtype=np.float32).tobytes() == expected["weights"].tobytes()
        for name in ("group", "train_accuracy", "start_accuracy", "accuracy"):
            assert row[name] == expected[name]
        for name in ("classes", "steps"):
            assert list(row[name]) == expected[name]
        assert np.asarray(row["losses"], dtype=np.float32).tolist() == expected["losses"]
        assert [list(members) for members in row["support"]] == expected["support"]
