"""Support sets of many tasks in tensors of one shape, and what is computed of them task by task."""

import pytest
import torch

from mcdi_hf import Task
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.data.episodes import SupportBatch, rows_and_labels, task_accuracies, task_losses


ROWS = [((5, 6, 7), (8,)), ((0,), (1, 2), (3, 4)), ((9,), (9,))]
CLASSES = [("p", "q"), ("r", "s", "t"), ("u", "v")]


def make_batch(num_views: int = 1) -> SupportBatch:
    """Three tasks over ten texts of 1 to 10 tokens, in a table whose features say whose they are."""
    batch = SupportBatch.from_rows(ROWS, CLASSES)
    counts = torch.arange(1, 11).repeat(num_views)
    starts = counts.cumsum(0) - counts
    table = EncodedExamples(
        torch.arange(1.0, 1 + int(counts.sum()))[:, None], torch.device("cpu"), starts, counts, num_views
    )
    batch.examples, batch.features = table, batch.rows.float().unsqueeze(-1)
    batch.rows = torch.cat([batch.rows + 10 * view for view in range(num_views)], dim=1)
    return batch


def test_padding() -> None:
    batch = SupportBatch.from_rows(ROWS, CLASSES, ways=4)
    assert len(batch) == 3 and batch.classes == CLASSES
    assert batch.labels.tolist() == [[0, 0, 0, 1, -1], [0, 1, 1, 2, 2], [0, 1, -1, -1, -1]]
    assert batch.rows.tolist() == [[5, 6, 7, 8, 0], [0, 1, 2, 3, 4], [9, 9, 0, 0, 0]]
    assert batch.class_mask.tolist() == [[True] * n + [False] * (4 - n) for n in (2, 3, 2)]
    assert SupportBatch.from_rows(ROWS).class_mask.shape == (3, 3)  # by default no class more than the most


def test_fewer_ways_than_there_are_cut_no_class_off() -> None:
    assert SupportBatch.from_rows(ROWS, CLASSES, ways=2).class_mask.shape == (3, 3)


def test_a_number_and_a_list_pick_tasks_too() -> None:
    batch = make_batch()
    assert batch[2].classes == [("u", "v")] and batch[2].labels.tolist() == batch[torch.tensor([2])].labels.tolist()
    assert batch[[2, 0]].classes == [("u", "v"), ("p", "q")]


def test_the_table_hands_its_rows_to_where_the_batch_went() -> None:
    assert make_batch().to("meta").examples.device == torch.device("meta")


def test_the_part_of_a_task() -> None:
    task = Task(("p", "q"), support=((1,), (2, 3)), query=((4, 5), (6,)), group="all")
    support, query = SupportBatch.from_tasks([task]), SupportBatch.from_tasks([task], "query")
    assert support.rows.tolist() == [[1, 2, 3]] and support.labels.tolist() == [[0, 1, 1]]
    assert query.rows.tolist() == [[4, 5, 6]] and query.labels.tolist() == [[0, 0, 1]]
    assert support.classes == query.classes == [("p", "q")]
    assert [part.tolist() for part in rows_and_labels(task.query)] == [[4, 5, 6], [0, 0, 1]]


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize(
    ("tasks", "order"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (torch.tensor([2, 0, 0]), [2, 0, 0]),
        (torch.tensor([False, True, True]), [1, 2]),
        (torch.tensor([], dtype=torch.long), []),
    ],
)
def test_tasks_are_picked_in_any_order(tasks: slice | torch.Tensor, order: list[int], num_views: int) -> None:
    batch = make_batch(num_views)
    picked = batch[tasks]
    assert len(picked) == len(order) and picked.examples is batch.examples
    assert picked.classes == [CLASSES[task] for task in order]
    for name in ("labels", "class_mask", "rows", "features"):
        whole, part = getattr(batch, name), getattr(picked, name)
        assert part.shape[1:] == whole.shape[1:] and all(one.equal(whole[task]) for one, task in zip(part, order))


def test_a_batch_without_names_table_or_features_is_picked_from() -> None:
    picked = SupportBatch(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, dtype=torch.bool))[torch.tensor([1])]
    assert picked.labels.tolist() == [[1, 0]]
    assert picked.rows is picked.features is picked.examples is picked.classes is None


def test_views_stand_behind_the_examples_as_they_are() -> None:
    batch = make_batch(num_views=2)
    assert batch.plain_rows.equal(SupportBatch.from_rows(ROWS).rows)
    plain, views = batch.inputs(), batch.inputs(views=True)
    assert plain["attention_mask"].sum(dim=1).tolist() == (batch.plain_rows.flatten() + 1).tolist()
    for key, value in plain.items():
        assert views[key].unflatten(0, (3, 10))[:, :5].flatten(0, 1).equal(value)
    first = views["inputs_embeds"].unflatten(0, (3, 2, 5))[..., 0, 0]
    assert first[:, 1].equal(first[:, 0] + 55)  # the second view of a text: 55 tokens are in the first


def test_rows_stay_on_the_cpu() -> None:
    moved = make_batch().to("meta")
    assert {name: getattr(moved, name).device.type for name in ("labels", "class_mask", "features", "rows")} == {
        "labels": "meta",
        "class_mask": "meta",
        "features": "meta",
        "rows": "cpu",
    }


def test_losses_and_accuracies_are_those_of_each_task_alone() -> None:
    batch = SupportBatch.from_rows(ROWS, ways=4)
    drawn = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    logits = drawn.masked_fill(~batch.class_mask.unsqueeze(1), float("-inf")).requires_grad_()
    losses = task_losses(logits, batch.labels)
    accuracies = task_accuracies(logits, batch.labels)
    losses.sum().backward()
    assert losses.shape == accuracies.shape == (3,)
    for task, classes in enumerate(ROWS):
        _, labels = rows_and_labels(classes)
        own = drawn[task, : len(labels), : len(classes)].clone().requires_grad_()
        expected = torch.nn.functional.cross_entropy(own, labels)
        expected.backward()
        torch.testing.assert_close(losses[task], expected)
        assert accuracies[task] == (own.argmax(dim=-1) == labels).float().mean()
        gradient = torch.zeros(5, 4)
        gradient[: len(labels), : len(classes)] = own.grad
        torch.testing.assert_close(logits.grad[task], gradient)  # padding has none, and none is NaN
