"""Sources of tasks as one table, on small data sets in the shape of the Hub."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from scripts import EXAMPLES, write_split
from tiny import tiny_dataset, tiny_image_dataset

from mcdi_hf import EpisodeSampler, LabelledRows, Source, read_mixture
from mcdi_hf.data.sources import inputs_of, load_table, sources_of
from mcdi_hf.data.tasks import check_disjoint


SENTIMENT, PARAPHRASE = ["negative", "positive"], ["different", "same"]


def write_texts(folder: Path, split: str, columns: dict, **names: list[str]) -> None:
    features = {column: ClassLabel(names=names[column]) if column in names else Value("string") for column in columns}
    write_split(folder, split, Dataset.from_dict(columns, features=Features(features)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Single sentences, sentence pairs, reviews of two domains, and images; each split in another way."""
    write_texts(tmp_path / "films", "train", {"text": ["f0", "f1", "f2"], "label": [0, 1, 1]}, label=SENTIMENT)
    write_texts(tmp_path / "films", "validation", {"text": ["f3", "f4"], "label": [1, 0]}, label=SENTIMENT)
    for split, start in (("train", 0), ("dev", 2)):
        columns = {"one": [f"p{start}", f"p{start + 1}"], "two": [f"q{start}", f"q{start + 1}"], "same": [1, 0]}
        write_texts(tmp_path / "pairs", split, columns, same=PARAPHRASE)
    columns = {"text": ["r0", "r1", "r2", "r3"], "label": [1, 0, 1, 0], "domain": [1, 1, 0, 0]}
    for split in ("train", "test"):
        write_texts(tmp_path / "reviews", split, columns, label=SENTIMENT[::-1], domain=["toys", "books"])
    write_split(tmp_path / "glyphs", "train", tiny_image_dataset())
    write_split(tmp_path / "plain", "train", tiny_dataset())
    return tmp_path


@pytest.fixture
def mixture(root: Path) -> list[Source]:
    values = [
        {"dataset_name": "films"},
        {"dataset_name": "pairs", "label_column": "same", "input_columns": ["one", "two"]},
        {"dataset_name": "reviews", "group_column": "domain", "splits": {"validation": "test"}},
    ]
    values[1]["splits"] = {"validation": "dev"}
    (root / "mixture.json").write_text(json.dumps(values))
    return read_mixture(root / "mixture.json", root)


def named(table: Dataset, column: str) -> list[str]:
    return [table.features[column].int2str(number) for number in table[column][:]]


def test_a_mixture_is_one_table_in_the_order_of_splits_then_sources(mixture: list[Source]) -> None:
    table, spans = load_table(mixture, ["train", "validation"], None)
    assert spans == {"train": range(0, 9), "validation": range(9, 17)}
    reviews, train, held_out = ["r0", "r1", "r2", "r3"], ["f0", "f1", "f2"], ["f3", "f4"]
    pairs = [("p0", "q0"), ("p1", "q1")], [("p2", "q2"), ("p3", "q3")]
    assert inputs_of(table) == [*train, *pairs[0], *reviews, *held_out, *pairs[1], *reviews]
    groups = ["reviews/books", "reviews/books", "reviews/toys", "reviews/toys"]
    assert named(table, "group") == [*["films"] * 3, *["pairs"] * 2, *groups, *["films"] * 2, *["pairs"] * 2, *groups]
    assert table.features["label"].names == ["negative", "positive", "different", "same"]
    # the reviews call their first class positive
    labels = ["negative", "positive", "negative", "positive"]
    expected = ["negative", "positive", "positive", "same", "different", *labels]
    assert named(table, "label") == [*expected, "positive", "negative", "same", "different", *labels]
    assert named(table, "domain") == named(table, "group")
    assert set(table.column_names) == {"input", "input_pair", "label", "group", "domain"}


