"""The rival that mixes training adapters: its loss, its search, and what they come to on a tiny backbone."""

import sys
import threading
import time

import pytest
import torch
from scripts import EXAMPLES
from tiny import (
    assert_close,
    random_adapters,
    seeded,
    tiny_backbone,
    tiny_dataset,
    tiny_language_pipeline,
    tiny_lora_config,
)

from mcdi_hf import AdapterLayout, EpisodeSampler, LabelledRows, StackedLora, Task, train_shared_adapter
from mcdi_hf.adapters.head import class_means, head_logits, imprint_head
from mcdi_hf.training.validation import adapter_accuracies, free_accuracies
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.shared import initial_adapter


sys.path.insert(0, str(EXAMPLES))

from mixing_rival import mix, mixed_adapters, support_losses  # noqa: E402


SCALE = 1.0


@pytest.fixture(scope="module")
def setting() -> tuple[StackedLora, EncodedExamples, EpisodeSampler, EpisodeSampler]:
    """A backbone, its examples, tasks of two domains and of a third."""
    table = tiny_dataset(rows_per_class=12)
    backbone = tiny_backbone()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config()))
    rows = LabelledRows(table, "label", "domain")
    known, new = (EpisodeSampler(rows, (2, 4), (1, 4), 5, seed=seed) for seed in (0, 1))
    known.groups, new.groups = ["north", "south"], ["west"]
    return stacked, stacked.encode(table["text"][:]), known, new


def losses_of(stacked: StackedLora, tensors: dict, examples: EncodedExamples, tasks: list[Task]) -> list[float]:
    """The objective without its penalty, one task at a time."""
    found = []
    for index, task in enumerate(tasks):
        rows = torch.tensor([row for members in task.support for row in members])
        labels = torch.tensor([[label for label, members in enumerate(task.support) for _ in members]])
        own = {key: value[index : index + 1] for key, value in tensors.items()}
        mask = torch.ones(1, len(task.classes), dtype=torch.bool)
        found += support_losses(stacked.features(own, examples[rows]), labels, mask, SCALE).tolist()
    return found


def test_the_loss_of_an_example_is_that_under_a_head_of_the_others() -> None:
    features = torch.randn(2, 7, 5, generator=seeded())
    labels = torch.tensor([[0, 0, 1, 1, 1, 2, -1], [0, 1, 1, 0, -1, -1, -1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = []
    for task, ways in enumerate((3, 2)):
        own = []
        for place in range(int((labels[task] >= 0).sum())):
            others = labels[task].clone()
            if (others == others[place]).sum() > 1:  # else the class would have no example
                others[place] = -1
            head = imprint_head(class_means(features[task][None], others[None], ways), 3.0)
            logits = head_logits(features[task][None, place : place + 1], *head)[0]
            own.append(torch.nn.functional.cross_entropy(logits, labels[task, place : place + 1]))
        expected.append(torch.stack(own).mean())
    assert_close(support_losses(features, labels, mask, 3.0), torch.stack(expected))


def test_a_mix_sums_each_matrix_by_its_own_tasks_coefficients() -> None:
    value = torch.arange(12.0).reshape(2, 3, 2, 1)  # two tasks, three adapters
    found = mix({"a": value}, torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]]))
    assert found["a"].tolist() == [[[-4.0], [-4.0]], [[4.0], [4.5]]]


def test_coefficients_of_zero_are_tried_first_and_are_the_frozen_backbone(setting) -> None:
    stacked, examples, _, sampler = setting
    tasks = [sampler[number] for number in range(6)]
    adapters = {key: value for key, value in random_adapters(stacked.layout, 5).items() if "lora" in key}
    found = mixed_adapters(stacked, adapters, examples, tasks, SCALE, num_adapters=3, num_evaluations=1)
    assert all(
        value.shape == (6, *stacked.layout.lora_shapes[key]) and not value.any() for key, value in found.items()
    )
    frozen = stacked.features_of_all(initial_adapter(stacked.layout), examples)
    assert adapter_accuracies(stacked, found, examples, tasks, SCALE) == pytest.approx(
        free_accuracies(stacked, frozen, SCALE, tasks)
    )


