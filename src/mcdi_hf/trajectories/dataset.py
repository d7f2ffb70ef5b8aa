"""The trajectory data set: one row a task, in plain `datasets` form."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, List, Value, load_dataset, load_from_disk

from ..adapters.layout import AdapterLayout


def trajectory_features(layout: AdapterLayout, max_ways: int) -> Features:
    """The columns of a trajectory data set.

    `weights` holds the local targets, `(k, P)`: each the LoRA matrices and then the head's weight and bias, flat in
    the layout's order, filled up with zeros behind the last class to the width of `max_ways` classes. `support` lists,
    for each of `classes`, the rows of the source data set that the optimiser saw.
    """
    width = layout.numel + max_ways * (layout.feature_dim + 1)
    return Features(
        {
            "task": Value("int64"),
            "classes": List(Value("string")),
            "support": List(List(Value("int64"))),
            "steps": List(Value("int64")),
            "losses": List(Value("float32")),
            "accuracy": Value("float32"),
            "weights": Array2D((None, width), "float32"),
        }
    )


def build_dataset(rows: list[dict], layout: AdapterLayout, max_ways: int, description: dict) -> Dataset:
    """Make a data set of rows from [`collect_trajectories`] that knows how it was made.

    Args:
        rows (`list[dict]`): The rows.
        layout (`AdapterLayout`): The adapters' layout.
        max_ways (`int`): The greatest number of classes of any task of the whole data set.
        description (`dict`): Whatever tells a reader how it was made; JSON, kept in the info beside the layout.
    """
    features = trajectory_features(layout, max_ways)
    width = layout.numel + max_ways * (layout.feature_dim + 1)

    def padded() -> Iterator[dict]:
        for row in rows:
            weights = np.pad(row["weights"], ((0, 0), (0, width - row["weights"].shape[1])))
            yield {**row, "weights": weights}

    dataset = Dataset.from_generator(padded, features=features, writer_batch_size=20)
    dataset.info.description = json.dumps({**description, "layout": layout.to_dict()})
    return dataset


def load_trajectories(name_or_path: str, layout: AdapterLayout | None = None) -> tuple[Dataset, dict]:
    """Load a trajectory data set from a folder written by `save_to_disk`, or from the Hub.

    Args:
        name_or_path (`str`): The folder or the Hub id.
        layout (`AdapterLayout`, *optional*): Refuse a data set of other adapters.

    Returns:
        The data set in numpy format, and its description.
    """
    dataset = (
        load_from_disk(name_or_path) if Path(name_or_path).is_dir() else load_dataset(name_or_path, split="train")
    )
    description = json.loads(dataset.info.description)
    if layout is not None and description["layout"] != layout.to_dict():
        different = [key for key, value in layout.to_dict().items() if description["layout"][key] != value]
        raise ValueError(f"The trajectories in {name_or_path} are of another layout; these differ: {different}.")
    return dataset.with_format("numpy"), description


def split_weights(weights: torch.Tensor, ways: int, layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Read the tensors out of flat weights.

    Args:
        weights (`torch.Tensor` of shape `(adapters, P)`): One row of the column `weights`.
        ways (`int`): The number of classes.
        layout (`AdapterLayout`): The adapters' layout.

    Returns:
        Key -> tensor of shape `(adapters, *shape)`, with the head.
    """
    shapes = layout.lora_shapes | dict(zip(layout.head_keys, [(ways, layout.feature_dim), (ways,)]))
    tensors, start = {}, 0
    for key, shape in shapes.items():
        end = start + torch.Size(shape).numel()
        tensors[key] = weights[:, start:end].unflatten(1, shape)
        start = end
    return tensors


def final_adapters(trajectories: Dataset, layout: AdapterLayout) -> list[dict[str, torch.Tensor]]:
    """The end of every trajectory of a data set in numpy format: key -> `(1, *shape)`, see [`split_weights`]."""
    return [
        split_weights(torch.from_numpy(np.asarray(row["weights"][-1:])), len(row["classes"]), layout)
        for row in trajectories
    ]
