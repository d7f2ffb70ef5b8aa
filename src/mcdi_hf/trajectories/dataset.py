"""The trajectory data set, read: from a folder or the Hub, and its targets."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..adapters.codec import AdapterCodec
from ..data.cached import load_cached_dataset
from ..models.task_encoder import TaskEncoder
from .description import read_codec, read_encoder, read_record
from .folder import CODEC, RECORD, TASK_ENCODER, TrajectoryFolder, trajectory_features


def load_trajectories(
    name_or_path: str, streaming: bool = False
) -> tuple[Dataset | IterableDataset, dict, AdapterCodec]:
    """Load a trajectory data set from a folder or from the Hub.

    Returned are the data set in numpy format, by task number, what its `trajectories.json` holds, and the codec in
    whose basis the weights are written. With `streaming` rows are read one by one, without a copy in the cache. A
    `ValueError` says that there is no trajectory data set, that tasks are missing in a folder, or that a file is
    damaged; an `OSError` that the cache of `datasets` cannot be written.

    Example: `trajectories, made, codec = load_trajectories("runs/mine/trajectories")`
    """
    source, commit = name_or_path, None
    if Path(name_or_path).is_dir():
        folder = TrajectoryFolder(Path(name_or_path))
        folder.check_whole()
        # `load_dataset` would take a relative "json" for its reader of JSON files.
        source, record, own_layout = str(folder.folder.resolve()), folder.record, folder.layout
        codec = folder.codec
    else:
        try:
            place = Path(hf_hub_download(name_or_path, RECORD, repo_type="dataset"))
            commit = place.parent.name  # one of all that is read, whatever is pushed meanwhile
            record, own_layout = read_record(place)
            codec = read_codec(_part_on_hub(name_or_path, CODEC, commit), own_layout)
        except LocalEntryNotFoundError:  # the Hub did not answer: a kind of EntryNotFoundError, too
            raise
        except EntryNotFoundError as error:
            raise ValueError(f"{name_or_path} on the Hub is no trajectory data set: it has no {RECORD}.") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ValueError(
                f"{name_or_path} is neither a folder nor a data set that you can see on the Hub."
            ) from error
    try:
        loaded = load_cached_dataset(source, split="train", streaming=streaming, revision=commit)
    except DatasetGenerationError as error:
        raise ValueError(f"A shard of {name_or_path} is damaged: {error.__cause__}. Get it again.") from error
    if loaded.features != trajectory_features(own_layout):
        raise ValueError(f"The columns of {name_or_path} are not those that its {RECORD} tells of: {loaded.features}.")
    return loaded.with_format("numpy"), record, codec


def load_task_encoder(name_or_path: str) -> TaskEncoder:
    """Load the task encoder that was trained beside the basis of a trajectory data set that [`load_trajectories`] can
    load. A `ValueError` says that it is missing or damaged."""
    folder = Path(name_or_path) / TASK_ENCODER
    if not Path(name_or_path).is_dir():
        revision = Path(hf_hub_download(name_or_path, RECORD, repo_type="dataset")).parent.name
        folder = _part_on_hub(name_or_path, TASK_ENCODER, revision)
    return read_encoder(folder)


def _part_on_hub(repo_id: str, part: str, revision: str) -> Path:
    kept = {"repo_type": "dataset", "revision": revision, "allow_patterns": f"{part}/*"}
    return Path(snapshot_download(repo_id, **kept)) / part


def local_targets(trajectories: Dataset, codec: AdapterCodec) -> torch.Tensor:
    """The coefficients at every local target of all trajectories of a data set in numpy format, without the start:
    `(tasks, k, num_tokens, token_dim)`."""
    weights = torch.from_numpy(np.stack([np.asarray(row[1:]) for row in trajectories["weights"][:]]))
    return weights.unflatten(2, codec.filled.shape)
