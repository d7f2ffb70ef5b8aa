"""Files of examples, as users have them: CSV, JSON Lines, Parquet, text, a folder of images, a data set of the Hub."""

import csv
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from ..data.cached import load_cached_dataset
from ..data.sources import TEXTS


LABEL_NAMES = ("label", "labels", "class", "category", "intent", "target")
INPUT_NAMES = ("text", "sentence", "utterance", "message", "image")
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def read_table(name: str, split: str = "train") -> Dataset:
    """Read a file, a folder or the split of a data set.

    Args:
        name (`str`): A `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet` or `.txt` file; a folder with a folder of images for
            each class; a folder of a data set, or a data set's id on the Hub.
        split (`str`, *optional*, defaults to `"train"`): The split of a data set; a file has one.

    Raises:
        `ValueError`: when it cannot be read, in one line that names it.
    """
    disable_progress_bars()
    path = Path(name)
    if path.suffix.lower() in FORMATS and not path.is_file():
        raise FileNotFoundError(f"There is no file {name}.")
    try:
        if path.is_file():
            return _read_file(path)
        if path.is_dir() and _holds_images(path):
            tables = load_cached_dataset("imagefolder", data_dir=str(path))
        else:
            tables = load_cached_dataset(name)
    except (DatasetGenerationError, UnicodeDecodeError, ArrowInvalid) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{name} cannot be read: {reason}") from error
    if split not in tables:
        raise ValueError(f"{name} has no split {split!r}: expected one of {sorted(tables)}.")
    return tables[split]


def labelled(table: Dataset, input_column: str | None, label_column: str | None) -> tuple[list, list[str]]:
    """The examples and the labels of a table: of the columns that are named, or of those that are called as examples and
    labels mostly are. Rows that lack one of them are refused, by their numbers from 1."""
    label_column = label_column or _find(table, LABEL_NAMES, "labels", "label_column")
    inputs, labels = unlabelled(table, input_column, label_column), column(table, label_column)
    if isinstance(feature := table.features[label_column], ClassLabel):
        labels = [None if label in (None, -1) else feature.names[label] for label in labels]
    missing = [row for row, (one, label) in enumerate(zip(inputs, labels), 1) if _lacks(one) or _lacks(label)]
    if missing:
        raise ValueError(f"{len(missing)} rows have no example or no label, such as the rows {missing[:5]}.")
    return inputs, [str(label) for label in labels]


def unlabelled(table: Dataset, input_column: str | None, label_column: str | None = None) -> list:
    """The examples of a table."""
    if input_column is None:
        known = [name for name in table.column_names if name != label_column and _is_input(table.features[name])]
        input_column = known[0] if len(known) == 1 else _find(table, INPUT_NAMES, "examples", "input_column")
    inputs = column(table, input_column)
    if not _is_input(table.features[input_column]):
        raise ValueError(f"The column {input_column!r} is {table.features[input_column]}: expected texts or images.")
    return inputs


def column(table: Dataset, name: str) -> list:
    """The values of a column, which must be there."""
    if name not in table.features:
        raise ValueError(f"There is no column {name!r}: expected one of {table.column_names}.")
    return table[name][:]


def write_rows(file: Any, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, the names of the columns first."""
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)


def _read_file(path: Path) -> Dataset:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is a {path.suffix or 'file without an ending'}: expected {', '.join(FORMATS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    if kind != "csv":
        return load_cached_dataset(kind, data_files=str(path))["train"]
    # A text is a text, also `null` and `007`, which pandas would make numbers and nothing of.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            names, *cells = rows
        except csv.Error as error:
            raise ValueError(f"{path} cannot be read: {error} in line {rows.line_num}.") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has more than one column {twice[0]!r}: give each a name of its own.")
    cells = [row for row in cells if row]
    if wrong := next((number for number, row in enumerate(cells, 2) if len(row) != len(names)), None):
        raise ValueError(f"{path} has in row {wrong} another number of cells than the {len(names)} of {names}.")
    columns = dict(zip(names, map(list, zip(*cells)), strict=True)) if cells else {name: [] for name in names}
    return Dataset.from_dict(columns, Features(dict.fromkeys(names, Value("string"))))


def _holds_images(folder: Path) -> bool:
    endings = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
    return any(path.suffix.lower() in endings for path in folder.glob("*/*"))


def _is_input(feature: Any) -> bool:
    return feature in TEXTS or isinstance(feature, Image)


def _lacks(value: Any) -> bool:
    return value is None or isinstance(value, str) and not value.strip()


def _find(table: Dataset, names: tuple[str, ...], what: str, flag: str) -> str:
    lower = {name.lower(): name for name in table.column_names}
    found = [lower[name] for name in names if name in lower]
    if len(found) != 1:
        raise ValueError(
            f"Which column holds the {what}? The columns are {table.column_names}: name one with --{flag}."
        )
    return found[0]
