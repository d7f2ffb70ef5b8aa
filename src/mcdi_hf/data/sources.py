"""Labelled data sets as sources of tasks: one, or a mixture of them in one table."""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value, concatenate_datasets

from .cached import load_cached_dataset
from .tasks import ROTATIONS, LabelledRows, class_column, rotate_classes
from .words import mask_words


HELD_OUT_CLASSES = "held-out classes"  # the domain of their rows
TEXTS = (Value("string"), Value("large_string"))


@dataclass(frozen=True)
class Source:
    """A data set, and what of it makes an example.

    Attributes:
        dataset_name (`str`): A Hub id, or a folder that `datasets.load_dataset` reads.
        label_column (`str`, *optional*, defaults to `"label"`): A `ClassLabel` column of classes.
        input_columns (`tuple[str, ...]`, *optional*, defaults to `("text",)`): One column of texts, two for pairs of
            sentences, or one of images.
        group_column (`str`, *optional*): A `ClassLabel` column of groups: a task takes its classes from one. Without
            it all rows are of one group.
        domain_column (`str`, *optional*): A `ClassLabel` column of domains, which decide what rows are trained on,
            validated on and tested on, whatever their group and class. Without it the groups are the domains.
        name (`str`, *optional*): What its rows are called among those of other sources; without it the last part of
            `dataset_name`. One data set may be several sources, its rows labelled by another column in each.
        splits (`dict[str, str]`, *optional*): The data set's names of `"train"`, `"validation"` and `"test"`, where
            they are others, such as `{"validation": "validation_matched"}`.
        max_rows (`int`, *optional*): Keep so many rows of each split, drawn with seed 0; all of them without it.
        turned (`bool`, *optional*, defaults to `False`): Add copies of images turned by 90, 180 and 270 degrees, and a
            `ClassLabel` column `rotation` of the angle, for tasks that ask for it.
        words (`int`, *optional*): Make of the texts a data set of masked words, so many of them, with a `ClassLabel`
            column `word`, see [`mask_words`]. Two sources with the same words have the same rows.
        mask_token (`str`, *optional*, defaults to `"[MASK]"`): What stands for a masked word.
        held_out_classes (`float`, *optional*, defaults to 0): A share of the classes, drawn with seed 0, whose rows are of
            the domain `"held-out classes"`, for a data set that has no domains to hold out.
        weight (`float`, *optional*, defaults to 1.0): The source's share of the tasks that are drawn, relative to that
            of the others; its groups have like shares of it.

    Example: `Source("clinc150", label_column="intent", group_column="domain")`
    """

    dataset_name: str
    label_column: str = "label"
    input_columns: tuple[str, ...] = ("text",)
    group_column: str | None = None
    domain_column: str | None = None
    name: str | None = None
    splits: dict[str, str] | None = None
    max_rows: int | None = None
    turned: bool = False
    words: int | None = None
    mask_token: str = "[MASK]"
    held_out_classes: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name is None:
            object.__setattr__(self, "name", Path(self.dataset_name).name)
        if isinstance(self.input_columns, str) or len(self.input_columns) not in (1, 2):
            raise ValueError(f"input_columns is {self.input_columns!r}: expected a list of one column or of two.")
        if not 0 <= self.held_out_classes < 1:
            raise ValueError(f"held_out_classes is {self.held_out_classes}: expected a share from 0 to below 1.")
        if self.held_out_classes and (self.group_column or self.domain_column):
            raise ValueError(
                f"held_out_classes is for data sets without groups: hold out domains of {self.dataset_name}."
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}: expected a number above 0.")
        if self.words is not None and (self.words < 2 or len(self.input_columns) > 1):
            raise ValueError(
                f"words is {self.words} of {self.input_columns}: expected 2 or more of one column of texts."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Source":
        """The source that `dataclasses.asdict` and JSON made `values` of."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"A source has the fields {unknown}: expected some of {known}.")
        if "dataset_name" not in values:
            raise ValueError(f"The source {values} has no dataset_name.")
        source = cls(**values)
        return replace(source, input_columns=tuple(source.input_columns))

    def load(self, splits: list[str], excluded: Collection[str] = ()) -> dict[str, Dataset]:
        """Load the splits of these names, each by its name here, without the rows of a text that is `excluded`, see
        [`texts_of`]."""
        own = {split: (self.splits or {}).get(split, split) for split in splits}
        tables = load_cached_dataset(self.dataset_name)
        if missing := sorted(set(own.values()) - set(tables)):
            raise ValueError(
                f"{self.dataset_name} has no split {missing}; it has {sorted(tables)}. Say in `splits` which to take."
            )
        if len(set(own.values())) < len(splits):
            raise ValueError(
                f"Two of the splits of {self.dataset_name} are the same, {splits} as {own}, so tasks would be "
                f"judged on what they learn from: name another."
            )
        return {split: self._chosen(self.without(tables[name], excluded)) for split, name in own.items()}

    def without(self, table: Dataset, excluded: Collection[str]) -> Dataset:
        """The rows of a split that have no text which is `excluded`, as the data set has it: before a word is masked."""
        if not excluded:
            return table
        columns = [table[column][:] for column in self.input_columns]
        return table.select(
            [row for row, texts in enumerate(zip(*columns)) if not any(normalized(text) in excluded for text in texts)]
        )

    def _chosen(self, table: Dataset) -> Dataset:
        """The rows wanted of one split, and their turned copies."""
        if self.max_rows is not None and self.max_rows < len(table):
            rows = np.random.default_rng(0).permutation(len(table))[: self.max_rows]
            table = table.select(np.sort(rows))
        if self.words is not None:
            return mask_words(table, self.input_columns[0], self.words, self.mask_token)
        if not self.turned:
            return table
        (column,) = self.input_columns
        angles = [0, *ROTATIONS]
        numbers = np.repeat(np.arange(len(angles)), len(table))
        # The label column plays no part: `rotate_classes` gives each copy a class of its own, and keeps the first ones.
        names = ClassLabel(names=["upright"])
        table = rotate_classes(table.add_column("all", np.zeros(len(table), dtype=int), feature=names), column, "all")
        table = table.remove_columns(["all", "all_unrotated"])
        return table.add_column("rotation", numbers, feature=ClassLabel(names=[f"by {angle}" for angle in angles]))


def read_mixture(path: str | Path, root: str | Path | None = None) -> list[Source]:
    """Read a JSON list of the fields of [`Source`]. `root` is a folder with a folder for each `dataset_name`;
    without it the names stand as they are.

    Example: `read_mixture("examples/reproduce/mixtures/text.json", root="data")`
    """
    sources = [Source.from_dict(values) for values in json.loads(Path(path).read_text())]
    if root is None:
        return sources
    root = Path(root)
    if missing := [source.dataset_name for source in sources if not (root / source.dataset_name).is_dir()]:
        raise ValueError(f"{root} has no folder {missing}; it has {sorted(path.name for path in root.iterdir())}.")
    return [replace(source, dataset_name=str(root / source.dataset_name)) for source in sources]


def sources_of(description: dict, moved: str | list[Source] | None = None) -> list[Source]:
    """Where trajectories' examples come from, by their description. `moved` says where they are now: the one data
    set, which may be several sources, or all sources in their order, which may differ in place and name alone."""
    sources = [Source.from_dict(values) for values in description["sources"]]
    if moved is None:
        return sources
    if isinstance(moved, str):
        if len(known := sorted({source.dataset_name for source in sources})) > 1:
            raise ValueError(f"The trajectories are of {len(known)} data sets, {known}, not of one: name all sources.")
        return [replace(source, dataset_name=moved) for source in sources]
    found = [replace(source, dataset_name="", name="") for source in moved]
    if found != [replace(source, dataset_name="", name="") for source in sources]:
        raise ValueError(f"The sources are {moved}, those of the trajectories {sources}: expected the same columns.")
    return [replace(source, dataset_name=other.dataset_name) for source, other in zip(sources, moved)]


def load_table(
    sources: list[Source], splits: list[str], domains: list[str] | None, excluded: Collection[str] = ()
) -> tuple[Dataset, dict[str, range]]:
    """Load some splits of data sets, all of texts or all of images, into one table, its rows ordered by split and, in
    a split, by source. With `domains` only their rows are kept, and none of a text that is `excluded`, see [`texts_of`].
    Returned are the table and, for each split, its rows in it.

    The columns are `input`, `input_pair` if some source has pairs (`None` beside the texts of others), and the
    class labels `label`, `group` and `domain`. Classes of one name have one label. The groups of one source are its
    own, or `"all"`; those of several are `"SOURCE"`, or `"SOURCE/GROUP"` where the source has a group column.
    Domains are called as in the source's domain column, so that sources which share a domain are held out of it
    together; without such a column they are the groups.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two sources have the same name among {names}, so their groups would too: give each a `name`."
        )
    loaded = [source.load(splits, excluded) for source in sources]
    parts = [
        _canonical(source, tables[split], qualify=len(sources) > 1)
        for split in splits
        for source, tables in zip(sources, loaded)
    ]
    if len({isinstance(part.features["input"], Image) for part in parts}) > 1:
        raise ValueError(f"Of the sources {names} some are of texts and some of images: take those of one kind.")
    for column in ("label", "group", "domain"):
        known = list(dict.fromkeys(name for part in parts for name in part.features[column].names))
        parts = [_with_names(part, column, known) for part in parts]
    table = concatenate_datasets(parts)
    bounds = np.cumsum([0] + [len(part) for part in parts])[:: len(sources)]
    if domains is not None:
        numbers, known = class_column(table, "domain")
        if unknown := sorted(set(domains) - set(known)):
            raise ValueError(f"There are no domains {unknown}: expected some of {known}.")
        kept = np.flatnonzero(np.isin(numbers, [known.index(domain) for domain in domains]))
        table, bounds = table.select(kept), np.searchsorted(kept, bounds)
    spans = {split: range(start, stop) for split, start, stop in zip(splits, bounds.tolist(), bounds[1:].tolist())}
    return table, spans