def test_one_data_set_is_labelled_by_several_attributes_and_held_out_by_domain(root: Path) -> None:
    values = [
        {"dataset_name": "reviews", "name": "sentiment", "domain_column": "domain"},
        {"dataset_name": "reviews", "name": "product", "label_column": "domain", "domain_column": "domain"},
    ]
    (root / "attributes.json").write_text(json.dumps(values))
    sources = read_mixture(root / "attributes.json", root)
    table, spans = load_table(sources, ["train", "test"], None)
    assert inputs_of(table) == ["r0", "r1", "r2", "r3"] * 4 and spans["test"] == range(8, 16)
    assert named(table, "group")[:8] == ["sentiment"] * 4 + ["product"] * 4
    assert named(table, "domain") == ["books", "books", "toys", "toys"] * 4
    sentiment, product = ["negative", "positive", "negative", "positive"], ["books", "books", "toys", "toys"]
    assert named(table, "label") == [*sentiment, *product] * 2
    # one domain is held out of both
    books, toys = (load_table(sources, ["train"], [domain])[0] for domain in ("books", "toys"))
    rows = [LabelledRows(table, "label", "group", domain_column="domain") for table in (books, toys)]
    assert [inputs_of(table) for table in (books, toys)] == [["r0", "r1"] * 2, ["r2", "r3"] * 2]
    assert {group: list(own) for group, own in rows[1].groups.items()} == {
        "sentiment": ["positive", "negative"],
        "product": ["toys"],
    }
    check_disjoint(train=rows[0], test=rows[1])
    with pytest.raises(ValueError, match=r"'product/toys in toys', 'sentiment/negative in toys'"):
        check_disjoint(train=rows[1], test=rows[1])


def test_sources_of_one_data_set_move_together_and_keep_their_names(root: Path) -> None:
    sources = [
        Source("gone", "character", ("image",), domain_column="alphabet"),
        Source("gone", "alphabet", ("image",)),
    ]
    sources[1] = replace(sources[1], name="script")
    description = json.loads(json.dumps({"sources": [asdict(source) for source in sources]}))
    moved = sources_of(description, str(root / "glyphs"))
    assert [(source.name, source.dataset_name) for source in moved] == [
        ("gone", str(root / "glyphs")),
        ("script", str(root / "glyphs")),
    ]
    table, _ = load_table(moved, ["train"], ["hebrew", "script"])
    assert set(named(table, "group")) == {"gone", "script"} and len(table) == 6 + 12


def test_only_the_named_domains_are_kept(mixture: list[Source]) -> None:
    table, spans = load_table(mixture, ["validation", "train"], ["reviews/toys", "films"])
    assert spans == {"validation": range(0, 4), "train": range(4, 9)}
    assert inputs_of(table) == ["f3", "f4", "r2", "r3", "f0", "f1", "f2", "r2", "r3"]
    assert set(named(table, "group")) == {"films", "reviews/toys"}
    rows = LabelledRows(table, "label", "group", spans["train"])
    task = EpisodeSampler(rows, (2, 15), (1, 1), 1, query_rows=LabelledRows(table, "label", "group"))[0]
    assert len(task.classes) == 2 and task.group in ("films", "reviews/toys")


def test_one_source_keeps_its_own_names(root: Path) -> None:
    source = Source(str(root / "plain"), group_column="domain")
    table, spans = load_table([source], ["train"], ["south", "west"])
    kept = [row for row in tiny_dataset() if row["domain"] > 0]
    assert spans == {"train": range(0, 64)} and inputs_of(table) == [row["text"] for row in kept]
    assert table["label"][:] == [row["label"] for row in kept] and table["group"][:] == [row["domain"] for row in kept]
    assert table.features["label"] == tiny_dataset().features["label"]
    assert table.features["group"] == tiny_dataset().features["domain"]
    table, _ = load_table([Source(str(root / "plain"))], ["train"], None)
    assert table.features["group"].names == table.features["domain"].names == ["all"]
    assert set(table.column_names) == {"input", "label", "group", "domain"}


def test_images_stay_images(root: Path) -> None:
    source = Source(str(root / "glyphs"), "character", ("image",), "alphabet")
    table, _ = load_table([source], ["train"], ["hebrew"])
    assert isinstance(table.features["input"], Image) and table.column_names == ["input", "label", "group", "domain"]
    found, sources = inputs_of(table), tiny_image_dataset()["image"][6:]
    assert len(found) == 6 and all(isinstance(image, PILImage.Image) for image in found)
    assert all(np.array_equal(np.asarray(one), np.asarray(two)) for one, two in zip(found, sources, strict=True))


