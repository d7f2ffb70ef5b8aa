"""What the denoiser promises: symmetry in the classes, indifference to padding, and the habits of a diffusers model."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mcdi_hf import MCDiDenoiser


# Layer, module, matrix, part, filled width.
TOKENS = [[0, 0, 0, 0, 12], [0, 0, 0, 1, 4], [0, 0, 1, 0, 12], [0, 1, 1, 0, 7], [1, 0, 0, 0, 10], [1, 1, 1, 0, 12]]
TOKEN_DIM, HEAD_WIDTH, COND_DIM = 12, 9, 6
LORA = len(TOKENS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every weight, those that begin as zeros too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def fresh_denoiser(num_layers: int = 2) -> MCDiDenoiser:
    torch.manual_seed(0)
    sizes = {"cond_dim": COND_DIM, "dim": 16, "num_layers": num_layers, "num_heads": 2}
    return MCDiDenoiser(TOKENS, TOKEN_DIM, HEAD_WIDTH, **sizes).eval()


@pytest.fixture
def denoiser() -> MCDiDenoiser:
    denoiser = fresh_denoiser()
    randomise(denoiser)
    return denoiser


def make_inputs(tasks: int = 2, classes: int = 4) -> dict[str, torch.Tensor]:
    return {
        "sample": randn(tasks, LORA + classes, TOKEN_DIM, seed=1),
        "timestep": torch.arange(tasks) + 5,
        "class_tokens": randn(tasks, classes, COND_DIM, seed=2),
        "task_token": randn(tasks, COND_DIM, seed=3),
    }


@torch.no_grad()
def test_permuted_classes_permute_the_head_alone(denoiser: MCDiDenoiser) -> None:
    inputs, order = make_inputs(), torch.tensor([2, 0, 3, 1])
    lora, head = inputs["sample"].split([LORA, 4], dim=1)
    permuted = {
        **inputs,
        "sample": torch.cat([lora, head[:, order]], dim=1),
        "class_tokens": inputs["class_tokens"][:, order],
    }
    plain, other = denoiser(**inputs).sample, denoiser(**permuted).sample
    torch.testing.assert_close(other[:, :LORA], plain[:, :LORA], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other[:, LORA:], plain[:, LORA:][:, order], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain[:, LORA:], plain[:, LORA:][:, order], atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("padding", [1, 3])
def test_padding_classes_change_nothing(denoiser: MCDiDenoiser, padding: int) -> None:
    inputs = make_inputs()
    mask = torch.arange(4 + padding).expand(2, -1) < 4
    padded = {
        **inputs,
        "sample": torch.cat([inputs["sample"], randn(2, padding, TOKEN_DIM, seed=4)], dim=1),
        "class_tokens": torch.cat([inputs["class_tokens"], randn(2, padding, COND_DIM, seed=5)], dim=1),
    }
    plain, masked = denoiser(**inputs).sample, denoiser(**padded, class_mask=mask).sample
    torch.testing.assert_close(masked[:, : LORA + 4], plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(denoiser(**padded).sample[:, : LORA + 4], plain, atol=1e-2)


@torch.no_grad()
def test_numbers_behind_the_filled_width_are_ignored_and_zero(denoiser: MCDiDenoiser) -> None:
    inputs = make_inputs()
    widths = torch.tensor([token[-1] for token in TOKENS] + 4 * [HEAD_WIDTH])
    filled = torch.arange(TOKEN_DIM) < widths.unsqueeze(-1)
    noisy = {**inputs, "sample": torch.where(filled, inputs["sample"], 100 * randn(TOKEN_DIM, seed=6))}
    plain = denoiser(**inputs).sample
    assert denoiser(**noisy).sample.equal(plain)
    assert (plain != 0).equal(filled.expand_as(plain))


@torch.no_grad()
@pytest.mark.parametrize("changed", ["timestep", "class_tokens", "task_token"])
def test_every_condition_is_heard(denoiser: MCDiDenoiser, changed: str) -> None:
    inputs = make_inputs()
    other = denoiser(**{**inputs, changed: inputs[changed] + 1}).sample
    difference = (other - denoiser(**inputs).sample).abs().amax(dim=-1)
    assert difference.min() > 1e-3


@torch.no_grad()
def test_untrained_answers_zero() -> None:
    output = fresh_denoiser()(**make_inputs()).sample
    assert output[:, :LORA].eq(0).all() and output[:, LORA:].eq(0).all()


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


def headless_denoiser() -> MCDiDenoiser:
    torch.manual_seed(0)
    denoiser = MCDiDenoiser(TOKENS, TOKEN_DIM, 0, cond_dim=COND_DIM, dim=16, num_layers=2, num_heads=2).eval()
    assert denoiser(**headless_inputs()).sample.eq(0).all()
    randomise(denoiser)
    return denoiser


def headless_inputs() -> dict[str, torch.Tensor]:
    inputs = make_inputs()
    return {**inputs, "sample": inputs["sample"][:, :LORA]}


@torch.no_grad()
def test_without_a_head_the_classes_are_seen_and_not_answered(tmp_path: Path) -> None:
    denoiser, inputs = headless_denoiser(), headless_inputs()
    plain = denoiser(**inputs).sample
    assert plain.shape == inputs["sample"].shape
    permuted = denoiser(**{**inputs, "class_tokens": inputs["class_tokens"][:, [2, 0, 3, 1]]}).sample
    torch.testing.assert_close(permuted, plain, rtol=1e-5, atol=1e-5)
    other = denoiser(**{**inputs, "class_tokens": inputs["class_tokens"] + randn(2, 4, COND_DIM, seed=7)}).sample
    assert (other - plain).abs().amax(dim=-1).min() > 1e-3
    padded = torch.cat([inputs["class_tokens"], randn(2, 2, COND_DIM, seed=5)], dim=1)
    mask = torch.arange(6).expand(2, -1) < 4
    masked = denoiser(**{**inputs, "class_tokens": padded, "class_mask": mask}).sample
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)
    denoiser.save_pretrained(tmp_path)
    assert MCDiDenoiser.from_pretrained(tmp_path)(**inputs).sample.equal(plain)


def test_without_a_head_every_parameter_has_a_gradient() -> None:
    denoiser = headless_denoiser()
    denoiser(**headless_inputs()).sample.square().mean().backward()
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
    loaded = MCDiDenoiser.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    output = loaded(**half).sample
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() < 0.05 * expected.norm()
