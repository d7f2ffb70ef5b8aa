"""A stack of tasks is as many runs of peft and Adam, and its rows survive the disk."""

import numpy as np
import pytest
import torch
from tiny import in_peft, tiny_backbone, tiny_dataset, tiny_lora_config

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    LabelledRows,
    StackedLora,
    TrajectorySettings,
    collect_trajectories,
    load_trajectories,
    train_shared_adapter,
)
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.evaluation.gradient import tokenize
from mcdi_hf.trajectories.dataset import build_dataset, split_weights
from mcdi_hf.trajectories.shared import initial_adapter, rows_and_labels


@pytest.fixture(scope="module")
def setting():
    backbone, config = tiny_backbone(), tiny_lora_config()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, config))
    dataset = tiny_dataset()
    texts = dataset["text"][:]
    sampler = EpisodeSampler(LabelledRows(dataset, "label", "domain"), (2, 4), (4, 6), 2, seed=1)
    return backbone, config, stacked, texts, stacked.encode(texts), sampler


def test_target_steps_for_any_number_of_steps() -> None:
    assert TrajectorySettings(30, 3).target_steps == [10, 20, 30]
    assert TrajectorySettings(20, 3).target_steps == [7, 13, 20]
    assert TrajectorySettings(5, 1).target_steps == [5]
    with pytest.raises(ValueError, match="num_targets is 4"):
        TrajectorySettings(3, 4)


def test_a_stack_equals_sequential_runs_of_peft_and_adam(setting) -> None:
    backbone, config, stacked, texts, examples, sampler = setting
    settings = TrajectorySettings(num_steps=7, num_targets=3, batch_size=6, learning_rate=0.02, imprint_scale=5.0)
    tasks = [sampler[number] for number in range(5)]
    assert len({len(task.classes) for task in tasks}) > 1
    start = initial_adapter(stacked.layout, seed=3)
    rows = collect_trajectories(stacked, examples, start, tasks, list(range(5)), settings)
    for number, (task, row) in enumerate(zip(tasks, rows)):
        ways = len(task.classes)
        support, labels = rows_and_labels(task.support)
        features = stacked.features_of_all(start, examples, support)
        means = class_means(features[None], labels[None], ways)
        head = imprint_head(means, 5.0, torch.ones(1, ways, dtype=torch.bool))
        model = in_peft(backbone, config, start | dict(zip(stacked.layout.head_keys, head)), 0)
        parameters = {
            name.replace(".default", "").replace(".modules_to_save", ""): value
            for name, value in model.named_parameters()
            if value.requires_grad
        }
        optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=7)
        random = np.random.default_rng((0, number))
        kept, losses = [], []
        for step in range(1, 8):
            pick = random.choice(len(support), size=6, replace=len(support) < 6)
            batch = tokenize(backbone, [texts[index] for index in support[pick]])
            loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step in (2, 5, 7):
                kept.append({key: value.detach().clone() for key, value in parameters.items()})
                losses.append(loss.item())
        found = split_weights(torch.from_numpy(row["weights"]), ways, stacked.layout)
        assert row["steps"] == [2, 5, 7] and row["classes"] == list(task.classes)
        assert row["losses"] == pytest.approx(losses, rel=1e-3, abs=1e-5)
        for target, expected in enumerate(kept):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                torch.testing.assert_close(found[key][target], value, rtol=1e-4, atol=1e-4)
        query, query_labels = rows_and_labels(task.query)
        with torch.no_grad():
            said = model(**tokenize(backbone, [texts[index] for index in query])).logits.argmax(dim=-1)
        assert row["accuracy"] == pytest.approx((said == query_labels).float().mean().item())


def test_trajectories_survive_the_disk_and_another_layout_is_refused(setting, tmp_path) -> None:
    backbone, _, stacked, _, examples, sampler = setting
    settings = TrajectorySettings(num_steps=3, num_targets=3, batch_size=4)
    tasks = [sampler[number] for number in range(3)]
    rows = collect_trajectories(stacked, examples, initial_adapter(stacked.layout), tasks, [0, 1, 2], settings)
    build_dataset(rows, stacked.layout, 4, {"made": "here"}).save_to_disk(str(tmp_path / "all"))
    loaded, description = load_trajectories(str(tmp_path / "all"), stacked.layout)
    assert description["made"] == "here"
    for row, back in zip(rows, loaded):
        assert back["weights"].shape == (3, stacked.layout.numel + 4 * 17)
        tensors = split_weights(torch.from_numpy(back["weights"]), len(row["classes"]), stacked.layout)
        flat = torch.cat([value.flatten(1) for value in tensors.values()], dim=1)
        assert flat.equal(torch.from_numpy(row["weights"]))
        assert [list(members) for members in back["support"]] == row["support"]
    other = AdapterLayout.from_model(backbone.model, tiny_lora_config(r=3))
    with pytest.raises(ValueError, match="another layout.*modules"):
        load_trajectories(str(tmp_path / "all"), other)


def test_a_first_adapter_is_as_peft_makes_it(setting) -> None:
    layout = setting[2].layout
    tensors, again, other = (initial_adapter(layout, seed) for seed in (0, 0, 1))
    for key, shape in layout.lora_shapes.items():
        assert tensors[key].shape == (1, *shape) and tensors[key].equal(again[key])
        if "lora_B" in key:
            assert (tensors[key] == 0).all()
        else:  # uniform within 1 / sqrt(16)
            assert 0.2 < tensors[key].abs().max() <= 0.25 and not tensors[key].equal(other[key])


def test_divergence_is_an_error(setting) -> None:
    _, _, stacked, _, examples, sampler = setting
    settings = TrajectorySettings(num_steps=3, num_targets=1, batch_size=4, learning_rate=1e30)
    with pytest.raises(ValueError, match="diverged"):
        collect_trajectories(stacked, examples, initial_adapter(stacked.layout), [sampler[0]], [0], settings)


def test_the_shared_adapter_learns(setting) -> None:
    _, _, stacked, _, examples, sampler = setting
    losses = []
    tensors, scale = train_shared_adapter(
        stacked, examples, sampler, 60, 0.02, on_step=lambda step, loss: losses.append(loss)
    )
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert tensors.keys() == stacked.layout.lora_shapes.keys() and abs(scale - 10) > 0.1  # learnt along
