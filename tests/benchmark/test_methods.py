"""What every method makes of tasks, against what it says it does."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from fold import Fold
from methods import METHODS
from methods.controls import noised, pca_samples
from methods.gradient_lora import all_data_tasks, lora_accuracies
from methods.logistic import fit_logistic
from methods.nearest import nearest_adapters
from methods.reptile_start import INNER_STEPS, TASKS_PER_STEP, adapted, reptile_start
from safetensors.torch import load_file
from splits import Split, sources_below
from timing import median_seconds
from tiny import assert_close, random_adapters, seeded

from mcdi_hf import Task, TrajectorySettings, collect_trajectories, train_shared_adapter
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


@pytest.fixture
def split(fold: Fold) -> Split:
    return fold.split("validation")


def texts_of(split: Split, classes: tuple[tuple[int, ...], ...]) -> list[list[str]]:
    return [split.inputs(list(rows)) for rows in classes]


def dense_accuracy(fold: Fold, split: Split, tensors: dict, task: Task, scale: float) -> float:
    """Nearest class mean under one adapter, class by class and in Euclidean distances."""
    seen = [fold.stacked.features_of_all(tensors, fold.stacked.encode(own)) for own in texts_of(split, task.support)]
    means, right = torch.stack([own.mean(dim=0) for own in seen]), []
    for label, own in enumerate(texts_of(split, task.query)):
        features = fold.stacked.features_of_all(tensors, fold.stacked.encode(own))
        right += (torch.cdist(features, means).argmin(dim=1) == label).tolist()
    return float(np.mean(right))


def mixed_tasks(split: Split) -> list[Task]:
    """Of several sizes, so that a stack has padding."""
    return [*split.tasks("3x2", 0, 3), *split.tasks("2x1", 1, 2), *split.tasks("2x5", 2, 2)]


def test_adapters_are_judged_as_each_would_be_alone(fold: Fold, split: Split) -> None:
    tasks = mixed_tasks(split)
    tensors = random_adapters(fold.codec.layout, len(tasks))
    found = split.imprinted({key: tensors[key] for key in fold.codec.layout.lora_shapes}, tasks, 2.0)
    for index, task in enumerate(tasks):
        own = {key: value[index : index + 1] for key, value in tensors.items()}
        assert found[index] == pytest.approx(dense_accuracy(fold, split, own, task, 2.0))
    assert len(set(found)) > 2


def test_one_adapter_for_all_is_judged_as_as_many_of_it(fold: Fold, split: Split) -> None:
    tasks, adapters = mixed_tasks(split), random_adapters(fold.codec.layout, 1, seed=3)
    own = {key: adapters[key] for key in fold.codec.layout.lora_shapes}
    found = split.free(split.features("one", own), tasks, 2.0)
    repeated = {key: value.repeat(len(tasks), 1, 1) for key, value in own.items()}
    assert found == pytest.approx(split.imprinted(repeated, tasks, 2.0)) and len(set(found)) > 2


def test_a_support_is_seen_in_views_and_a_query_as_it_is(fold: Fold, smoke: argparse.Namespace) -> None:
    sources = sources_below(smoke.data_root, fold.config["sources"])
    views = Split("validation", fold.stacked, fold.codec, 3, sources, ["blue"], ["train", "test"])
    plain, (task,) = fold.split("validation"), views.tasks("2x2", 0, 1)
    assert plain.tasks("2x2", 0, 1) == [task]
    support, count = views.support([task]), len(plain.examples)
    rows = [row for rows in task.support for row in rows]
    assert support.rows[0].tolist() == [row + view * count for view in range(3) for row in rows]
    mean, codec = views.features("mean adapter", {}), fold.codec.mean_adapter()
    assert_close(mean[0], plain.features("mean adapter", codec)[0])  # the first view is the example as it is
    assert_close(support.features[0], mean[:, rows].mean(dim=0))
    assert not torch.allclose(support.features, plain.support([task]).features, atol=1e-3)
    assert views.query([task]).rows.equal(plain.query([task]).rows)


def test_what_is_free_is_what_it_says(fold: Fold, split: Split) -> None:
    tasks = split.tasks("2x1", 5, 6)
    expected = {
        "frozen + imprinted head": fold.frozen,
        "mean of the training adapters": fold.codec.mean_adapter(),
    }
    for name, tensors in expected.items():
        found = METHODS[name].accuracies(split, fold, tasks, 0, None)
        assert found == pytest.approx([dense_accuracy(fold, split, tensors, task, 1.0) for task in tasks])


def test_the_shared_adapter_is_trained_once_for_a_seed(fold: Fold, split: Split) -> None:
    method, tasks = METHODS["one shared adapter"], split.tasks("2x1", 5, 2)
    first = method.accuracies(split, fold, tasks, 0, None)
    path = fold.generator.folder / "shared-0.safetensors"
    written = path.stat().st_mtime_ns
    assert method.accuracies(split, fold, tasks, 0, None) == first and path.stat().st_mtime_ns == written


def test_the_nearest_is_the_one_of_the_highest_cosine(fold: Fold, split: Split) -> None:
    tasks, mean = split.tasks("2x2", 3, 4), fold.codec.mean_adapter()
    found = nearest_adapters(split, fold, tasks)
    places = []
    for support in fold.training.supports:
        rows = torch.tensor([row for rows in support for row in rows[:2].tolist()])
        places.append(fold.stacked.features_of_all(mean, fold.training.examples, rows).mean(dim=0))
    for index, task in enumerate(tasks):
        texts = [text for own in texts_of(split, task.support) for text in own]
        own = fold.stacked.features_of_all(mean, fold.stacked.encode(texts)).mean(dim=0)
        best = max(range(6), key=lambda place: torch.cosine_similarity(own, places[place], dim=0).item())
        assert all(value[index].equal(fold.training.adapters[key][best]) for key, value in found.items())


def test_the_logistic_fit_is_the_minimum() -> None:
    """At the minimum the gradient of what scikit-learn minimises is zero, for tasks of any size in one stack."""
    features = torch.randn(2, 12, 4, generator=seeded())
    labels = torch.tensor([[0, 1, 2] * 4, [0, 1] * 3 + [-1] * 6])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weight, bias = (value.requires_grad_() for value in fit_logistic(features, labels, mask, penalty=0.5))
    for task, (ways, count) in enumerate([(3, 12), (2, 6)]):
        logits = features[task, :count] @ weight[task, :ways].T + bias[task, :ways]
        loss = torch.nn.functional.cross_entropy(logits, labels[task, :count], reduction="sum")
        loss = loss + 0.25 * weight[task].square().sum()
        for gradient in torch.autograd.grad(loss, [weight, bias]):
            assert gradient.abs().max() < 3e-3
    assert weight[1, 2].abs().max() == 0  # the class that is padding


def test_logistic_regression_learns_from_the_support_and_is_asked_about_the_query(fold: Fold, split: Split) -> None:
    method = METHODS["frozen + logistic regression"]
    (task,) = split.tasks("2x5", 0, 1)
    learnt = Task(task.classes, task.support, task.support, task.group)
    turned = Task(task.classes, task.support[::-1], task.support, task.group)
    assert method.accuracies(split, fold, [learnt, turned], 0, 0.01) == pytest.approx([1.0, 0.0])


def test_logistic_regression_looks_at_no_test_example_but_its_tasks(fold: Fold) -> None:
    """What else there is to test on does not move a task's answer."""
    method, split = METHODS["frozen + logistic regression"], fold.split("test")
    (task,) = split.tasks("3x1", 0, 1)
    before = method.accuracies(split, fold, [task], 0, 1.0)
    features, others = split.features("frozen", fold.frozen), torch.ones(len(split.examples), dtype=torch.bool)
    others[[row for rows in (*task.support, *task.query) for row in rows]] = False
    kept = features[:, others].clone()
    try:
        features[:, others] += 100 * torch.randn(kept.shape, generator=seeded())
        assert others.any() and method.accuracies(split, fold, [task], 0, 1.0) == before
    finally:
        features[:, others] = kept


