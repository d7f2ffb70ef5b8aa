from collections.abc import Callable

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from tiny import tiny_dataset, tiny_image_dataset

from mcdi_hf import EpisodeSampler, LabelledRows, Task
from mcdi_hf.data.tasks import check_disjoint, draw_shots, rotate_classes


def tiny_reviews() -> Dataset:
    """Sentiment in three domains of two classes, 5 rows each, and stars from 1 to 4 in a fourth; row = its number."""
    names = ["negative", "positive", "one", "two", "three", "four"]
    domains = {"books": (0, 1), "films": (0, 1), "toys": (0, 1), "stars": (2, 3, 4, 5)}
    found = [(label, index) for index, labels in enumerate(domains.values()) for label in labels for _ in range(5)]
    features = Features({"label": ClassLabel(names=names), "domain": ClassLabel(names=list(domains))})
    return Dataset.from_dict({"label": [a for a, _ in found], "domain": [b for _, b in found]}, features=features)


def test_episodes_are_of_one_group_in_range_and_the_same_for_the_same_number() -> None:
    dataset = tiny_dataset()
    rows = LabelledRows(dataset, "label", "domain")
    sampler = EpisodeSampler(rows, (2, 4), (1, 3), 2, seed=5)
    domains, sizes = set(), set()
    for number in range(100):
        task = sampler[number]
        assert task == EpisodeSampler(rows, (2, 4), (1, 3), 2, seed=5)[number]
        (domain,) = {dataset[row]["domain"] for members in task.support + task.query for row in members}
        assert task.group == dataset.features["domain"].int2str(domain)
        for name, support, query in zip(task.classes, task.support, task.query):
            found = {dataset.features["label"].int2str(dataset[row]["label"]) for row in support + query}
            assert found == {name} and not set(support) & set(query) and len(query) == 2
        shots = {len(support) for support in task.support}
        assert len(shots) == 1
        domains.add(domain)
        sizes.add((len(task.classes), *shots))
    assert domains == {0, 1, 2} and sizes == {(ways, shots) for ways in (2, 3, 4) for shots in (1, 2, 3)}
    assert sampler[0] != EpisodeSampler(rows, (2, 4), (1, 3), 2, seed=6)[0]


def test_query_may_come_from_another_split_and_groups_may_be_left_out() -> None:
    dataset = tiny_dataset()
    first = [row for row in range(96) if row % 8 < 4]
    table = dataset.select(first + [row for row in range(96) if row % 8 >= 4])
    support = LabelledRows(table, "label", span=range(0, 48))
    query = LabelledRows(table, "label", span=range(48, 96))
    task = EpisodeSampler(support, (12, 12), (4, 4), 4, query_rows=query)[0]
    assert len(set(task.classes)) == 12
    assert all(row < 48 for rows in task.support for row in rows)
    assert all(row >= 48 for rows in task.query for row in rows)


def test_a_leak_between_splits_is_named() -> None:
    dataset = tiny_dataset()
    north, rest = (LabelledRows(dataset.select(rows), "label") for rows in (range(0, 40), range(40, 96)))
    check_disjoint(train=north, test=rest)
    with pytest.raises(ValueError, match="train and test share the classes.*class_4"):
        check_disjoint(train=north, validation=rest, test=LabelledRows(dataset.select(range(32, 40)), "label"))


def test_the_tasks_of_earlier_versions_are_drawn_again() -> None:
    """Published figures and trajectories were made with them."""
    sampler = EpisodeSampler(LabelledRows(tiny_dataset(), "label", "domain"), (2, 4), (2, 2), 2, seed=5)
    assert [sampler[number] for number in (0, 7)] == [
        Task(
            ("class_11", "class_8", "class_9", "class_10"),
            ((88, 89), (66, 70), (74, 79), (84, 81)),
            ((91, 94), (67, 71), (76, 73), (82, 87)),
            "west",
        ),
        Task(
            ("class_0", "class_1", "class_3"),
            ((7, 0), (9, 12), (26, 31)),
            ((4, 3), (13, 11), (30, 25)),
            "north",
        ),
    ]


def test_few_shots_are_drawn_as_often_as_many_and_a_fixed_number_draws_nothing() -> None:
    random, untouched = np.random.default_rng(0), np.random.default_rng(0)
    assert [draw_shots((count, count), random) for count in (1, 256)] == [1, 256]
    assert random.bit_generator.state == untouched.bit_generator.state
    drawn = np.array([draw_shots((1, 256), random) for _ in range(4000)])
    assert drawn.min() == 1 and drawn.max() > 240
    for octave in range(8):  # 1, 2 to 3, 4 to 7, ...: each is log 2 / log 257 of all
        share = np.mean((drawn >= 2**octave) & (drawn < 2 ** (octave + 1)))
        assert share == pytest.approx(np.log(2) / np.log(257), abs=0.02)
    assert {draw_shots((3, 5), random) for _ in range(200)} == {3, 4, 5}


