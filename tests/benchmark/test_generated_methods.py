"""What generators are shown, and that their adapters are judged as a user gets them."""

from types import SimpleNamespace

import pytest
import torch
from chain import along_chain
from fold import Fold
from methods import METHODS
from splits import Split
from tiny import seeded

from mcdi_hf import Task
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.trajectories.dataset import load_task_encoder


@pytest.fixture
def split(fold: Fold) -> Split:
    return fold.split("validation")


def given(split: Split, task: Task) -> dict[str, list[str]]:
    return {name: split.inputs(list(rows)) for name, rows in zip(task.classes, task.support)}


def right(fold: Fold, split: Split, adapter, task: Task) -> float:
    """The accuracy of an adapter in PEFT, one text at a time."""
    model, found = adapter.load_into(fold.backbone.classifier(num_labels=len(task.classes))), []
    for label, rows in enumerate(task.query):
        for text in split.inputs(list(rows)):
            with torch.no_grad():
                found.append(int(model(**fold.backbone.inputs([text])).logits.argmax()) == label)
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mc-Di", {"num_candidates": 8}),
        ("Mc-Di, chosen", {"num_candidates": 8}),
        ("Mc-Di, refined", {"num_candidates": 8}),
    ],
)
def test_accuracies_are_those_of_the_pipelines_adapters(fold: Fold, split: Split, name: str, settings: dict) -> None:
    pipe, tasks = fold.pipeline("Mc-Di", 0), split.tasks("2x2", 7, 5)
    output = pipe([given(split, task) for task in tasks], generator=seeded(0), **settings)
    output = {"Mc-Di, chosen": pipe.select, "Mc-Di, refined": pipe.refine}.get(name, lambda same: same)(output)
    expected = [right(fold, split, *one) for one in zip(output.adapters, tasks)]
    assert METHODS[name].accuracies(split, fold, tasks, 0, None) == pytest.approx(expected)
    assert name != "Mc-Di" or len(set(expected)) > 1


def test_the_chain_ends_at_what_the_pipeline_gives_in_as_many_steps(fold: Fold, split: Split) -> None:
    tasks, pipe = split.tasks("2x2", 7, 5), fold.pipeline("Mc-Di", 0)
    found = along_chain(split, fold, tasks, 0)
    assert set(found) == {"Mc-Di", "Mv-Di", "Tw-Di", "single level (OCD)"} and not along_chain(split, fold, [], 0)
    noise, steps = torch.Generator().manual_seed(0), pipe.scheduler.config.num_train_timesteps
    latents = torch.randn(5, *pipe.codec.filled.shape, generator=noise)
    support = split.support(tasks)
    tokens = pipe(support, num_inference_steps=steps, latents=latents, generator=noise, output_type="latent").adapters
    reached = {0: pipe.config.strength * latents, steps: tokens}
    for step, own in reached.items():
        expected = split.whole(pipe.decode_adapters(own, support), tasks)
        assert found["Mc-Di"][str(step)] == expected
    assert list(found["Mc-Di"]) == ["0", "5", "10", "15", "20"]


def test_another_tasks_condition_is_the_next_ones(fold: Fold, split: Split) -> None:
    tasks = split.tasks("2x1", 0, 18)  # more than a stack
    seen = METHODS["Mc-Di, another task's condition"].seen(split, fold, tasks, split.support(tasks))
    own = split.support(tasks)
    assert seen.rows.equal(own.rows.roll(-1, dims=0))
    assert seen.classes == [*own.classes[1:], own.classes[0]]


def test_another_attributes_condition_is_that_of_the_control_kind(fold: Fold, split: Split) -> None:
    method, tasks = METHODS["Mc-Di, another attribute's condition"], split.tasks("2x1", 0, 3)
    seen = method.seen(split, fold, tasks, split.support(tasks))
    assert seen.rows.equal(split.support(split.tasks("3x2", 0, 3)).rows) and method.fits(fold, 0)
    fold.config = {key: value for key, value in fold.config.items() if key != "control_kind"}
    assert not method.fits(fold, 0)


@torch.no_grad()
def test_the_hypernetwork_is_what_the_encoder_proposed_before_any_diffusion(fold: Fold, split: Split) -> None:
    method, tasks, codec = METHODS["hypernetwork"], split.tasks("2x2", 7, 18), fold.codec
    encoder = load_task_encoder(str(fold.generator.trajectories))
    torch.nn.init.normal_(encoder.downhill.weight, generator=seeded(1))  # two steps of training proposed nothing
    fold.once("task encoder", lambda: encoder)
    seen = see_support(fold.stacked, codec.shared_adapter(), codec.head, split.support(tasks))
    made = 1 + encoder(seen.features, seen.gradients, seen.labels, seen.class_mask).proposal
    assert (made - 1).abs().max() > 0.01
    assert method.accuracies(split, fold, tasks, 0, None) == split.headed(codec.matrices(made), tasks)
    assert not method.fits(SimpleNamespace(generator=SimpleNamespace(trajectories=None)), 0)


def test_shuffled_labels_are_as_many_on_the_same_examples(fold: Fold, split: Split) -> None:
    tasks = split.tasks("3x2", 0, 3)
    seen, own = METHODS["Mc-Di, shuffled labels"].seen(split, fold, tasks, split.support(tasks)), split.support(tasks)
    assert seen.rows.equal(own.rows) and not seen.labels.equal(own.labels)
    assert seen.labels.sort(dim=1).values.equal(own.labels.sort(dim=1).values)


def test_a_condition_of_noise_says_nothing_of_the_task(fold: Fold, split: Split) -> None:
    method, first, second = METHODS["Mc-Di, a condition of noise"], *(split.tasks("2x1", seed, 4) for seed in (0, 1))
    seen = [method.seen(split, fold, tasks, split.support(tasks)) for tasks in (first, second)]
    assert seen[0].rows.equal(seen[1].rows) and seen[0].examples is seen[1].examples
    assert seen[0].examples is not split.examples


def test_heads_are_of_the_tasks_own_support_whatever_is_seen(fold: Fold, split: Split) -> None:
    """At strength 0 nothing of the condition is left."""
    fold.pipeline("Mc-Di", 0).register_to_config(strength=0.0)
    tasks = split.tasks("2x1", 0, 5)
    expected = METHODS["shared adapter"].accuracies(split, fold, tasks, 0, None)
    for name in ("Mc-Di", "Mc-Di, another task's condition", "Mc-Di, shuffled labels", "Mc-Di, a condition of noise"):
        assert METHODS[name].accuracies(split, fold, tasks, 0, None) == pytest.approx(expected)


def test_an_objective_that_was_not_trained_does_not_fit(fold: Fold) -> None:
    assert METHODS["Mv-Di"].fits(fold, 0) and not METHODS["Mv-Di"].fits(fold, 1)