def test_the_shared_adapter_has_the_means_of_the_generators_start(fold: Fold, split: Split) -> None:
    """In the smoke run that is 2 steps of one shot: the adapter is the one that was trained by hand."""
    sampler = fold.training.sampler((1, 1), 5, 7)
    tensors, scale = train_shared_adapter(fold.stacked, fold.training.examples, sampler, 2, 1e-3, seed=7)
    METHODS["one shared adapter"].accuracies(split, fold, split.tasks("2x1", 5, 2), 7, None)
    found = load_file(fold.generator.folder / "shared-7.safetensors")
    assert found.pop("scale").item() == pytest.approx(scale) and found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert_close(found[key], value)


def test_gradient_lora_is_that_of_each_task_alone_and_learns(fold: Fold, split: Split) -> None:
    tasks = split.tasks("3x2", 4, 3)
    together = lora_accuracies(split, fold, tasks, 1, 6, 0.05)
    features = split.features("frozen", fold.frozen)[0]
    settings = TrajectorySettings(6, 1, 6, 0.05, imprint_scale=fold.frozen_scale, seed=1)
    for number, task in enumerate(tasks):
        rows = collect_trajectories(fold.stacked, split.examples, fold.frozen, features, [task], [number], settings)
        assert together[number] == pytest.approx(rows[0]["accuracy"])
    asked = [Task(task.classes, task.support, task.support, task.group) for task in tasks]
    assert lora_accuracies(split, fold, asked, 1, 60, 0.05) == [1.0, 1.0, 1.0]


