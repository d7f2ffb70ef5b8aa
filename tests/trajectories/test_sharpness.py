"""SAM and power iteration against hand calculations and against PyTorch's own Hessian."""

import pytest
import torch
from tiny import random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterLayout, StackedLora
from mcdi_hf.trajectories.sharpness import largest_eigenvalues, sam_perturbation


def test_sam_steps_as_far_for_a_small_gradient_as_for_a_large_one() -> None:
    gradients = [torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[[4.0]], [[1e-3]], [[0.0]]])]
    first, second = sam_perturbation(gradients, 0.5)  # norms 5, 0.001 and 0
    torch.testing.assert_close(first, torch.tensor([[0.3, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(second, torch.tensor([[[0.4]], [[0.5]], [[0.0]]]))


def test_the_step_goes_where_the_loss_rises_most() -> None:
    """On a quadratic, SAM's gradient is H (x + rho H x / |H x|), by hand."""
    hessian = torch.diag(torch.tensor([4.0, 1.0]))
    point = torch.tensor([[1.0, 2.0]])
    gradient = point @ hessian  # (4, 2), of norm sqrt(20)
    (step,) = sam_perturbation([gradient], 0.1)
    expected = torch.tensor([[4.0, 2.0]]) * 0.1 / 20**0.5
    torch.testing.assert_close(step, expected)
    torch.testing.assert_close((point + step) @ hessian, gradient + expected @ hessian)


def test_eigenvalues_of_quadratics_one_for_each_task() -> None:
    spectra = torch.tensor([[5.0, 1.0, 0.5, 0.1], [-7.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    bases = torch.linalg.qr(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)))[0]
    hessians = bases @ torch.diag_embed(spectra) @ bases.mT

    def losses(tensors: list[torch.Tensor]) -> torch.Tensor:
        point = torch.cat([tensors[0].flatten(1), tensors[1]], dim=1)  # one task's numbers may lie in several tensors
        return torch.einsum("ni,nij,nj->n", point, hessians, point) / 2

    found = largest_eigenvalues(losses, [torch.zeros(3, 1, 2), torch.zeros(3, 2)], num_iterations=50)
    torch.testing.assert_close(found, torch.tensor([5.0, -7.0, 0.0]), rtol=1e-4, atol=1e-5)


def test_eigenvalues_of_a_real_stack_are_those_of_the_full_hessian() -> None:
    backbone = tiny_backbone()
    layout = AdapterLayout.from_model(backbone.model, tiny_lora_config(r=1, layers_to_transform=[2]))
    stacked = StackedLora(backbone, layout)
    inputs = stacked.encode(["a b c", "x y", "q", "m n o p"] * 2)[torch.arange(8)]
    labels = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    tensors = random_adapters(layout, 2)

    def losses(values: list[torch.Tensor]) -> torch.Tensor:
        logits = stacked.logits(dict(zip(tensors, values)), inputs)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)

    found = largest_eigenvalues(losses, list(tensors.values()), num_iterations=60)
    sizes = [value[0].numel() for value in tensors.values()]
    for index in range(2):

        def loss(flat: torch.Tensor) -> torch.Tensor:
            own = [part.view_as(value[0]) for part, value in zip(flat.split(sizes), tensors.values())]
            values = [value.clone() for value in tensors.values()]
            for value, part in zip(values, own):
                value[index] = part
            return losses(values)[index]

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            point = torch.cat([value[index].flatten() for value in tensors.values()])
            hessian = torch.autograd.functional.hessian(loss, point)
        eigenvalues = torch.linalg.eigvalsh(hessian)
        expected = eigenvalues[eigenvalues.abs().argmax()].item()
        assert found[index].item() == pytest.approx(expected, rel=1e-2)
