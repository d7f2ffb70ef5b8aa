import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_language_model, tiny_lora_config

from mcdi_hf import AdapterCodec
from mcdi_hf.training.batches import TrajectoryBatches
from mcdi_hf.trajectories.dataset import final_adapters, load_trajectories, split_weights
from mcdi_hf.trajectories.folder import TrajectoryFolder


WAYS, PER_CLASS, TARGETS, SCALE = (2, 4, 3), 6, 3, 7.0
SHOTS, ROWS = (1, 3), 12


@pytest.fixture(scope="module")
def codec() -> AdapterCodec:
    backbone = tiny_backbone()
    return AdapterCodec.from_backbone(backbone, tiny_lora_config(), backbone.feature_dim + 4, imprint_scale=SCALE)


@pytest.fixture
def batches(codec: AdapterCodec) -> TrajectoryBatches:
    return make_batches(codec)


def make_batches(codec: AdapterCodec, shots: tuple[int, int] = SHOTS, condition_noise: float = 0.0):
    """Made-up trajectories of tasks with different numbers of classes, over a source with a feature a row."""
    random = np.random.default_rng(0)
    layout, order = codec.layout, random.permutation(sum(WAYS) * PER_CLASS).tolist()
    rows = []
    for task, ways in enumerate(WAYS):
        support = [[order.pop() for _ in range(PER_CLASS)] for _ in range(ways)]
        width = layout.width(ways)
        weights = random.standard_normal((1 + TARGETS, width), dtype=np.float32)
        names = [f"class {task} {label}" for label in range(ways)]
        row = {"task": task, "group": "all", "classes": names, "support": support, "steps": [0, 1, 2, 3]}
        rows.append(row | {"losses": [3.0, 2.0, 1.0], "train_accuracy": 0.5, "accuracy": 0.5, "weights": weights})
    with tempfile.TemporaryDirectory() as folder:
        TrajectoryFolder.create(Path(folder) / "made_up", layout, max(WAYS), {}).append(rows)
        trajectories, _ = load_trajectories(str(Path(folder) / "made_up"))
    codec.fit_matrices(final_adapters(trajectories, layout))
    codec.head_std.copy_(torch.tensor([0.5, 2.0, 0.3]))
    features = torch.randn(sum(WAYS) * PER_CLASS, layout.feature_dim, generator=torch.Generator().manual_seed(1))
    return TrajectoryBatches(trajectories, features, codec, shots, ROWS, condition_noise)


def test_shapes_and_masks(batches: TrajectoryBatches, codec: AdapterCodec) -> None:
    assert len(batches) == len(WAYS)
    for index, ways in enumerate(WAYS):
        batch = batches.draw(index, np.random.default_rng(2))
        tokens = codec.num_lora_tokens + ways
        assert batch.targets.shape == (ROWS, TARGETS, tokens, codec.layout.token_dim)
        assert batch.support.features.shape == (*batch.support.labels.shape, codec.layout.feature_dim)
        assert batch.support.class_mask.shape == (ROWS, ways) and batch.support.class_mask.all()
        assert torch.equal(batch.token_mask, codec.token_mask(batch.support.class_mask))
        assert not batch.targets.masked_select(~batch.token_mask[:, None]).any()


