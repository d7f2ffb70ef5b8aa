"""What a user may hand in as a support set, brought to one form."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..data.augmentation import augmented_views
from ..data.episodes import SupportBatch


TEXTS = (Value("string"), Value("large_string"))
LABELS = {"label", "labels"}  # what a column of labels is called
MAX_EXAMPLES = 20_000  # of one support set, which is seen at once: a generator reads a handful
KINDS = ("texts", "pairs of texts", "images")
Example = str | tuple[str, str] | Image.Image
Support = Mapping[str, Sequence[Example]] | Dataset
SupportSet = dict[str, list[Example]]


def as_support_sets(support: Support | list[Support]) -> list[SupportSet]:
    """Bring one support set, or a list of them, to a list of `label -> examples`.

    Args:
        support (`dict`, `datasets.Dataset` or a list of these): A `dict` maps a label to its examples: texts, pairs of
            texts as tuples, or PIL images. A `Dataset` has one `ClassLabel` column and one column of texts or images. A
            `dict` of two columns of one length, of which one is called `label` or `labels`, and a list of such rows are
            one support set, too.

    Raises:
        `TypeError`: when it is none of these.
        `ValueError`: when a set has fewer than two classes, an empty class, more than 20,000 examples, or an example that
            is none of these; when examples of several kinds are mixed.
    """
    supports = support if isinstance(support, list) and not _are_rows(support) else [support]
    if not supports:
        raise ValueError("The list of support sets is empty: expected at least one.")
    checked = [_as_support_set(one) for one in supports]
    kind_of(checked)
    return checked


def kind_of(supports: list[SupportSet]) -> str:
    """What support sets hold, one of `KINDS`; a mix is refused."""
    groups = [examples for support in supports for examples in support.values()]
    kinds = sorted({_kind(example) for examples in groups for example in examples}, key=KINDS.index)
    if len(kinds) > 1:
        raise ValueError(f"The support mixes {' and '.join(kinds)}: expected one or the other.")
    return kinds[0]


def encode_examples(
    supports: list[SupportSet], stacked: StackedLora, num_views: int = 1, ways: int | None = None
) -> SupportBatch:
    """See support sets of examples through the frozen layers, in `num_views` views of each: a [`SupportBatch`] of `ways`
    classes, or of the most that there are, with examples.
    """
    batch = _numbered(supports, ways, stacked.device)
    sets = [[example for group in support.values() for example in group] for support in supports]
    # A task's views do not depend on its neighbours: each counts its examples from 0.
    views = [augmented_views(examples, num_views) for examples in sets]
    ordered = [
        example
        for view in range(num_views)
        for examples, own in zip(sets, views)
        for example in own[view * len(examples) : (view + 1) * len(examples)]
    ]
    examples = stacked.encode(ordered, num_views=num_views)
    rows = torch.cat([batch.rows + view * len(examples) for view in range(num_views)], dim=1)
    return replace(batch, rows=rows, examples=examples)


def _numbered(supports: list[SupportSet], ways: int | None, device: torch.device) -> SupportBatch:
    """Support sets as rows of a table that holds the examples of all of them, one behind the other."""
    numbers = count()
    rows = [[[next(numbers) for _ in group] for group in support.values()] for support in supports]
    return SupportBatch.from_rows(rows, [tuple(support) for support in supports], ways, device)


def check_readable(supports: list[SupportSet], backbone: FrozenBackbone) -> None:
    """Refuse examples that the backbone does not read, and labels that a language model cannot tell apart."""
    kind = kind_of(supports)
    if (kind == "images") != backbone.reads_images:
        reads = "images" if backbone.reads_images else "texts"
        raise ValueError(f"The support holds {kind}, but the backbone {backbone.name_or_path!r} reads {reads}.")
    if backbone.is_causal_lm:
        backbone.verbalizers([tuple(support) for support in supports])


def _kind(example: Any) -> str:
    if isinstance(example, tuple):
        return "pairs of texts"
    if isinstance(example, Image.Image):
        return "images"
    return "texts"


def _as_support_set(support: Any) -> SupportSet:
    if isinstance(support, list) and _are_rows(support):
        if len(columns := {tuple(row) for row in support}) > 1:
            raise ValueError(
                f"The rows of the support set have the columns {sorted(columns)}: expected the same in all."
            )
        support = {name: [row[name] for row in support] for name in support[0]}
    if isinstance(support, Dataset):
        support = _from_dataset(support)
    elif isinstance(support, Mapping) and LABELS & set(support):
        support = _from_columns(support)
    if not isinstance(support, Mapping):
        raise TypeError(
            f"A support set is a {type(support).__name__}: expected a dict of label -> examples or a datasets.Dataset."
        )
    if len(support) < 2:
        raise ValueError(f"The support set has the classes {list(support)}: expected at least two.")
    checked = {}
    for label, examples in support.items():
        if not _is_text(label):
            raise ValueError(f"{label!r} is no label: expected a string that is not empty.")
        checked[label] = _check_examples(label, examples)
    if (number := sum(map(len, checked.values()))) > MAX_EXAMPLES:
        raise ValueError(f"The support set has {number:,} examples: expected {MAX_EXAMPLES:,} at most. Give a sample.")
    return checked


def _are_rows(support: list) -> bool:
    """Whether a list is one of rows, `{"text": ..., "label": ...}`, and not of support sets."""
    return bool(support) and all(
        isinstance(row, Mapping) and any(isinstance(row.get(name), str | int) for name in LABELS) for row in support
    )


def _from_columns(columns: Mapping[str, Sequence]) -> dict[str, list]:
    """The support set of a column of labels, names or numbers, and one of examples, in the order of its labels."""
    names = sorted(columns, key=LABELS.__contains__)  # the labels last
    lists = [
        columns[name] for name in names if isinstance(columns[name], Iterable) and not isinstance(columns[name], str)
    ]
    lists = [list(values) for values in lists]
    if len(columns) != 2 or len(set(map(len, lists))) != 1 or not all(isinstance(one, str | int) for one in lists[-1]):
        raise ValueError(
            f"The support set has the columns {list(columns)}: expected one of examples and one of as many labels, names or "
            "numbers. If these are the classes, call none of them 'label'."
        )
    examples, labels = lists
    support = {}
    for one, example in zip(labels, examples):
        support.setdefault(str(one), []).append(example)
    return support


def _is_text(value: Any) -> bool:
    """Whether something is a string that says anything, and that a file or a tokenizer can take."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _check_examples(label: str, examples: Any) -> list[Example]:
    if isinstance(examples, str | Image.Image):
        kind = "string" if isinstance(examples, str) else "image"
        raise ValueError(f"The examples of {label!r} are one {kind}: expected a list of {kind}s.")
    if not isinstance(examples, Iterable) or isinstance(examples, Mapping):
        raise TypeError(f"The examples of {label!r} are a {type(examples).__name__}: expected a list.")
    examples = list(examples)
    if not examples:
        raise ValueError(f"The class {label!r} has no example: expected at least one.")
    for example in examples:
        texts = example if isinstance(example, tuple) and len(example) == 2 else (example,)
        if isinstance(example, Image.Image):
            _check_image(label, example)
        elif not all(map(_is_text, texts)):
            raise ValueError(
                f"The class {label!r} holds {example!r}: expected a text that is not empty, a tuple of two such texts or "
                "a PIL image."
            )
    return examples


