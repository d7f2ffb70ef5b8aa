"""Data sets through the cache of `datasets`, whose disk may be full."""

from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError


def load_cached_dataset(name_or_path: str, **kwargs: Any) -> Dataset | DatasetDict | IterableDataset:
    """`datasets.load_dataset`, but a cache that cannot be written is an `OSError` that says so. A data set that
    cannot be read stays a `DatasetGenerationError`."""
    try:
        return load_dataset(name_or_path, **kwargs)
    except DatasetGenerationError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno is None:  # pyarrow's own, of a damaged file, has no number
            raise
        raise OSError(
            cause.errno,
            f"Could not write {name_or_path} to the cache of datasets in {datasets.config.HF_DATASETS_CACHE}: "
            f"{cause.strerror}. Free space, or set HF_DATASETS_CACHE to another folder, and run the same command again.",
        ) from error