def test_each_row_shows_a_few_examples_of_the_tasks_own_classes(batches: TrajectoryBatches) -> None:
    support = batches.trajectories[1]["support"]
    batch = batches.draw(1, np.random.default_rng(2))
    drawn, shots = [], []
    for features, labels in zip(batch.support.features, batch.support.labels):
        own = labels >= 0
        shots.append(int(own.sum()) // WAYS[1])
        assert labels[own].tolist() == [label for label in range(WAYS[1]) for _ in range(shots[-1])]
        rows = torch.cdist(features[own], batches.features).argmin(dim=1)
        assert torch.equal(batches.features[rows], features[own])
        assert len(set(rows.tolist())) == len(rows)
        assert all(row in support[label] for row, label in zip(rows.tolist(), labels[own].tolist()))
        drawn.append(tuple(rows.tolist()))
    assert set(shots) == {1, 2, 3} and batch.support.labels.shape[1] == max(shots) * WAYS[1]
    assert len(set(drawn)) == ROWS


def test_targets_are_residuals_to_each_rows_own_imprinted_head(
    batches: TrajectoryBatches, codec: AdapterCodec
) -> None:
    batch = batches.draw(1, np.random.default_rng(3))
    weights = torch.from_numpy(np.asarray(batches.trajectories[1]["weights"][1:]))  # the start is no target
    expected = split_weights(weights, WAYS[1], codec.layout)
    for features, labels, targets in zip(batch.support.features, batch.support.labels, batch.targets):
        means = torch.stack([features[labels == label].mean(dim=0) for label in range(WAYS[1])])
        centre = means.mean(dim=0)
        bias = -SCALE / 2 * (means.square().sum(dim=1) - centre.square().sum())
        head = [value.expand(TARGETS, *value.shape) for value in (SCALE * (means - centre), bias)]
        found = codec.decode(targets, tuple(head))
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    head_tokens = batch.targets[:, :, codec.num_lora_tokens :]
    assert all(not torch.allclose(head_tokens[0], other) for other in head_tokens[1:])


def test_the_same_random_numbers_draw_the_same_batch(batches: TrajectoryBatches) -> None:
    first, again, other = (batches.draw(0, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.targets.equal(again.targets) and first.support.features.equal(again.support.features)
    assert first.support.rows.equal(again.support.rows) and not (
        first.support.rows.shape == other.support.rows.shape and first.support.rows.equal(other.support.rows)
    )


def test_noise_is_on_the_condition_alone_and_in_units_of_its_spread(
    batches: TrajectoryBatches, codec: AdapterCodec
) -> None:
    noisy = make_batches(codec, condition_noise=2.0).draw(1, np.random.default_rng(6))
    clean = batches.draw(1, np.random.default_rng(6))
    assert torch.equal(noisy.targets, clean.targets) and torch.equal(noisy.support.labels, clean.support.labels)
    spread = (batches.features - batches.features.mean(dim=0)).square().mean().sqrt().item()
    assert (noisy.support.features - clean.support.features).std().item() == pytest.approx(2 * spread, rel=0.1)


def test_the_scales_of_the_head_make_its_residual_one_in_the_mean_square(codec: AdapterCodec) -> None:
    batches = make_batches(codec, shots=(PER_CLASS, PER_CLASS))  # every draw is the whole support
    batches.fit_head(np.random.default_rng(0))
    heads = [
        batches.draw(index, np.random.default_rng(1)).targets[0, -1, codec.num_lora_tokens :]
        for index in range(len(WAYS))
    ]
    rows = torch.cat(heads)
    width = codec.layout.feature_dim
    assert rows[:, :width].square().mean().item() == pytest.approx(1, rel=1e-4)
    for place in (width, width + 1):  # the bias and the gain
        assert rows[:, place].square().mean().item() == pytest.approx(1, rel=1e-4)


def test_without_a_head_every_row_has_the_same_targets() -> None:
    backbone = tiny_language_model()
    config = tiny_lora_config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    codec = AdapterCodec.from_backbone(backbone, config, token_dim=20)
    batches = make_batches(codec)
    before = codec.head_std.clone()
    batches.fit_head(np.random.default_rng(0))
    assert codec.head_std.equal(before)
    for index, ways in enumerate(WAYS):
        batch = batches.draw(index, np.random.default_rng(2))
        assert batch.support.class_mask.shape == (ROWS, ways)
        assert batch.targets.shape == (ROWS, TARGETS, codec.num_lora_tokens, 20)
        assert batch.token_mask.shape == (ROWS, codec.num_lora_tokens, 20)
        weights = torch.from_numpy(np.asarray(batches.trajectories[index]["weights"][1:]))
        for targets in batch.targets:
            found = codec.decode(targets)
            expected = split_weights(weights, ways, codec.layout)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_more_shots_than_examples_are_refused(codec: AdapterCodec) -> None:
    with pytest.raises(ValueError, match=f"has {PER_CLASS} examples, fewer than {PER_CLASS + 1} shots"):
        make_batches(codec, shots=(1, PER_CLASS + 1))
