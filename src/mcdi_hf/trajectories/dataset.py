"""The trajectory data set, read: from a folder or the Hub, and back to the tensors of adapters."""

import math
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError

from ..adapters.layout import AdapterLayout
from ..data.cached import load_cached_dataset
from .description import differences, read_record
from .folder import RECORD, TrajectoryFolder, trajectory_features


def load_trajectories(
    name_or_path: str, layout: AdapterLayout | None = None, streaming: bool = False
) -> tuple[Dataset | IterableDataset, dict]:
    """Load a trajectory data set from a folder or from the Hub.

    Returned are the data set in numpy format, by task number, and what its `trajectories.json` holds. With `layout`
    trajectories of other adapters are refused; with `streaming` rows are read one by one, without a copy in the
    cache. A `ValueError` says that there is no trajectory data set, that tasks are missing in a folder, that a file
    is damaged, or that the layout is another one, with every difference; an `OSError` that the cache of `datasets`
    cannot be written.
    """
    source = name_or_path
    if Path(name_or_path).is_dir():
        folder = TrajectoryFolder(Path(name_or_path))
        folder.check_whole()
        # `load_dataset` would take a relative "json" for its reader of JSON files.
        source, record, own_layout = str(folder.folder.resolve()), folder.record, folder.layout
    else:
        try:
            record, own_layout = read_record(Path(hf_hub_download(name_or_path, RECORD, repo_type="dataset")))
        except RemoteEntryNotFoundError as error:
            raise ValueError(f"{name_or_path} on the Hub is no trajectory data set: it has no {RECORD}.") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ValueError(
                f"{name_or_path} is neither a folder nor a data set that you can see on the Hub."
            ) from error
    if layout is not None:
        different = differences({"layout": record["layout"]}, {"layout": layout.to_dict()})
        if different:
            raise ValueError(f"The trajectories of {name_or_path} are of other adapters: {'; '.join(different)}.")
    try:
        loaded = load_cached_dataset(source, split="train", streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"A shard of {name_or_path} is damaged: {error.__cause__}. Get it again.") from error
    if loaded.features != trajectory_features(own_layout, record["max_ways"]):
        raise ValueError(f"The columns of {name_or_path} are not those that its {RECORD} tells of: {loaded.features}.")
    return loaded.with_format("numpy"), record


def split_weights(weights: torch.Tensor, ways: int, layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Read the tensors, key -> `(adapters, *shape)`, out of flat weights `(adapters, P)` of adapters for `ways`
    classes."""
    tensors, start = {}, 0
    for key, shape in layout.shapes(ways).items():
        end = start + math.prod(shape)
        tensors[key] = weights[:, start:end].unflatten(1, shape)
        start = end
    return tensors


def final_adapters(trajectories: Dataset, layout: AdapterLayout) -> list[dict[str, torch.Tensor]]:
    """The end of every trajectory of a data set in numpy format: key -> `(1, *shape)`, see [`split_weights`]."""
    return [
        split_weights(torch.from_numpy(np.asarray(row["weights"][-1:])), len(row["classes"]), layout)
        for row in trajectories
    ]
