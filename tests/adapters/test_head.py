"""The head that comes for free is ridge regression."""

import math

import pytest
import torch

from mcdi_hf.adapters.head import RidgeHead, head_logits


RIDGE = RidgeHead(log_scale=0.7, log_ridge=-1.0, log_ridge_shots=0.4, feature_norm=2.5)
LABELS = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [1, 0, 0, 1, 1, -1, -1]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def features(width: int = 5) -> torch.Tensor:
    """Seven examples: more than features, or fewer."""
    return torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0))


def single(task: int, width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A task of the batch without its padding: features, labels, classes."""
    known = LABELS[task] >= 0
    return features(width)[task, known], LABELS[task, known], int(MASK[task].sum())


def ridge_by_hand(own: torch.Tensor, targets: torch.Tensor, shots: float) -> torch.Tensor:
    """`W` of the primal normal equations, `(X^T X + lambda I)^-1 X^T Y`, of features that are centred already."""
    ridge = math.exp(-1.0 + 0.4 * math.log(shots))
    return torch.linalg.solve(own.T @ own + ridge * torch.eye(own.shape[1]), own.T @ targets)


@pytest.mark.parametrize("width", [5, 9])
@pytest.mark.parametrize("task", [0, 1])
def test_it_is_ridge_regression_on_centred_features_whatever_the_padding(task: int, width: int) -> None:
    own, labels, classes = single(task, width)
    own, mean = own / 2.5, own.mean(dim=0) / 2.5
    targets = torch.nn.functional.one_hot(labels, classes) - 1 / classes
    weight = ridge_by_hand(own - mean, targets, len(labels) / classes)
    queries = torch.randn(2, 4, width)
    expected = math.exp(0.7) * (queries[task] / 2.5 - mean) @ weight
    logits = head_logits(queries, *RIDGE(features(width), LABELS, MASK), MASK)
    torch.testing.assert_close(logits[task, :, :classes], expected, rtol=1e-4, atol=1e-5)
    assert (logits[1, :, 2] == float("-inf")).all()


def test_the_head_of_padding_is_zero() -> None:
    weight, bias = RIDGE(features(), LABELS, MASK)
    assert not weight[1, 2].any() and not bias[1, 2]


@pytest.mark.parametrize("width", [5, 9])
@pytest.mark.parametrize("task", [0, 1])
def test_left_out_logits_are_those_under_the_head_of_the_others(task: int, width: int) -> None:
    found = RIDGE.left_out_logits(features(width), LABELS, MASK)
    own, labels, classes = single(task, width)
    own = own / 2.5 - own.mean(dim=0) / 2.5
    targets = torch.nn.functional.one_hot(labels, classes) - 1 / classes
    for out in range(len(labels)):
        rest = torch.arange(len(labels)) != out
        weight = ridge_by_hand(own[rest], targets[rest], len(labels) / classes)
        expected = math.exp(0.7) * own[out] @ weight
        torch.testing.assert_close(found[task, out, :classes], expected, rtol=1e-3, atol=1e-4)


def test_a_class_of_one_example_is_not_left_out() -> None:
    labels = torch.tensor([[0, 1, 1]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    own = features()[:1, :3]
    expected = head_logits(own, *RIDGE(own, labels, mask), mask)
    torch.testing.assert_close(RIDGE.left_out_logits(own, labels, mask), expected, rtol=1e-4, atol=1e-5)


def test_permuted_classes_permute_the_head() -> None:
    order = torch.tensor([2, 0, 1])
    plain = RIDGE(features()[:1], LABELS[:1], MASK[:1])
    permuted = RIDGE(features()[:1], order.argsort()[LABELS[:1]], MASK[:1])
    for one, other in zip(plain, permuted):
        torch.testing.assert_close(other, one[:, order], rtol=1e-4, atol=1e-5)


def test_gradients_go_through_the_solve() -> None:
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -1.0, 0.4)]
    own = features()[:1].requires_grad_()
    weight, bias = RidgeHead(*scalars, feature_norm=2.5)(own, LABELS[:1], MASK[:1])
    (weight.square().sum() + bias.square().sum()).backward()
    assert own.grad.abs().min() > 0 and all(scalar.grad.abs() > 0 for scalar in scalars)
    step = 1e-3
    moved = [own.detach() + step * sign * own.grad / own.grad.norm() for sign in (1, -1)]
    high, low = (sum(part.square().sum() for part in RIDGE(one, LABELS[:1], MASK[:1])) for one in moved)
    assert ((high - low) / (2 * step)).item() == pytest.approx(own.grad.norm().item(), rel=1e-2)


def test_half_precision_around_it_changes_nothing() -> None:
    plain = RIDGE(features(), LABELS, MASK)
    left_out = RIDGE.left_out_logits(features(), LABELS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        found = RIDGE(features(), LABELS, MASK)
        assert RIDGE.left_out_logits(features(), LABELS, MASK).equal(left_out)
    assert all(one.equal(other) for one, other in zip(plain, found))