def test_a_class_of_two_groups_is_two_classes() -> None:
    rows = LabelledRows(tiny_reviews(), "label", "domain")
    assert {group: list(classes) for group, classes in rows.groups.items()} == {
        "books": ["negative", "positive"],
        "films": ["negative", "positive"],
        "toys": ["negative", "positive"],
        "stars": ["one", "two", "three", "four"],
    }
    assert rows.groups["films"]["positive"].tolist() == [15, 16, 17, 18, 19]
    sampler, spans = EpisodeSampler(rows, (2, 2), (2, 2), 3), {"books": 0, "films": 10, "toys": 20}
    tasks = [task for task in map(sampler.__getitem__, range(60)) if task.group in spans]
    assert {task.group for task in tasks} == set(spans)
    for task in tasks:
        for name, support, query in zip(task.classes, task.support, task.query):
            first = spans[task.group] + 5 * ["negative", "positive"].index(name)
            assert sorted(support + query) == list(range(first, first + 5))


def test_a_span_keeps_its_rows_only() -> None:
    rows = LabelledRows(tiny_reviews(), "label", "domain", span=range(13, 24))
    assert list(rows.groups) == ["films", "toys"] and list(rows.groups["toys"]) == ["negative"]
    assert rows.groups["films"]["negative"].tolist() == [13, 14]


def test_small_groups_join_with_as_many_classes_as_they_have() -> None:
    rows = LabelledRows(tiny_reviews(), "label", "domain")
    sampler = EpisodeSampler(rows, (2, 15), (1, 3), 2, seed=1)
    sizes = {(task.group, len(task.classes)) for task in map(sampler.__getitem__, range(150))}
    small = {(group, 2) for group in ("books", "films", "toys")}
    assert sizes == small | {("stars", ways) for ways in (2, 3, 4)}
    backwards = {number: sampler[number] for number in reversed(range(20))}
    assert all(EpisodeSampler(rows, (2, 15), (1, 3), 2, seed=1)[number] == task for number, task in backwards.items())
    sampler = EpisodeSampler(rows, (3, 3), (1, 3), 2)
    assert {(task.group, len(task.classes)) for task in map(sampler.__getitem__, range(20))} == {("stars", 3)}


def test_a_leak_within_one_group_is_named_with_it() -> None:
    data = tiny_reviews()
    books, films, both = (
        LabelledRows(data, "label", "domain", span) for span in (range(10), range(10, 20), range(15))
    )
    check_disjoint(train=books, test=films)
    with pytest.raises(ValueError, match=r"test and late share the classes \['films/negative'\]"):
        check_disjoint(test=films, late=LabelledRows(data, "label", "domain", range(14, 15)))
    with pytest.raises(ValueError, match=r"share the classes \['books/negative', 'books/positive'\]"):
        check_disjoint(train=books, test=both)