def test_settings_are_few_and_of_the_sizes(fold: Fold, split: Split) -> None:
    assert METHODS["gradient LoRA, equal shots"].settings(split, fold, 1) == [[1, 1e-3], [2, 1e-3]]
    ((steps, rate),) = METHODS["gradient LoRA, equal time"].settings(split, fold, 2)
    assert steps >= 1 and rate == 1e-3
    slow, (task,) = METHODS["gradient LoRA, equal shots"], split.tasks("3x5", 0, 1)
    assert slow.episodes(fold.sizes, task) == 2 and METHODS["Mc-Di"].episodes(fold.sizes, task) == 3


def test_all_data_is_every_example_of_the_classes_but_the_query(split: Split) -> None:
    tasks, rows = split.tasks("2x2", 0, 4), split.rows[0]  # eight examples a class
    queried = [Task(one.classes, one.support, tuple(own[:1] for own in one.support), one.group) for one in tasks]
    for task, whole in zip(tasks, all_data_tasks(tasks, rows, most=100), strict=True):
        assert (whole.classes, whole.query, whole.group) == (task.classes, task.query, task.group)
        for name, shots, support in zip(task.classes, task.support, whole.support):
            assert support[:2] == shots and {*support} == set(rows.groups[task.group][name].tolist())
    for task, part in zip(queried, all_data_tasks(queried, rows, most=5)):
        assert all(
            len(own) == len(set(own)) == 5 and own[:2] == shots for own, shots in zip(part.support, task.support)
        )
        others = [row for own in part.support for row in own[2:]]
        assert not {row for own in task.query for row in own} & set(others)
    assert all_data_tasks(tasks, rows, most=1) == tasks


def test_a_step_of_reptile_goes_towards_the_mean_end_of_its_tasks(fold: Fold) -> None:
    sampler, examples, layout = fold.training.sampler((5, 5), 1, 3), fold.training.examples, fold.codec.layout

    def end(start: dict, numbers: range) -> dict:
        features = fold.stacked.features_of_all(start, examples)
        tasks = [sampler[number] for number in numbers]
        rows = adapted(fold, examples, start, features, tasks, INNER_STEPS, 3)
        ends = [split_weights(torch.from_numpy(row["weights"][-1:]), len(row["classes"]), layout) for row in rows]
        return {key: torch.cat([one[key] for one in ends]).mean(dim=0, keepdim=True) for key in start}

    fold.sizes = replace(fold.sizes, reptile_steps=2)
    found, first = reptile_start(fold, 3), initial_adapter(layout, 3)
    second = end(first, range(TASKS_PER_STEP))  # a whole step
    third = end(second, range(TASKS_PER_STEP, 2 * TASKS_PER_STEP))  # half a step
    for key, value in found.items():
        assert_close(value, (second[key] + third[key]) / 2)
        assert not value.equal(first[key])


def test_noise_is_as_wide_as_the_training_adapters_are_spread() -> None:
    reference = {"a": torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]]), "b": torch.full((2, 3), 7.0)}
    # Differences from the mean: -1, 1, 0, 0 in "a", none in "b".
    tensors = {"a": torch.full((20_000, 1, 2), 5.0), "b": torch.full((20_000, 3), 5.0)}
    found = noised(tensors, reference, 2.0, seeded())
    assert found["b"].equal(tensors["b"])
    assert found["a"].mean().item() == pytest.approx(5.0, abs=0.03)
    assert found["a"].std(dim=0).flatten().tolist() == pytest.approx([2.0 * 0.5**0.5] * 2, rel=0.02)


def test_samples_have_the_mean_and_the_covariance_of_the_training_adapters() -> None:
    generator = seeded(3)
    training = {
        "one.lora_A": 2 + 0.5 * torch.randn(6, 2, 3, generator=generator),
        "one.lora_B": torch.randn(6, 4, 1, generator=generator) * torch.tensor([[5.0], [1.0], [0.1], [0.0]]) - 1,
    }
    found = pca_samples(training, 40_000, noise=seeded())
    assert {key: value.shape[1:] for key, value in found.items()} == {"one.lora_A": (2, 3), "one.lora_B": (4, 1)}
    given, made = (torch.cat([value.flatten(1) for value in own.values()], dim=1) for own in (training, found))
    scale = torch.cov(given.T).diag().max().item()
    torch.testing.assert_close(made.mean(dim=0), given.mean(dim=0), rtol=0, atol=0.03 * scale**0.5)
    torch.testing.assert_close(torch.cov(made.T), torch.cov(given.T), rtol=0, atol=0.03 * scale)


def test_calls_are_timed_in_turn_after_one_that_is_not_counted() -> None:
    order = []
    found = median_seconds({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == ["a", "b"] * 4 and set(found) == {"a", "b"} and min(found.values()) >= 0
