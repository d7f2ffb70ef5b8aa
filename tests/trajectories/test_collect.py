"""What a trajectory holds: its steps, SAM, views, accuracies; and the start that all of them share."""

import dataclasses

import numpy as np
import pytest
import torch
from model_families import llama_config, text_tasks
from tiny import tiny_backbone, tiny_language_model, tiny_lora_config

from mcdi_hf import AdapterLayout, StackedLora, TrajectorySettings, collect_trajectories, train_shared_adapter
from mcdi_hf.data.augmentation import augmented_views
from mcdi_hf.trajectories.shared import initial_adapter


@pytest.fixture(scope="module")
def setting():
    texts, tasks = text_tasks()
    backbone = tiny_backbone()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config()))
    return stacked, texts, stacked.encode(texts), tasks


def shifted_start(layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """A start whose `lora_B` is not zero, as that of a trained shared adapter."""
    return {key: value + 0.1 * torch.randn(value.shape) for key, value in initial_adapter(layout, seed=3).items()}


def collect(setting, start: dict[str, torch.Tensor], tasks: list, numbers: list[int], settings: TrajectorySettings):
    stacked, _, examples, _ = setting
    return collect_trajectories(
        stacked, examples, start, stacked.features_of_all(start, examples), tasks, numbers, settings
    )


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


def test_sam_is_sam_on_each_task_alone(setting) -> None:
    """A stack of four gives each task what it gets in a stack of its own: the step uphill has a norm for each."""
    stacked, _, _, tasks = setting
    start = shifted_start(stacked.layout)
    settings = TrajectorySettings(num_steps=4, num_targets=1, batch_size=4, learning_rate=0.02, sam_rho=0.5)
    together = collect(setting, start, tasks, list(range(4)), settings)
    plain = dataclasses.replace(settings, sam_rho=0.0)
    for number, task in enumerate(tasks):
        (alone,) = collect(setting, start, [task], [number], settings)
        np.testing.assert_allclose(together[number]["weights"], alone["weights"], rtol=1e-4, atol=1e-4)
        (without,) = collect(setting, start, [task], [number], plain)
        assert np.abs(without["weights"][-1] - alone["weights"][-1]).max() > 1e-2


def test_views_are_drawn_and_only_the_plain_one_is_judged(setting) -> None:
    stacked, texts, plain, tasks = setting
    views = stacked.encode(augmented_views(texts, 3, seed=0), num_views=3)
    assert len(views) == len(texts) and len(views.counts) == 3 * len(texts)
    torch.testing.assert_close(views[torch.arange(4)], plain[torch.arange(4)], rtol=1e-5, atol=1e-6)
    start = shifted_start(stacked.layout)
    # A learning rate of next to nothing: what is judged is the start, which must not depend on the views.
    settings = TrajectorySettings(num_steps=2, num_targets=1, batch_size=6, learning_rate=1e-12)
    features = stacked.features_of_all(start, plain)
    found = [
        collect_trajectories(stacked, one, start, features, tasks, list(range(4)), settings) for one in (plain, views)
    ]
    assert [row["accuracy"] for row in found[0]] == [row["accuracy"] for row in found[1]]
    assert [row["losses"] for row in found[0]] != [row["losses"] for row in found[1]]


def test_training_accuracy_is_that_of_the_last_segment(setting) -> None:
    """Letters tell the classes of a task apart: trained long enough, all are right, which they are not at the start."""
    stacked, _, _, tasks = setting
    start = shifted_start(stacked.layout)
    first = TrajectorySettings(num_steps=1, num_targets=1, batch_size=16, learning_rate=0.05, imprint_scale=0.0)
    long = dataclasses.replace(first, num_steps=60, num_targets=3)
    early, late = (collect(setting, start, tasks, list(range(4)), one) for one in (first, long))
    assert [row["train_accuracy"] for row in late] == [1.0] * 4
    for row, task in zip(early, tasks):
        assert row["losses"] == pytest.approx([np.log(len(task.classes))]) and row["train_accuracy"] < 1


def test_a_first_adapter_is_as_peft_makes_it(setting) -> None:
    layout = setting[0].layout
    tensors, again, other = (initial_adapter(layout, seed) for seed in (0, 0, 1))
    for key, shape in layout.lora_shapes.items():
        assert tensors[key].shape == (1, *shape) and tensors[key].equal(again[key])
        if "lora_B" in key:
            assert (tensors[key] == 0).all()
        else:  # uniform within 1 / sqrt(16)
            assert 0.2 < tensors[key].abs().max() <= 0.25 and not tensors[key].equal(other[key])


def test_divergence_is_an_error(setting) -> None:
    stacked, _, _, tasks = setting
    settings = TrajectorySettings(num_steps=3, num_targets=1, batch_size=4, learning_rate=1e30)
    start = initial_adapter(stacked.layout)
    with pytest.raises(ValueError, match="diverged"):
        collect(setting, start, tasks[:1], [0], settings)


@pytest.mark.parametrize("make, config", [(tiny_backbone, tiny_lora_config()), (tiny_language_model, llama_config())])
def test_the_shared_adapter_learns(make, config) -> None:
    backbone = make()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, config, backbone.head_name))
    texts, tasks = text_tasks(80)
    # For a language model the classes are always the same words, so that there is something to learn.
    tasks = [task for task in tasks if task.group == "north" and len(task.classes) == 2] * 60
    losses = []
    tensors, scale = train_shared_adapter(
        stacked, stacked.encode(texts), tasks, 60, 0.02, on_step=lambda step, loss: losses.append(loss)
    )
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert tensors.keys() == stacked.layout.lora_shapes.keys()
    assert (abs(scale - 10) > 0.1) == (not backbone.is_causal_lm)  # learnt along, where there is one


def test_language_model_classes_need_words_that_differ() -> None:
    backbone = tiny_language_model()
    weight, bias = backbone.verbalizer(("b", "a"))
    ids = backbone.processor.convert_tokens_to_ids(["b", "a"])
    assert weight.equal(backbone.model.lm_head.weight[ids]) and bias.equal(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\['one', 'two'\] begin with the same token"):
        backbone.verbalizer(("a", "one", "two"))
