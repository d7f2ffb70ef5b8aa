import pytest
from datasets import Dataset
from tiny import tiny_dataset

from mcdi_hf import EpisodeSampler, LabelledRows
from mcdi_hf.tasks import check_disjoint


def test_episodes_are_of_one_group_in_range_and_the_same_for_the_same_number() -> None:
    dataset = tiny_dataset()
    rows = LabelledRows(dataset, "label", "domain")
    sampler = EpisodeSampler(rows, (2, 4), (1, 3), 2, seed=5)
    domains, sizes = set(), set()
    for number in range(100):
        task = sampler[number]
        assert task == EpisodeSampler(rows, (2, 4), (1, 3), 2, seed=5)[number]
        (domain,) = {dataset[row]["domain"] for members in task.support + task.query for row in members}
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


def test_one_class_in_two_groups_is_refused() -> None:
    """It would keep the rows of the last group only, and tasks of the others would be given those."""
    rows = tiny_dataset().to_dict()
    rows["domain"][0] = 2
    dataset = Dataset.from_dict(rows, features=tiny_dataset().features)
    with pytest.raises(ValueError, match="'class_0' lies in the groups 'north' and 'west'"):
        LabelledRows(dataset, "label", "domain")
    assert LabelledRows(dataset, "label", "domain", span=range(1, 96)).groups["north"][0] == "class_0"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda data: LabelledRows(data, "intent"), "no column 'intent'"),
        (lambda data: LabelledRows(data, "text"), "expected a ClassLabel"),
        (lambda data: LabelledRows(data.select([]), "label"), "no row"),
        (lambda data: EpisodeSampler(LabelledRows(data, "label", "domain"), (2, 5), (1, 1), 1), "has 5 classes"),
        (lambda data: EpisodeSampler(LabelledRows(data, "label"), (2, 5), (1, 8), 1), "Too few examples for 8 shots"),
        (
            lambda data: EpisodeSampler(
                LabelledRows(data, "label"), (2, 5), (1, 1), 1, 0, LabelledRows(data.select(range(88)), "label")
            ),
            "query_rows has no example of.*class_11",
        ),
    ],
)
def test_bad_input_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_dataset())
