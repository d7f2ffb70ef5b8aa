"""Training batches: the targets of a trajectory beside support sets that were seen once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_trajectories import codec_of, random_rows
from tiny import tiny_backbone

from mcdi_hf import StackedLora
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.batches import TrajectoryBatches


TEXTS = [f"{one} {two}" for one in "abcdefghij" for two in "klmnopqrst"]
WAYS, SHOTS, CONDITIONS, ROWS = (2, 3), (1, 2), 5, 12


def make(shots: tuple[int, int] = SHOTS, seed: int = 0) -> tuple[TrajectoryBatches, SimpleNamespace]:
    """The batches of made-up trajectories, and the data that they were made of."""
    codec = codec_of()
    stacked = StackedLora(tiny_backbone(), codec.layout)
    rows = random_rows(codec, range(3))
    columns = {name: [row[name] for row in rows] for name in ("classes", "support")}
    targets = torch.stack([torch.from_numpy(row["weights"][1:3]) for row in rows]).unflatten(2, codec.filled.shape)
    data = SimpleNamespace(
        trajectories=columns, codec=codec, stacked=stacked, targets=targets, train=stacked.encode(TEXTS)
    )
    return TrajectoryBatches(data, WAYS, shots, CONDITIONS, ROWS, seed), data


def test_every_row_has_the_targets_of_the_trajectory_and_a_support_set_of_its_task() -> None:
    batches, data = make()
    assert len(batches) == 3
    for index, (names, support) in enumerate(zip(data.trajectories["classes"], data.trajectories["support"])):
        batch = batches.draw(index, np.random.default_rng(2))
        assert batch.targets.shape == (ROWS, 2, *data.codec.filled.shape)
        for row in batch.targets:
            torch.testing.assert_close(1 + row * data.codec.std, data.targets[index])
        for rows, labels, mask, chosen in zip(
            batch.support.rows, batch.support.labels, batch.support.class_mask, batch.support.classes
        ):
            assert WAYS[0] <= len(chosen) == mask.sum() <= min(WAYS[1], len(names)) and len(set(chosen)) == len(chosen)
            for row, label in zip(rows.tolist(), labels.tolist()):
                assert label < 0 or row in support[names.index(chosen[label])]


def test_supports_are_seen_as_the_pipeline_sees_them_and_kept() -> None:
    batches, data = make()
    batch = batches.draw(1, np.random.default_rng(3)).support
    again = SupportBatch(batch.labels, batch.class_mask, batch.rows, examples=data.train)
    seen = see_support(data.stacked, data.codec.shared_adapter(), data.codec.head, again)
    known = (batch.labels >= 0).unsqueeze(-1)
    torch.testing.assert_close(batch.features * known, seen.features * known, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.gradients, seen.gradients, rtol=1e-3, atol=1e-6)


def test_few_conditions_of_many_shots_are_drawn_once_for_a_seed() -> None:
    batches, again, other = make()[0], make()[0], make(seed=1)[0]
    first, same = (one.draw(2, np.random.default_rng(4)) for one in (batches, again))
    assert first.support.rows.equal(same.support.rows)
    drawn = {
        tuple(rows)
        for number in range(9)
        for rows in batches.draw(2, np.random.default_rng(number)).support.rows.tolist()
    }
    assert 1 < len(drawn) <= CONDITIONS
    assert any(
        not one.rows.equal(two.rows)
        for one, two in zip(batches.conditions, other.conditions)
        if one.rows.shape == two.rows.shape
    )


def test_more_shots_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="has 2 examples, fewer than 3 shots"):
        make(shots=(1, 3))
