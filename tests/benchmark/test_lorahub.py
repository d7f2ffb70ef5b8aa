"""The mix of training adapters: its search, and what it comes to on a tiny backbone."""

import pytest
import torch
from fold import Fold
from methods.lorahub import mix, mixed_coefficients, support_losses
from splits import Split
from tiny import assert_close

from mcdi_hf.data.episodes import task_losses


@pytest.fixture
def split(fold: Fold) -> Split:
    return fold.split("validation")


def test_a_mix_sums_by_its_own_tasks_weights() -> None:
    value = torch.arange(12.0).reshape(2, 3, 2, 1)  # two tasks, three adapters
    found = mix(value, torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]]))
    assert found.tolist() == [[[-4.0], [-4.0]], [[4.0], [4.5]]]


def test_the_loss_of_an_example_is_that_under_a_head_of_the_others(fold: Fold, split: Split) -> None:
    support = split.support(split.tasks("2x3", 0, 2))
    features = fold.stacked.features(fold.codec.shared_adapter(2), support.inputs())
    logits = fold.codec.head.left_out_logits(features, support.labels, support.class_mask)
    ones = torch.ones(2, *fold.codec.filled.shape)
    assert_close(support_losses(fold, ones, support), task_losses(logits, support.labels))


def test_weights_of_zero_are_tried_first_and_are_the_frozen_backbone(fold: Fold, split: Split) -> None:
    support = split.support(split.tasks("2x2", 0, 3))
    assert not mixed_coefficients(fold, support, 1, [(0, number) for number in range(3)]).any()


def test_the_search_never_ends_above_where_it_starts_and_repeats_itself(fold: Fold, split: Split) -> None:
    support, seeds = split.support(split.tasks("2x4", 0, 4)), [(0, number) for number in range(4)]
    found = mixed_coefficients(fold, support, 40, seeds)
    started, ended = (support_losses(fold, own, support) for own in (torch.zeros_like(found), found))
    assert (ended <= started + 1e-6).all() and (ended < started).any()
    assert found.equal(mixed_coefficients(fold, support, 40, seeds))
    alone = mixed_coefficients(fold, support[1:2], 40, seeds[1:2])
    torch.testing.assert_close(found[1:2], alone, rtol=1e-2, atol=1e-2)