def _check_image(label: str, image: Image.Image) -> None:
    """Refuse an image without pixels, one that cannot be decoded, and one whose values 8 bits do not hold."""
    if 0 in image.size or image.mode.startswith(("I", "F")):
        raise ValueError(
            f"The class {label!r} holds an image of mode {image.mode!r} and size {image.size}: expected pixels of 8 bits "
            "a channel. Scale deeper ones yourself, since converting them would cut them off."
        )
    try:
        image.load()
    except OSError as error:
        raise ValueError(f"The class {label!r} holds an image that cannot be decoded: {error}.") from error


def _from_dataset(dataset: Dataset) -> dict[str, list[str] | list[Image.Image]]:
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    inputs = [
        name
        for name, feature in dataset.features.items()
        if feature in TEXTS or isinstance(feature, ImageFeature) and feature.decode
    ]
    if len(labels) != 1 or len(inputs) != 1:
        raise ValueError(
            f"The data set has the columns {dataset.features}: expected one ClassLabel and one of strings or of decoded "
            "images. Use dataset.select_columns and dataset.class_encode_column."
        )
    names = dataset.features[labels[0]].names
    dataset = dataset.with_format(None)
    examples = list(zip(dataset[labels[0]][:], dataset[inputs[0]][:]))
    if any(label in (None, -1) for label, _ in examples):
        raise ValueError(f"The data set has rows without a label in {labels[0]!r}.")
    support = {}
    for label, example in sorted(examples, key=lambda pair: pair[0]):  # logits in the order of the class names
        support.setdefault(names[label], []).append(example)
    return support
