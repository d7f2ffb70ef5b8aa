"""SAM against hand calculations."""

import torch

from mcdi_hf.trajectories.collect import sam_perturbation


def test_sam_steps_as_far_for_a_small_gradient_as_for_a_large_one() -> None:
    gradient = torch.tensor([[[3.0, 4.0]], [[0.0, 1e-3]], [[0.0, 0.0]]])  # norms 5, 0.001 and 0
    expected = torch.tensor([[[0.3, 0.4]], [[0.0, 0.5]], [[0.0, 0.0]]])
    torch.testing.assert_close(sam_perturbation(gradient, 0.5), expected)


def test_a_gradient_whose_squares_are_zero_steps_no_further() -> None:
    gradient = torch.tensor([[3e-30, 4e-30], [3e-42, 4e-42]])
    steps = sam_perturbation(gradient, 0.5)
    torch.testing.assert_close(steps[0], torch.tensor([0.3, 0.4]))
    assert steps[1].norm() <= 0.5  # below the smallest normal number it fades


def test_the_step_goes_where_the_loss_rises_most() -> None:
    """On a quadratic, SAM's gradient is H (x + rho H x / |H x|), by hand."""
    hessian = torch.diag(torch.tensor([4.0, 1.0]))
    point = torch.tensor([[1.0, 2.0]])
    gradient = point @ hessian  # (4, 2), of norm sqrt(20)
    step = sam_perturbation(gradient, 0.1)
    expected = torch.tensor([[4.0, 2.0]]) * 0.1 / 20**0.5
    torch.testing.assert_close(step, expected)
    torch.testing.assert_close((point + step) @ hessian, gradient + expected @ hessian)