def domains_of(sources: list[Source]) -> list[str]:
    """The domains of the training rows of some sources."""
    return load_table(sources, ["train"], None)[0].features["domain"].names


def group_weights(sources: list[Source], rows: LabelledRows) -> dict[str, float]:
    """How often each group of the table of some sources is drawn: its share of its source's weight."""
    weights = {source.name: source.weight for source in sources}
    owners = {group: group.split("/")[0] if len(sources) > 1 else sources[0].name for group in rows.groups}
    counts = Counter(owners.values())
    return {group: weights[owner] / counts[owner] for group, owner in owners.items()}


def normalized(text: str) -> str:
    """A text as it is compared with others: lower case, letters and digits only."""
    return "".join(filter(str.isalnum, text.lower()))


def texts_of(dataset_name: str) -> set[str]:
    """All texts of a data set, every split and every column of strings, [`normalized`]."""
    tables = load_cached_dataset(dataset_name).values()
    columns = [(table, name) for table in tables for name, kind in table.features.items() if kind in TEXTS]
    return {normalized(text) for table, name in columns for text in table[name][:] if text}


def training_table(
    description: dict, moved: str | list[Source] | None = None
) -> tuple[Dataset, dict[str, range], int]:
    """The table that the rows of trajectories point into, as [`load_table`] has it: made of the `sources`, `splits`,
    `train_domains`, `rotations` and `exclude_texts_of` of their description. `moved` is that of [`sources_of`].

    Returned are the table, the rows of each split in it, and how many rows of the sources, of whatever domain, were left
    out because their text is one of the data sets in `exclude_texts_of`.
    """
    splits, sources = description["splits"], sources_of(description, moved)
    if description["rotations"] and len(splits) > 1:
        raise ValueError(f"Rotations of {splits} would mix them: take one split.")
    excluded = set().union(*map(texts_of, description["exclude_texts_of"]))
    table, spans = load_table(sources, splits, description["train_domains"], excluded)
    removed = sum(
        len(split) - len(source.without(split, excluded))
        for source in (sources if excluded else [])
        for split in replace(source, words=None).load(splits).values()
    )
    if description["rotations"]:
        table = rotate_classes(table, "input", "label")
    return table, {splits[0]: range(len(table))} if len(splits) == 1 else spans, removed


