"""A shard of trajectories, looked at before anybody trusts it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Features


def check_shard(path: Path, numbers: range, features: Features) -> None:
    """Refuse a Parquet file that is damaged, or holds anything but the trajectories of some tasks.

    All of it is read, a few rows at a time, and must hold the tasks `numbers` that its name promises. The checksums of
    its pages are compared if it has any; shards of earlier versions have none, and a flipped bit that leaves a weight
    finite is not seen in them.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if Features.from_arrow_schema(file.schema_arrow) != features:
                raise ValueError(f"its columns are {file.schema_arrow.names} of another layout or other kinds")
            groups = (file.read_row_group(group) for group in range(file.num_row_groups))
            found = [task for rows in groups for task in _check_rows(rows, features["weights"].shape[1])]
    except Exception as error:  # a foreign file can go wrong in any way, and each of them is the file's fault
        raise ValueError(
            f"{path} is damaged: {type(error).__name__}: {error}. Delete it and run the same collection again, or get "
            "the file again."
        ) from error
    if found != list(numbers):
        raise ValueError(f"{path} holds the tasks {found}: expected {list(numbers)}, as its name says.")


def _check_rows(rows: pyarrow.Table, width: int) -> list[int]:
    """The tasks of some rows, whose weights must be of one width, and finite."""
    for chunk in rows["weights"].chunks:
        vectors = chunk.storage.flatten()
        if not (np.asarray(vectors.value_lengths()) == width).all():
            raise ValueError(f"it has weights that are not {width} numbers wide")
        if not np.isfinite(vectors.flatten().to_numpy(zero_copy_only=False)).all():
            raise ValueError("it has weights that are not finite")
    return rows["task"].to_pylist()