@pytest.mark.parametrize(
    "sources, splits, groups, message",
    [
        ([Source("films")], ["test"], None, r"films has no split \['test'\]; it has \['train', 'validation'\]"),
        (
            [Source("films", input_columns=("sentence",))],
            ["train"],
            None,
            r"no column \['sentence'\]; it has \['text'",
        ),
        ([Source("films", group_column="domain")], ["train"], None, "films has no column 'domain'"),
        ([Source("films", domain_column="domain")], ["train"], None, "films has no column 'domain'"),
        ([Source("plain", label_column="text")], ["train"], None, "plain has in column 'text' a .*expected a ClassL"),
        (
            [Source("plain", input_columns=("domain",))],
            ["train"],
            None,
            "expected one or two of strings, or one Image",
        ),
        (
            [Source("glyphs", "character", ("image", "image"))],
            ["train"],
            None,
            "expected one or two of strings, or one Image",
        ),
        ([Source("films"), Source("glyphs", "character", ("image",))], ["train"], None, "some are of texts and some"),
        ([Source("films"), Source("someone/films")], ["train"], None, r"same name among \['films', 'films'\]"),
        ([Source("plain", group_column="domain")], ["train"], ["east"], r"no domains \['east'\].*'north', 'south'"),
        ([Source("films", splits={"test": "train"})], ["train", "test"], None, "Two of the splits .* are the same"),
        ([Source("films")], ["train", "train"], None, "Two of the splits .* are the same"),
    ],
)
def test_what_makes_no_table_is_refused(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: list[Source],
    splits: list[str],
    groups: list[str] | None,
    message: str,
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=message):
        load_table(sources, splits, groups)


def test_rows_without_a_class_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "hidden", "test", {"text": ["a", "b"], "label": [0, -1]}, label=SENTIMENT)
    with pytest.raises(ValueError, match="hidden has no class in column 'label' of 1 rows"):
        load_table([Source(str(tmp_path / "hidden"))], ["test"], None)


def test_a_source_survives_json() -> None:
    source = Source("pairs", "same", ("one", "two"), splits={"test": "dev"})
    assert Source.from_dict(json.loads(json.dumps(asdict(source)))) == source
    assert Source.from_dict({"dataset_name": "films"}) == Source("films", "label", ("text",), None, None, "films")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dataset_name": "films", "text_column": "text"}, r"the fields \['text_column'\]: expected some of"),
        ({"label_column": "label"}, "has no dataset_name"),
        ({"dataset_name": "films", "input_columns": "text"}, "input_columns is 'text': expected a list"),
        ({"dataset_name": "films", "input_columns": ["a", "b", "c"]}, "expected a list of one column or of two"),
    ],
)
def test_a_bad_source_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source.from_dict(values)


def test_a_mixture_is_looked_up_under_the_root(root: Path) -> None:
    path = root / "mixture.json"
    path.write_text(json.dumps([{"dataset_name": "films"}, {"dataset_name": "sst2"}]))
    assert [source.dataset_name for source in read_mixture(str(path))] == ["films", "sst2"]
    with pytest.raises(ValueError, match=r"has no folder \['sst2'\]; it has \['films', 'glyphs', 'mixture.json', 'pa"):
        read_mixture(path, str(root))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/mixtures/*.json")), ids=lambda path: path.stem)
def test_the_mixtures_of_the_examples_are_read(path: Path) -> None:
    assert read_mixture(path)


def test_one_moved_source_is_found_and_several_are_not(mixture: list[Source]) -> None:
    description = json.loads(json.dumps({"sources": [asdict(source) for source in mixture]}))
    assert sources_of(description, None) == mixture
    with pytest.raises(ValueError, match="are of 3 data sets.*not of one: name all sources"):
        sources_of(description, "elsewhere")
    description["sources"] = description["sources"][1:2]
    expected = Source("elsewhere", "same", ("one", "two"), name="pairs", splits={"validation": "dev"})
    assert sources_of(description, "elsewhere") == [expected]


def test_all_moved_sources_are_found_and_others_refused(mixture: list[Source]) -> None:
    description = json.loads(json.dumps({"sources": [asdict(source) for source in mixture]}))
    moved = [replace(source, dataset_name=f"{index}", name=f"{index}") for index, source in enumerate(mixture)]
    found = sources_of(description, moved)
    assert [(source.dataset_name, source.name) for source in found] == [
        ("0", "films"),
        ("1", "pairs"),
        ("2", "reviews"),
    ]
    for others in (moved[:2], moved[::-1], [replace(moved[0], max_rows=2), *moved[1:]]):
        with pytest.raises(ValueError, match="expected the same columns"):
            sources_of(description, others)
