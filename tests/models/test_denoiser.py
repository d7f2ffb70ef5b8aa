"""What the denoiser promises: symmetry in the classes, indifference to padding, and the habits of a diffusers model."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from versions import DTYPE

from mcdi_hf import MCDiDenoiser


# Layer, module, filled width.
TOKENS = [[0, 0, 12], [0, 1, 4], [1, 0, 7], [1, 1, 12]]
TOKEN_DIM, COND_DIM = 12, 6
FILLED = torch.arange(TOKEN_DIM) < torch.tensor(TOKENS)[:, 2:]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every weight, those that begin as zeros too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def fresh_denoiser(num_layers: int = 2, residual: bool = True) -> MCDiDenoiser:
    torch.manual_seed(0)
    sizes = {"cond_dim": COND_DIM, "dim": 16, "num_layers": num_layers, "num_heads": 2, "residual": residual}
    return MCDiDenoiser(TOKENS, TOKEN_DIM, **sizes).eval()


@pytest.fixture
def denoiser() -> MCDiDenoiser:
    denoiser = fresh_denoiser()
    randomise(denoiser)
    return denoiser


def make_inputs(tasks: int = 2, classes: int = 4) -> dict[str, torch.Tensor]:
    return {
        "sample": randn(tasks, len(TOKENS), TOKEN_DIM, seed=1),
        "timestep": torch.arange(tasks) + 5,
        "class_tokens": randn(tasks, classes, COND_DIM, seed=2),
        "task_token": randn(tasks, COND_DIM, seed=3),
        "proposal": randn(tasks, len(TOKENS), TOKEN_DIM, seed=4) * FILLED,
    }


@torch.no_grad()
def test_the_order_of_classes_does_not_matter(denoiser: MCDiDenoiser) -> None:
    inputs = make_inputs()
    permuted = {**inputs, "class_tokens": inputs["class_tokens"][:, [2, 0, 3, 1]]}
    torch.testing.assert_close(denoiser(**permuted).sample, denoiser(**inputs).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padding", [1, 3])
def test_padding_classes_change_nothing(denoiser: MCDiDenoiser, padding: int) -> None:
    inputs = make_inputs()
    mask = torch.arange(4 + padding).expand(2, -1) < 4
    more = torch.cat([inputs["class_tokens"], randn(2, padding, COND_DIM, seed=5)], dim=1)
    padded = {**inputs, "class_tokens": more}
    plain, masked = denoiser(**inputs).sample, denoiser(**padded, class_mask=mask).sample
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(denoiser(**padded).sample, plain, atol=1e-2)


@torch.no_grad()
def test_numbers_behind_the_filled_width_are_ignored_and_zero(denoiser: MCDiDenoiser) -> None:
    inputs = make_inputs()
    noisy = {**inputs, "sample": torch.where(FILLED, inputs["sample"], 100 * randn(TOKEN_DIM, seed=6))}
    plain = denoiser(**inputs).sample
    assert denoiser(**noisy).sample.equal(plain)
    assert (plain != 0).equal(FILLED.expand_as(plain))


@torch.no_grad()
@pytest.mark.parametrize("changed", ["timestep", "class_tokens", "task_token", "proposal"])
def test_every_condition_is_heard(denoiser: MCDiDenoiser, changed: str) -> None:
    inputs = make_inputs()
    other = denoiser(**{**inputs, changed: inputs[changed] + 1}).sample
    difference = (other - denoiser(**inputs).sample).abs().amax(dim=-1)
    assert difference.min() > 1e-3


@torch.no_grad()
def test_untrained_answers_with_the_proposal_or_else_with_zero() -> None:
    inputs = make_inputs()
    assert fresh_denoiser()(**inputs).sample.equal(inputs["proposal"])
    assert fresh_denoiser(residual=False)(**inputs).sample.eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_forms_of_a_timestep(denoiser: MCDiDenoiser, timestep: torch.Tensor | float | int) -> None:
    inputs = make_inputs()
    expected = denoiser(**{**inputs, "timestep": torch.tensor([7, 7])}).sample
    assert denoiser(**{**inputs, "timestep": timestep}).sample.equal(expected)


@torch.no_grad()
def test_tuple_is_the_output(denoiser: MCDiDenoiser) -> None:
    inputs = make_inputs()
    output = denoiser(**inputs, return_dict=False)
    assert isinstance(output, tuple) and len(output) == 1
    assert output[0].equal(denoiser(**inputs).sample)


@torch.no_grad()
def test_saved_and_loaded(denoiser: MCDiDenoiser, tmp_path: Path) -> None:
    denoiser.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = MCDiDenoiser.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded(**make_inputs()).sample.equal(denoiser(**make_inputs()).sample)


def test_every_parameter_has_a_gradient(denoiser: MCDiDenoiser) -> None:
    denoiser(**make_inputs()).sample.square().mean().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_checkpointing_changes_no_gradient(denoiser: MCDiDenoiser) -> None:
    def loss_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = denoiser(**make_inputs()).sample.square().mean()
        return loss, torch.autograd.grad(loss, list(denoiser.parameters()))

    seen = []
    denoiser.train()
    denoiser.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    plain = loss_and_gradients()
    assert len(seen) == 1
    denoiser.enable_gradient_checkpointing()
    checkpointed = loss_and_gradients()
    assert len(seen) == 3  # once forward, once more in the backward pass
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in plain[1])


@torch.no_grad()
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiles_to_one_graph() -> None:
    denoiser = fresh_denoiser(num_layers=1)
    randomise(denoiser)
    inputs = {**make_inputs(), "class_mask": torch.tensor([[True] * 4, [True] * 3 + [False]])}
    compiled = torch.compile(denoiser, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).sample, denoiser(**inputs).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16(denoiser: MCDiDenoiser, tmp_path: Path) -> None:
    inputs = {**make_inputs(), "class_mask": torch.tensor([[True] * 4, [True] * 3 + [False]])}
    expected = denoiser(**inputs).sample
    denoiser.save_pretrained(tmp_path)
    loaded = MCDiDenoiser.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16})
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    output = loaded(**half).sample
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.05 * expected.norm()
