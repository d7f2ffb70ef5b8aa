"""What a trajectory holds: its steps, SAM, views, accuracies."""

import dataclasses

import numpy as np
import pytest
import torch
from model_families import llama_config, text_tasks
from tiny import random_codec, tiny_backbone, tiny_language_model, tiny_lora_config

from mcdi_hf import AdapterCodec, StackedLora, Task, TrajectorySettings, collect_trajectories
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.trajectories.collect import TaskStack


SETTINGS = TrajectorySettings(num_steps=4, num_targets=2, shots=(1, 3), queries=2, learning_rate=0.05)
Setting = tuple[StackedLora, AdapterCodec, EncodedExamples, list[Task]]


def make(backbone, config) -> Setting:
    codec = random_codec(backbone, config)
    stacked, (texts, tasks) = StackedLora(backbone, codec.layout), text_tasks(12)
    two_way = [dataclasses.replace(task, query=task.query) for task in tasks if len(task.classes) == 2]
    long = [task for task in two_way if min(map(len, task.support)) >= 5]
    return stacked, codec, stacked.encode(texts), long


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make(tiny_backbone(), tiny_lora_config())


def test_target_steps_for_any_number_of_steps() -> None:
    assert TrajectorySettings(30, 3).target_steps == [10, 20, 30]
    assert TrajectorySettings(20, 3).target_steps == [7, 13, 20]
    assert TrajectorySettings(5, 1).target_steps == [5]
    for steps in range(1, 40):
        for targets in range(1, steps + 1):
            found = TrajectorySettings(steps, targets).target_steps
            assert len(set(found)) == targets and found[-1] == steps and found[0] >= 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 3, "num_targets": 4}, "num_targets is 4: expected 1 to num_steps"),
        ({"lr_scheduler": "step"}, "lr_scheduler is 'step': expected one of linear"),
        ({"sam_rho": -1.0}, "sam_rho is -1.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectorySettings(**settings)


@pytest.mark.parametrize("sam_rho", [0.0, 0.5])
def test_a_stack_gives_each_task_what_it_gets_alone(setting: Setting, sam_rho: float) -> None:
    stacked, codec, examples, tasks = setting
    settings = dataclasses.replace(SETTINGS, sam_rho=sam_rho)
    numbers = list(range(3, 3 + len(tasks)))
    together = collect_trajectories(stacked, codec, examples, tasks, numbers, 2, settings)
    assert len(together) > 1
    for number, task, row in zip(numbers, tasks, together):
        (alone,) = collect_trajectories(stacked, codec, examples, [task], [number], 2, settings)
        np.testing.assert_allclose(row["weights"], alone["weights"], rtol=1e-3, atol=1e-3)
        assert row["task"] == number and row["classes"] == list(task.classes) and row["steps"] == [0, 2, 4]
        assert row["accuracy"] == pytest.approx(alone["accuracy"])


def test_a_trajectory_is_adam_on_the_query_of_its_draws(setting: Setting) -> None:
    """The same in a plain loop, with the loss written out."""
    stacked, codec, examples, tasks = setting
    (row,) = collect_trajectories(stacked, codec, examples, tasks[:1], [7], 2, SETTINGS)
    stack, random = TaskStack(stacked, codec, examples, tasks[:1], 2, SETTINGS), np.random.default_rng((0, 7))
    optimizer = torch.optim.Adam([stack.coefficients], lr=0.05)
    kept = [np.ones(codec.filled.numel())]
    for step in range(1, 5):
        support, query = stack.draw(step, [random])
        assert not set(support.rows.flatten().tolist()) & set(query.rows.flatten().tolist())
        tensors = codec.complete(codec.matrices(stack.coefficients), support, stacked)
        loss = torch.nn.functional.cross_entropy(stacked.logits(tensors, query)[0], query.labels[0]) / np.log(2)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - (step - 1) / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (2, 4):
            kept.append(stack.coefficients.detach().flatten().numpy().copy())
            assert row["losses"][len(kept) - 2] == pytest.approx(loss.item(), rel=1e-3)
    np.testing.assert_allclose(row["weights"], np.stack(kept), rtol=1e-3, atol=1e-3)


def test_the_steps_of_a_wide_task_tell_some_of_its_classes_apart(setting: Setting) -> None:
    stacked, codec, examples, tasks = setting
    wide = dataclasses.replace(
        tasks[0], classes=("a", "b", "c"), support=(*tasks[0].support, tasks[1].support[0]), query=tasks[0].query * 2
    )
    stack = TaskStack(stacked, codec, examples, [wide, tasks[1]], 2, SETTINGS)
    randoms, seen = [np.random.default_rng(number) for number in (0, 1)], set()
    for step in range(1, 9):
        support, query = stack.draw(step, randoms)
        assert support.class_mask.shape == (2, 2)
        assert query.classes == support.classes
        for task, rows, labels, names in zip((wide, tasks[1]), support.rows, support.labels, support.classes):
            for row, label in zip(rows.tolist(), labels.tolist()):
                assert row in task.support[task.classes.index(names[label])]
        seen.add(support.classes[0])
    assert {name for names in seen for name in names} == {"a", "b", "c"}


def test_views_are_drawn_and_only_the_plain_one_is_judged(setting: Setting) -> None:
    stacked, codec, plain, tasks = setting
    views = stacked.encode(augmented_views(text_tasks()[0], 3, seed=0), num_views=3)
    # A learning rate of next to nothing: what is judged is the start, which must not depend on the views.
    settings = dataclasses.replace(SETTINGS, learning_rate=1e-12)
    numbers = list(range(len(tasks)))
    found = [collect_trajectories(stacked, codec, one, tasks, numbers, 2, settings) for one in (plain, views)]
    assert [row["accuracy"] for row in found[0]] == [row["accuracy"] for row in found[1]]
    assert [row["losses"] for row in found[0]] != [row["losses"] for row in found[1]]
    assert all(row["accuracy"] == row["start_accuracy"] for row in found[0])


def test_the_loss_falls_along_a_trajectory(setting: Setting) -> None:
    stacked, codec, examples, tasks = setting
    long = dataclasses.replace(SETTINGS, num_steps=60, num_targets=6, shots=(3, 3))
    rows = collect_trajectories(stacked, codec, examples, tasks, list(range(len(tasks))), 2, long)
    losses = np.array([row["losses"] for row in rows])
    assert losses[:, -2:].mean() < 0.9 * losses[:, :2].mean()


def test_divergence_is_an_error(setting: Setting) -> None:
    stacked, codec, examples, tasks = setting
    settings = dataclasses.replace(SETTINGS, learning_rate=float("inf"))
    with pytest.raises(ValueError, match="diverged"):
        collect_trajectories(stacked, codec, examples, tasks[:1], [0], 2, settings)


def test_a_stack_refuses_tasks_that_it_cannot_draw_from(setting: Setting) -> None:
    stacked, codec, examples, tasks = setting
    wide = dataclasses.replace(tasks[0], classes=("a", "b", "c"), support=(*tasks[0].support, tasks[0].support[0]))
    with pytest.raises(ValueError, match=r"A stack of 3 ways has tasks of \[2\] classes"):
        collect_trajectories(stacked, codec, examples, [tasks[0], wide], [0, 1], 3, SETTINGS)
    few = dataclasses.replace(tasks[0], support=tuple(rows[:4] for rows in tasks[0].support))
    with pytest.raises(ValueError, match="A class has 4 support rows: expected 5"):
        collect_trajectories(stacked, codec, examples, [few], [0], 2, SETTINGS)


def test_a_language_model_has_trajectories_without_heads() -> None:
    stacked, codec, examples, tasks = make(tiny_language_model(), llama_config())
    rows = collect_trajectories(stacked, codec, examples, tasks[:2], [0, 1], 2, SETTINGS)
    assert np.abs(rows[0]["weights"][-1] - 1).max() > 0.01


def test_language_model_classes_need_words_that_differ() -> None:
    backbone = tiny_language_model()
    weight, bias = backbone.verbalizer(("b", "a"))
    ids = backbone.processor.convert_tokens_to_ids(["b", "a"])
    assert weight.equal(backbone.model.lm_head.weight[ids]) and bias.equal(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\['one', 'two'\] begin with the same token"):
        backbone.verbalizer(("a", "one", "two"))