def inputs_of(table: Dataset) -> list:
    """What a backbone encodes of each row of [`load_table`]: a text, a pair of texts, or a PIL image."""
    inputs = table["input"][:]
    if "input_pair" not in table.features:
        return inputs
    return [one if pair is None else (one, pair) for one, pair in zip(inputs, table["input_pair"][:])]


def _canonical(source: Source, table: Dataset, qualify: bool) -> Dataset:
    """The columns that [`load_table`] promises, with the classes, groups and domains of this source."""
    if missing := sorted(set(source.input_columns) - set(table.features)):
        raise ValueError(f"{source.dataset_name} has no column {missing}; it has {table.column_names}.")
    kinds = [table.features[column] for column in source.input_columns]
    of_texts = all(isinstance(kind, Value) and kind.dtype in ("string", "large_string") for kind in kinds)
    if not of_texts and not (len(kinds) == 1 and isinstance(kinds[0], Image)):
        raise ValueError(
            f"The columns {list(source.input_columns)} of {source.dataset_name} are {kinds}: expected one or two of "
            f"strings, or one Image."
        )
    label = class_column(table, source.label_column, source.dataset_name)
    if source.group_column is None:
        group = np.zeros(len(table), dtype=int), [source.name if qualify else "all"]
    else:
        numbers, names = class_column(table, source.group_column, source.dataset_name)
        group = numbers, [f"{source.name}/{name}" if qualify else name for name in names]
    domain = class_column(table, source.domain_column, source.dataset_name) if source.domain_column else group
    if source.held_out_classes:
        domain = _hold_out_classes(source, label, domain)
    inputs = dict(zip(source.input_columns, ("input", "input_pair")))
    table = table.select_columns(list(inputs)).rename_columns(inputs)
    for column, (numbers, names) in {"label": label, "group": group, "domain": domain}.items():
        table = table.add_column(column, numbers, feature=ClassLabel(names=names))
    return table


def _hold_out_classes(
    source: Source, label: tuple[np.ndarray, list[str]], domain: tuple[np.ndarray, list[str]]
) -> tuple[np.ndarray, list[str]]:
    """The domains of rows, with those of some classes in one of their own. The names decide, so splits agree."""
    (labels, classes), (numbers, names) = label, domain
    count = max(2, round(source.held_out_classes * len(classes)))
    if count > len(classes) - 2:
        raise ValueError(
            f"{source.dataset_name} has {len(classes)} classes: holding out {count} leaves too few to tell apart. Expected "
            "two to be held out and two to be left at least."
        )
    chosen = np.random.default_rng(0).permutation(len(classes))[:count]
    return np.where(np.isin(labels, chosen), len(names), numbers), [*names, HELD_OUT_CLASSES]


def _with_names(table: Dataset, column: str, names: list[str]) -> Dataset:
    """The table with a column's classes renumbered as in `names`."""
    numbers, own = class_column(table, column)
    numbers = np.array([names.index(name) for name in own])[numbers]
    return table.remove_columns(column).add_column(column, numbers, feature=ClassLabel(names=names))
