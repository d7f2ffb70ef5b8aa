"""The mix of training adapters: its loss, its search, and what they come to on a tiny backbone."""

from dataclasses import replace

import pytest
import torch
from methods.lorahub import mix, mixed_adapters, support_losses
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
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.data.episodes import SupportBatch, task_losses


SCALE = 1.0


@pytest.fixture(scope="module")
def setting() -> tuple[StackedLora, EncodedExamples, EpisodeSampler]:
    """A backbone, its examples, and their tasks."""
    table, backbone = tiny_dataset(rows_per_class=12), tiny_backbone()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config()))
    rows = LabelledRows(table, "label", "domain")
    return stacked, stacked.encode(table["text"][:]), EpisodeSampler(rows, (2, 4), (1, 4), 5)


def supports(examples: EncodedExamples, tasks: list[Task]) -> SupportBatch:
    return replace(SupportBatch.from_tasks(tasks), examples=examples)


def losses_of(stacked: StackedLora, tensors: dict, support: SupportBatch) -> torch.Tensor:
    features = stacked.features(tensors, support.inputs())
    return support_losses(features, support.labels, support.class_mask, SCALE)


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
    stacked, examples, sampler = setting
    adapters = {key: random_adapters(stacked.layout, 5)[key] for key in stacked.layout.lora_shapes}
    support = supports(examples, [sampler[number] for number in range(3)])
    found = mixed_adapters(stacked, adapters, support, SCALE, 1, [(0, number) for number in range(3)])
    assert all(len(value) == 3 and not value.any() for value in found.values())


def test_the_search_never_ends_above_where_it_starts_and_neither_batches_nor_repeats_change_it(setting) -> None:
    stacked, examples, sampler = setting
    adapters = {key: random_adapters(stacked.layout, 30)[key] for key in stacked.layout.lora_shapes}
    support, seeds = supports(examples, [sampler[number] for number in range(5)]), [(0, number) for number in range(5)]
    found = mixed_adapters(stacked, adapters, support, SCALE, 40, seeds)
    started = losses_of(stacked, {key: torch.zeros_like(value) for key, value in found.items()}, support)
    ended = losses_of(stacked, found, support)
    assert (ended <= started + 1e-6).all() and (ended < 0.9 * started).sum() >= 3
    again = mixed_adapters(stacked, adapters, support, SCALE, 40, seeds)
    alone = mixed_adapters(stacked, adapters, support[1:2], SCALE, 40, seeds[1:2])
    other = mixed_adapters(stacked, adapters, support, SCALE, 40, [(1, number) for number in range(5)])
    for key, value in found.items():
        assert value.equal(again[key]) and not value.equal(other[key])
        torch.testing.assert_close(value[1:2], alone[key], rtol=1e-3, atol=1e-3)


def test_it_finds_the_one_adapter_that_was_trained_for_its_tasks(setting) -> None:
    stacked, examples, sampler = setting
    planted, _ = train_shared_adapter(stacked, examples, sampler, num_steps=100, learning_rate=1e-2, scale=SCALE)
    adapters = {key: torch.zeros(4, *value.shape[1:]) for key, value in planted.items()}
    for key, value in planted.items():
        adapters[key][2] = value[0]
    tasks = [task for task in (sampler[number] for number in range(1000, 1030)) if len(task.support[0]) > 1]
    seeds = [(0, number) for number in range(len(tasks))]
    found = mixed_adapters(stacked, adapters, supports(examples, tasks), SCALE, 40, seeds)
    zero = {key: torch.zeros_like(value) for key, value in found.items()}
    found, zero = (losses_of(stacked, own, supports(examples, tasks)).mean().item() for own in (found, zero))
    assert found < 0.95 * zero  # all others are zero


def test_a_language_model_is_mixed_by_the_loss_of_its_words() -> None:
    stacked = tiny_language_pipeline()[0].stacked
    examples = stacked.encode(["a b", "c a", "b c", "x y", "z y", "a x"])
    tasks = [
        Task(("p", "q"), ((0,), (3,)), ((1, 2), (4, 5)), "all"),
        Task(("q", "r", "s"), ((1, 2), (4,), (5,)), ((0,), (3,), (3,)), "all"),
    ]
    support, adapters = supports(examples, tasks), random_adapters(stacked.layout, 20)
    found = mixed_adapters(stacked, adapters, support, SCALE, 40, [(0, 0), (0, 1)])
    zero = {key: torch.zeros_like(value) for key, value in found.items()}
    mixed, frozen = (task_losses(stacked.logits(own, support), support.labels) for own in (found, zero))
    assert (mixed < frozen).all()