def test_the_search_never_ends_above_where_it_starts_and_neither_batches_nor_repeats_change_it(setting) -> None:
    stacked, examples, _, sampler = setting
    tasks = [sampler[number] for number in range(5)]
    adapters = {key: value for key, value in random_adapters(stacked.layout, 30).items() if "lora" in key}
    threads = threading.active_count()
    found = mixed_adapters(stacked, adapters, examples, tasks, SCALE)
    started = losses_of(stacked, {key: torch.zeros_like(value) for key, value in found.items()}, examples, tasks)
    ended = losses_of(stacked, found, examples, tasks)
    assert all(end <= start + 1e-6 for start, end in zip(started, ended))
    assert sum(end < 0.9 * start for start, end in zip(started, ended)) >= 3
    again = mixed_adapters(stacked, adapters, examples, tasks, SCALE)
    apart = mixed_adapters(stacked, adapters, examples, tasks, SCALE, tasks_at_once=2)
    other = mixed_adapters(stacked, adapters, examples, tasks, SCALE, seed=1)
    for key, value in found.items():
        assert value.equal(again[key]) and not value.equal(other[key])
        torch.testing.assert_close(value, apart[key], rtol=1e-3, atol=1e-3)
    deadline = time.monotonic() + 10  # nevergrad's own threads end with their searches, soon after
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= threads


def test_it_finds_the_one_adapter_that_was_trained_for_its_tasks(setting) -> None:
    stacked, examples, known, _ = setting
    planted, _ = train_shared_adapter(stacked, examples, known, num_steps=60, learning_rate=1e-2, scale=SCALE)
    adapters = {key: torch.zeros(4, *value.shape[1:]) for key, value in planted.items()}
    for key, value in planted.items():
        adapters[key][2] = value[0]
    tasks = [task for task in (known[number] for number in range(1000, 1040)) if len(task.support[0]) > 1]
    found = mixed_adapters(stacked, adapters, examples, tasks, SCALE, num_adapters=4)
    frozen = {key: torch.zeros_like(value) for key, value in found.items()}
    score = {
        name: torch.tensor(adapter_accuracies(stacked, tensors, examples, tasks, SCALE)).mean().item()
        for name, tensors in {"mixed": found, "frozen": frozen}.items()
    }
    assert score["mixed"] > score["frozen"] + 0.05


def test_a_language_model_is_mixed_by_the_loss_of_its_words() -> None:
    stacked = tiny_language_pipeline()[0].stacked
    examples = stacked.encode(["a b", "c a", "b c", "x y", "z y", "a x"])
    tasks = [
        Task(("p", "q"), ((0,), (3,)), ((1, 2), (4, 5)), "all"),
        Task(("q", "r", "s"), ((1, 2), (4,), (5,)), ((0,), (3,), (3,)), "all"),
    ]
    adapters = random_adapters(stacked.layout, 20)
    found = mixed_adapters(stacked, adapters, examples, tasks, SCALE)
    for index, task in enumerate(tasks):
        rows = torch.tensor([row for members in task.support for row in members])
        labels = torch.tensor([label for label, members in enumerate(task.support) for _ in members])
        losses = []
        for weight in (0.0, 1.0):
            own = {key: weight * value[index : index + 1] for key, value in found.items()}
            logits = stacked.logits(own, examples[rows], words=stacked.word_heads([task.classes]))[0]
            losses.append(torch.nn.functional.cross_entropy(logits, labels).item())
        assert losses[1] < losses[0]


def test_the_number_of_adapters_is_checked(setting) -> None:
    stacked, examples, _, sampler = setting
    adapters = {key: torch.zeros(5, *shape) for key, shape in stacked.layout.lora_shapes.items()}
    with pytest.raises(ValueError, match="num_adapters is 20: expected 1 to 5, the number of training adapters"):
        mixed_adapters(stacked, adapters, examples, [sampler[0]], SCALE)
