"""What diffusers asks of its own pipelines, of ours: precision there and back, parts of their own, a bar of progress."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from tiny import seeded, tiny_pipeline
from versions import DTYPE

from mcdi_hf import MCDiPipeline


SUPPORT = {"first": ["a b c", "a c"], "second": ["x y z", "z y"]}
PARTS = ("denoiser", "task_encoder", "codec")


@pytest.fixture
def pipe() -> MCDiPipeline:
    return tiny_pipeline()[0]


def tokens(pipe: MCDiPipeline) -> torch.Tensor:
    return pipe(SUPPORT, generator=seeded(), num_inference_steps=3, output_type="latent").adapters


def dtypes(pipe: MCDiPipeline) -> dict[str, torch.dtype]:
    return {name: getattr(pipe, name).dtype for name in PARTS} | {"pipe": pipe.dtype}


@pytest.mark.parametrize("dtype, near", [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_half_precision_there_and_back(pipe: MCDiPipeline, dtype: torch.dtype, near: float) -> None:
    expected = tokens(pipe)
    half = tokens(pipe.to(dtype))
    assert set(dtypes(pipe).values()) == {half.dtype} == {dtype}
    assert (half.float() - expected).norm() < near * expected.norm()
    assert set(dtypes(pipe.to(torch.float32)).values()) == {torch.float32}
    assert tokens(pipe).isfinite().all()


def test_saved_in_half_precision_it_is_loaded_in_any(pipe: MCDiPipeline, tmp_path: Path) -> None:
    half = tokens(pipe.to(torch.float16))
    pipe.save_pretrained(tmp_path)
    loaded = MCDiPipeline.from_pretrained(tmp_path, **{DTYPE: torch.float16})
    loaded.backbone = pipe.backbone
    loaded.set_progress_bar_config(disable=True)
    assert set(dtypes(loaded).values()) == {torch.float16} and tokens(loaded).equal(half)
    each = {"denoiser": torch.bfloat16, "default": torch.float32}
    found = dtypes(MCDiPipeline.from_pretrained(tmp_path, **{DTYPE: each}))
    assert found["denoiser"] == torch.bfloat16 and found["codec"] == found["task_encoder"] == torch.float32


def test_components_make_the_pipeline_again(pipe: MCDiPipeline) -> None:
    assert pipe.components.keys() == {*PARTS, "scheduler"}
    again = MCDiPipeline(**copy.deepcopy(pipe.components))
    again.backbone = pipe.backbone
    again.set_progress_bar_config(disable=True)
    assert tokens(again).equal(tokens(pipe))


def test_a_call_takes_what_a_call_of_diffusers_takes() -> None:
    ours, theirs = (inspect.signature(one.__call__).parameters for one in (MCDiPipeline, DDIMPipeline))
    assert theirs.keys() - ours.keys() == {"use_clipped_model_output"} | (theirs.keys() & {"kwargs"})
    assert issubclass(MCDiPipeline, DiffusionPipeline) and MCDiPipeline._callback_tensor_inputs == ["latents"]


def test_the_bar_of_progress_is_shown_or_not(pipe: MCDiPipeline, capfd: pytest.CaptureFixture) -> None:
    tokens(pipe)
    assert "%|" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=False)
    tokens(pipe)
    assert "100%|" in capfd.readouterr().err
