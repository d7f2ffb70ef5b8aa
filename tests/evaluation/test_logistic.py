import pytest
import torch

from mcdi_hf import Task
from mcdi_hf.evaluation.logistic import fit_logistic, logistic_accuracies


def test_the_fit_is_the_minimum() -> None:
    """At the minimum the gradient of what scikit-learn minimises is zero, for tasks of any size in one stack."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 12, 4, generator=generator)
    labels = torch.tensor([[0, 1, 2] * 4, [0, 1] * 3 + [-1] * 6])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    weight, bias = (value.requires_grad_() for value in fit_logistic(features, labels, mask, penalty=0.5))
    for task, (ways, count) in enumerate([(3, 12), (2, 6)]):
        logits = features[task, :count] @ weight[task, :ways].T + bias[task, :ways]
        loss = torch.nn.functional.cross_entropy(logits, labels[task, :count], reduction="sum")
        loss = loss + 0.25 * weight[task].square().sum()
        for gradient in torch.autograd.grad(loss, [weight, bias]):
            assert gradient.abs().max() < 1e-3
    assert weight[1, 2].abs().max() == 0  # the class that is padding


def test_it_separates_what_can_be_separated() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0], [0.1, 0.8], [2.0, 0.3], [0.2, 3.0]])
    task = Task(("right", "up"), ((0, 1), (2, 3)), ((4,), (5,)), "all")
    turned = Task(("up", "right"), ((2, 3), (0, 1)), ((4,), (5,)), "all")
    assert logistic_accuracies(features, [task, turned]) == [pytest.approx(1.0), pytest.approx(0.0)]