def test_classes_may_run_across_domains_and_be_tested_in_others() -> None:
    """Rows 0-9 are of books, 10-19 of films and 20-29 of toys; sentiment is one group over all of them."""
    data = tiny_reviews()
    rows = {
        span: LabelledRows(data, "label", span=span, domain_column="domain") for span in (range(20), range(20, 50))
    }
    train, test = rows.values()
    assert train.groups["all"]["negative"].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert ("books", "all", "negative") in train.origins and len(train.origins) == 4
    check_disjoint(train=train, test=test)
    task = EpisodeSampler(train, (2, 2), (6, 6), 4)[0]  # more than one domain has
    assert {row // 10 for members in task.support for row in members} == {0, 1}
    late = LabelledRows(data, "label", span=range(15, 50), domain_column="domain")
    with pytest.raises(ValueError, match=r"train and late share the classes \['positive in films'\]"):
        check_disjoint(train=train, late=late)


def test_rotation_adds_turned_copies_as_classes_of_their_own() -> None:
    dataset = tiny_image_dataset()
    rotated = rotate_classes(dataset, "image", "character", (90, 270))
    assert len(rotated) == 36 and isinstance(rotated.features["image"], Image)
    for part, (turns, suffix) in enumerate([(0, ""), (1, " rotated 90"), (3, " rotated 270")]):
        for row, source in enumerate(dataset):
            found = rotated[12 * part + row]
            assert np.array_equal(np.asarray(found["image"]), np.rot90(np.asarray(source["image"]), turns))
            name = dataset.features["character"].int2str(source["character"])
            assert rotated.features["character"].int2str(found["character"]) == name + suffix
            assert rotated.features["character_unrotated"].int2str(found["character_unrotated"]) == name
            assert (found["alphabet"], found["drawer"]) == (source["alphabet"], source["drawer"])
    rows = LabelledRows(rotated, "character", "alphabet")
    assert {group: len(classes) for group, classes in rows.groups.items()} == {"greek": 6, "hebrew": 6}
    assert rows.groups["hebrew"]["bet rotated 90"].tolist() == [21, 22, 23]


def test_a_character_and_its_rotation_are_a_leak() -> None:
    dataset = tiny_image_dataset()
    rotated = rotate_classes(dataset, "image", "character")
    originals = LabelledRows(dataset.select(range(3)), "character", "alphabet")  # alpha
    turned = LabelledRows(rotated, "character", "alphabet", range(12, 15))
    others = LabelledRows(rotated, "character", "alphabet", range(15, 24))
    assert list(turned.groups["greek"]) == ["alpha rotated 90"]
    check_disjoint(train=originals, test=others)
    with pytest.raises(ValueError, match=r"train and test share the classes \['greek/alpha'\]"):
        check_disjoint(train=originals, test=turned)
    with pytest.raises(ValueError, match=r"share the classes \['greek/alpha'\]"):  # by 90 and by 180 degrees
        check_disjoint(train=turned, test=LabelledRows(rotated, "character", "alphabet", range(24, 27)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda data: rotate_classes(data, "drawer", "character"), "'drawer' is no Image column"),
        (lambda data: rotate_classes(data, "image", "drawer"), "expected a ClassLabel"),
        (lambda data: rotate_classes(data, "image", "character", (90, 45)), r"angles has \[45\]: expected some of"),
        (lambda data: rotate_classes(data, "image", "character", (90, 90)), "duplicated"),
        (
            lambda data: rotate_classes(rotate_classes(data, "image", "character", (180,)), "image", "character"),
            "rotated before: give all angles at once",
        ),
    ],
)
def test_what_cannot_be_rotated_is_refused(make: Callable[[Dataset], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_image_dataset())


def test_groups_that_are_left_out_need_no_examples() -> None:
    data = tiny_dataset()
    rows = LabelledRows(data, "label", "domain")
    name = next(iter(rows.groups["north"]))
    rows.groups["north"] = {name: rows.groups["north"][name][:1]}
    query_rows = LabelledRows(data, "label", "domain", range(32, 96))
    for sampler in (EpisodeSampler(rows, (2, 4), (3, 3), 1), EpisodeSampler(rows, (2, 4), (3, 3), 1, 0, query_rows)):
        assert {sampler[number].group for number in range(20)} == {"south", "west"}
    with pytest.raises(ValueError, match="Too few examples for 3 shots"):
        EpisodeSampler(rows, (1, 4), (3, 3), 1)


def without_class(data: Dataset) -> Dataset:
    """The data set with a row of no class, as hidden test splits have them."""
    features = Features({"label": data.features["label"], "text": Value("string")})
    return Dataset.from_dict({"label": [0, -1], "text": ["a", "b"]}, features=features)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda data: LabelledRows(data, "intent"), "no column 'intent'"),
        (lambda data: LabelledRows(data, "text"), "expected a ClassLabel"),
        (lambda data: LabelledRows(data.select([]), "label"), "no row"),
        (lambda data: LabelledRows(without_class(data), "label"), "'label' of 1 rows, where it is -1"),
        (lambda data: EpisodeSampler(LabelledRows(data, "label", "domain"), (5, 6), (1, 1), 1), "has 5 classes"),
        (lambda data: EpisodeSampler(LabelledRows(data, "label"), (2, 5), (1, 8), 1), "Too few examples for 8 shots"),
        (
            lambda data: EpisodeSampler(
                LabelledRows(data, "label"), (2, 5), (1, 1), 1, 0, LabelledRows(data.select(range(88)), "label")
            ),
            r"query_rows has no example of the classes \['class_11'\]",
        ),
        (
            lambda data: EpisodeSampler(
                LabelledRows(tiny_reviews(), "label", "domain"),
                (2, 2),
                (1, 1),
                1,
                query_rows=LabelledRows(tiny_reviews(), "label", "domain", range(15)),
            ),
            "query_rows has no example of.*films/positive.*toys/negative",
        ),
    ],
)
def test_bad_input_is_refused(make: Callable[[Dataset], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_dataset())
