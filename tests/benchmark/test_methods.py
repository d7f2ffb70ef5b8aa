"""What every method makes of tasks, against what it says it does."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fold import Fold
from methods import METHODS
from methods.controls import noised
from methods.gradient_lora import all_data_tasks, lora_accuracies, start_of
from methods.metric import learn_metric, training_features
from methods.nearest import nearest_coefficients
from methods.reptile import reptile_start
from safetensors.torch import load_file
from splits import Split, sources_below
from timing import median_seconds
from tiny import assert_close, random_adapters, seeded

from mcdi_hf import Task, train_shared_adapter
from mcdi_hf.adapters.head import RidgeHead
from mcdi_hf.adapters.logistic import fit_logistic
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.pipelines.refinement import train_on_support
from mcdi_hf.trajectories.shared import SharedStart, initial_adapter


@pytest.fixture
def split(fold: Fold) -> Split:
    return fold.split("validation")


def texts_of(split: Split, classes: tuple[tuple[int, ...], ...]) -> list[list[str]]:
    return [split.inputs(list(rows)) for rows in classes]


def dense_accuracy(fold: Fold, split: Split, tensors: dict, task: Task) -> float:
    """Ridge regression under one adapter, by the normal equations, text by text."""
    seen = [fold.stacked.features_of_all(tensors, fold.stacked.encode(own)) for own in texts_of(split, task.support)]
    features, head = torch.cat(seen).double() / fold.codec.head.feature_norm, fold.codec.head
    labels = torch.tensor([label for label, own in enumerate(seen) for _ in own])
    ways, mean, right = len(seen), features.mean(dim=0), []
    targets = torch.nn.functional.one_hot(labels, ways) - 1 / ways
    ridge = np.exp(head.log_ridge + head.log_ridge_shots * np.log(len(labels) / ways))
    centred = features - mean
    system = centred.T @ centred + ridge * torch.eye(centred.shape[1])
    weight = torch.linalg.solve(system, centred.T @ targets.double())
    for label, own in enumerate(texts_of(split, task.query)):
        asked = fold.stacked.features_of_all(tensors, fold.stacked.encode(own)).double() / head.feature_norm
        right += (((asked - mean) @ weight).argmax(dim=1) == label).tolist()
    return float(np.mean(right))


def mixed_tasks(split: Split) -> list[Task]:
    """Of several sizes, so that a stack has padding."""
    return [*split.tasks("3x2", 0, 3), *split.tasks("2x1", 1, 2), *split.tasks("2x5", 2, 2)]


def test_adapters_are_judged_as_each_would_be_alone(fold: Fold, split: Split) -> None:
    tasks = mixed_tasks(split)
    tensors = random_adapters(fold.codec.layout, len(tasks))
    found = split.headed({key: tensors[key] for key in fold.codec.layout.lora_shapes}, tasks)
    for index, task in enumerate(tasks):
        own = {key: value[index : index + 1] for key, value in tensors.items()}
        assert found[index] == pytest.approx(dense_accuracy(fold, split, own, task))
    assert len(set(found)) > 2


def test_one_adapter_for_all_is_judged_as_as_many_of_it(fold: Fold, split: Split) -> None:
    tasks, adapters = mixed_tasks(split), random_adapters(fold.codec.layout, 1, seed=3)
    own = {key: adapters[key] for key in fold.codec.layout.lora_shapes}
    found = split.free(split.features("one", own), tasks, fold.codec.head)
    repeated = {key: value.repeat(len(tasks), 1, 1) for key, value in own.items()}
    assert found == pytest.approx(split.headed(repeated, tasks)) and len(set(found)) > 2


def test_a_support_is_seen_in_views_and_a_query_as_it_is(fold: Fold, smoke: argparse.Namespace) -> None:
    sources = sources_below(smoke.data_root, fold.config["sources"])
    views = Split("validation", fold.stacked, fold.codec, 3, sources, ["blue"], ["train", "test"])
    plain, (task,) = fold.split("validation"), views.tasks("2x2", 0, 1)
    assert plain.tasks("2x2", 0, 1) == [task]
    support, count = views.support([task]), len(plain.examples)
    rows = [row for rows in task.support for row in rows]
    assert support.rows[0].tolist() == [row + view * count for view in range(3) for row in rows]
    shared = fold.codec.shared_adapter()
    seen = views.features("shared adapter", shared)
    assert_close(seen[0], plain.features("shared adapter", shared)[0])  # the first view is the example as it is
    assert not torch.allclose(seen[1], seen[0], atol=1e-3)
    assert views.query([task]).rows.equal(plain.query([task]).rows)


def test_what_is_free_is_what_it_says(fold: Fold, split: Split) -> None:
    tasks = split.tasks("2x1", 5, 6)
    expected = {
        "frozen + closed-form head": fold.frozen,
        "shared adapter": fold.codec.shared_adapter(),
    }
    for name, tensors in expected.items():
        found = METHODS[name].accuracies(split, fold, tasks, 0, None)
        assert found == pytest.approx([dense_accuracy(fold, split, tensors, task) for task in tasks])


def test_the_equal_shared_adapter_is_trained_once(fold: Fold, split: Split) -> None:
    method, tasks = METHODS["equal shared adapter"], split.tasks("2x1", 5, 2)
    first = method.accuracies(split, fold, tasks, 0, None)
    path = fold.generator.folder / "equal_shared.safetensors"
    written = path.stat().st_mtime_ns
    assert method.accuracies(split, fold, tasks, 0, None) == first and path.stat().st_mtime_ns == written


def test_the_nearest_is_the_one_of_the_highest_cosine(fold: Fold, split: Split) -> None:
    tasks, mean = split.tasks("2x2", 3, 4), fold.codec.shared_adapter()
    found = nearest_coefficients(split, fold, tasks)
    places = []
    for support in fold.training.supports:
        rows = torch.tensor([row for rows in support for row in rows[:2].tolist()])
        places.append(fold.stacked.features_of_all(mean, fold.training.examples, rows).mean(dim=0))
    for index, task in enumerate(tasks):
        texts = [text for own in texts_of(split, task.support) for text in own]
        own = fold.stacked.features_of_all(mean, fold.stacked.encode(texts)).mean(dim=0)
        near = torch.stack([torch.cosine_similarity(own, place, dim=0) for place in places])
        # the smoke run has four training tasks, two of which are there twice
        best = fold.training.coefficients[near >= near.max() - 1e-5]
        assert any(found[index].equal(one) for one in best)


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


def test_the_equal_adapter_has_the_means_of_the_generators_start(fold: Fold, split: Split) -> None:
    """In the smoke run that is 2 steps of 2 tasks: the adapter is the one that was trained by hand."""
    sampler, examples = fold.training.sampler, fold.training.examples
    start = SharedStart(fold.stacked, examples, sampler, [], 2, 2, 1e-3, own_share=0.0, proposed_share=0.0)
    tensors, head, _ = train_shared_adapter(start)
    METHODS["equal shared adapter"].accuracies(split, fold, split.tasks("2x1", 5, 2), 7, None)
    found = load_file(fold.generator.folder / "equal_shared.safetensors")
    assert found.pop("log_ridge").item() == pytest.approx(head.log_ridge)
    for key, value in tensors.items():
        assert_close(found[key], value)


def test_gradient_lora_is_that_of_each_task_alone_and_learns(fold: Fold, split: Split) -> None:
    tasks, start = split.tasks("3x2", 4, 3), start_of(fold, "nothing", 1)
    together = lora_accuracies(split, fold, tasks, start, 6, 0.05)
    for number, task in enumerate(tasks):
        (alone,) = lora_accuracies(split, fold, [task], start, 6, 0.05)
        assert together[number] == pytest.approx(alone)
    asked = [Task(task.classes, task.support, task.support, task.group) for task in tasks]
    assert lora_accuracies(split, fold, asked, start, 60, 0.05) == [1.0, 1.0, 1.0]


def test_gradient_lora_of_hardly_any_step_is_its_start(fold: Fold, split: Split) -> None:
    tasks = split.tasks("3x2", 4, 6)
    expected = METHODS["equal shared adapter"].accuracies(split, fold, tasks, 0, None)
    assert METHODS["gradient LoRA, shared start"].accuracies(split, fold, tasks, 0, [1, 1e-9]) == pytest.approx(
        expected
    )
    frozen = METHODS["frozen + closed-form head"].accuracies(split, fold, tasks, 0, None)
    assert METHODS["gradient LoRA"].accuracies(split, fold, tasks, 0, [1, 1e-9]) == pytest.approx(frozen)


def test_reptile_goes_to_the_mean_of_what_tasks_are_trained_to(fold: Fold, tmp_path: Path) -> None:
    """The smoke run has two steps: one outer step, which goes all the way, of one task and its query, too."""
    fold.generator = replace(fold.generator, folder=tmp_path)
    (task,) = fold.training.sampler.stack(0, 1)
    task = replace(task, support=tuple(shots + query for shots, query in zip(task.support, task.query)))
    support = replace(SupportBatch.from_tasks([task]), examples=fold.training.examples)
    own = fold.whole(initial_adapter(fold.codec.layout), fold.codec.head, support)
    trained = train_on_support(fold.stacked, own, support, 5, 5e-3)
    for key, value in reptile_start(fold).items():
        assert_close(value, trained[key])
        assert not value.equal(own[key])


def test_a_metric_is_learnt_on_the_training_tasks(fold: Fold, split: Split) -> None:
    """Of the features that it is judged by; the identity is what the frozen backbone is with the same head."""
    learnt = learn_metric(fold)
    identity = torch.eye(len(learnt["metric"]))
    assert not learnt["metric"].equal(identity) and torch.allclose(learnt["metric"], identity, atol=0.01)
    rows = torch.arange(5)
    assert_close(
        training_features(fold, rows), fold.stacked.features_of_all(fold.frozen, fold.training.examples, rows)
    )
    (task,), features = split.tasks("3x2", 0, 1), split.features("frozen", fold.frozen)
    fold.kept("metric", lambda: learnt)
    head = RidgeHead(**{name: learnt[name].item() for name in asdict(RidgeHead())})
    expected = split.free(features @ learnt["metric"], [task], head)
    assert METHODS["learnt metric on frozen features"].accuracies(split, fold, [task], 0, None) == expected


def test_the_mean_adapter_is_one_for_all(fold: Fold, split: Split) -> None:
    tasks, mean = split.tasks("2x2", 1, 3), fold.training.coefficients.mean(dim=0, keepdim=True)
    found = METHODS["mean training adapter"].accuracies(split, fold, tasks, 0, None)
    assert found == pytest.approx(split.headed(fold.codec.matrices(mean.repeat(3, 1, 1)), tasks))


def test_settings_are_few_and_of_the_sizes(fold: Fold, split: Split) -> None:
    assert METHODS["gradient LoRA"].settings(split, fold, 1) == [[1, 1e-3], [2, 1e-3]]
    ((steps, rate),) = METHODS["gradient LoRA, equal time"].settings(split, fold, 2)
    assert steps >= 1 and rate == 1e-3
    slow, (task,) = METHODS["gradient LoRA"], split.tasks("3x5", 0, 1)
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


def test_noise_is_as_wide_as_the_training_adapters_are_spread() -> None:
    # Differences from the mean: -1, 1, 0, 0 in the first token, none in the second.
    reference = torch.tensor([[[1.0, 4.0], [7.0, 7.0]], [[3.0, 4.0], [7.0, 7.0]]])
    plain = torch.full((20_000, 2, 2), 5.0)
    found = noised(plain, reference, 2.0, seeded())
    assert found[:, 1].equal(plain[:, 1])
    assert found[:, 0].mean().item() == pytest.approx(5.0, abs=0.03)
    assert found[:, 0].std(dim=0).tolist() == pytest.approx([2.0 * 0.5**0.5] * 2, rel=0.02)


def test_calls_are_timed_in_turn_after_one_that_is_not_counted() -> None:
    order = []
    found = median_seconds({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3)
    assert order == ["a", "b"] * 4 and set(found) == {"a", "b"} and min(found.values()) >= 0
