"""Gradient steps from where generation ended: against PEFT, and task by task."""

import pytest
import torch
from kinds import SUPPORTS, TEXTS, Made
from tiny import assert_close, class_logits, seeded, tiny_pipeline

from mcdi_hf import MCDiPipeline


# The classes contradict each other, so that no loss is zero: of zero Adam would make the signs of rounding.
TASKS = [{"u": ["a b", "c"], "v": ["c", "a b", "y"], "w": ["y"]}, {"one": ["a", "b y"], "two": ["b y"]}]


@pytest.fixture(scope="module")
def bert() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


def distance(found: dict, expected: dict, start: dict) -> float:
    """How far one training ended from another, as a share of the way that they went."""
    # The queries of tiny models saturate: their gradients are rounding, of which Adam makes whole steps.
    keys = [key for key in start if ".query." not in key and ".q_proj." not in key]
    gap, way = (
        sum((one[key] - other[key]).square().sum() for key in keys)
        for one, other in ((found, expected), (expected, start))
    )
    return float((gap / way).sqrt())


@pytest.mark.parametrize("made", SUPPORTS, indirect=True)
def test_refined_as_peft_would_train(made: Made) -> None:
    pipe, backbone, support = made
    support = {label: [*own, *support["p"][:2]] for label, own in support.items()}
    output = pipe(support, generator=seeded(), num_inference_steps=3)
    (start,), (refined,) = output.adapters, pipe.refine(output, num_steps=3, learning_rate=1e-2).adapters
    model = start.load_into(backbone.classifier(num_labels=3))
    parameters = {}
    for name, parameter in model.named_parameters():
        key = name.replace(".default", "").replace(".modules_to_save", "")
        if key in start.tensors and ".original_module" not in name:
            parameters[key] = parameter.requires_grad_()
    assert parameters.keys() == start.tensors.keys()
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    examples = [one for own in support.values() for one in own]
    labels = torch.tensor([c for c, own in enumerate(support.values()) for _ in own])
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        logits = class_logits(model, backbone, start.labels, examples)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert (start.details.refine_steps, refined.details.refine_steps) == (0, 3)
    expected = {key: value.detach() for key, value in parameters.items()}
    assert distance(refined.tensors, expected, start.tensors) < 2e-3


@pytest.mark.parametrize("batch_size", [64, 1])
def test_tasks_are_refined_apart(bert: MCDiPipeline, batch_size: int) -> None:
    settings = {"num_inference_steps": 3}
    output = bert(TASKS, generator=[seeded(0), seeded(1)], batch_size=batch_size, **settings)
    both = bert.refine(output, num_steps=4).adapters
    for seed, task in enumerate(TASKS):
        alone = bert(task, generator=seeded(seed), **settings)
        (expected,) = bert.refine(alone, num_steps=4).adapters
        assert both[seed].labels == expected.labels and both[seed].details == expected.details
        # Adam makes whole steps of gradients that are rounding alone; a task that saw another would be at 1
        assert distance(both[seed].tensors, expected.tensors, alone.adapters[0].tensors) < 0.1


def test_what_was_selected_is_refined(bert: MCDiPipeline) -> None:
    selected = bert.select(bert(TEXTS, generator=seeded(), num_inference_steps=3, num_candidates=2))
    (refined,) = bert.refine(selected, num_steps=2, learning_rate=1e-9).adapters
    assert_close(refined.tensors, selected.adapters[0].tensors)
    assert refined.details.chosen == selected.adapters[0].details.chosen is not None
    (moved,) = bert.refine(selected, num_steps=2).adapters
    assert not any(torch.allclose(moved.tensors[key], value) for key, value in refined.tensors.items())


def test_steps_are_counted_and_forgotten_with_what_they_made(bert: MCDiPipeline) -> None:
    output = bert(TEXTS, generator=seeded(), num_inference_steps=3)
    twice = bert.refine(bert.refine(output, num_steps=2), num_steps=3)
    assert twice.adapters[0].details.refine_steps == 5
    assert bert.select(twice).adapters[0].details.refine_steps == 0  # chosen among what was drawn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"learning_rate": 1e3}, "learning_rate is 1000.0: expected a number above 0, 1 at most"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_wrong_settings_are_refused(bert: MCDiPipeline, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert.refine(bert(TASKS, num_inference_steps=1), **settings)
