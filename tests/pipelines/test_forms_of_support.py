"""Tokenised support sets, and the pipeline in bfloat16."""

from typing import Any

import pytest
import torch
from tiny import tiny_image_pipeline, tiny_language_pipeline, tiny_pipeline

from mcdi_hf import MCDiPipeline


TEXTS = {"p": ["a b c", "a c", "b a"], "q": ["x y z", "z y"], "r": ["k l", "m"]}


@pytest.fixture(scope="module", params=["bert", "llama"])
def pipe(request: pytest.FixtureRequest) -> MCDiPipeline:
    pipe, _ = {"bert": tiny_pipeline, "llama": tiny_language_pipeline}[request.param]()
    return pipe


def tokenised(pipe: MCDiPipeline, **settings) -> dict[str, Any]:
    tokenizer = pipe.backbone.processor
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return {label: tokenizer(texts, **settings) for label, texts in TEXTS.items()}


@pytest.mark.parametrize("settings", [{}, {"padding": True, "return_tensors": "pt"}])
def test_tokens_in_place_of_texts(pipe: MCDiPipeline, settings: dict[str, Any]) -> None:
    found, expected = (
        pipe(one, generator=torch.manual_seed(0), num_inference_steps=3, combine="select").adapters[0]
        for one in (tokenised(pipe, **settings), TEXTS)
    )
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0)
    assert found.details == expected.details


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"no \['attention_mask'\]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "not of one shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "has 0 tokens"),
        ({"input_ids": [[1, 10**6]], "attention_mask": [[1, 1]]}, "up to number 1000000"),
        ({"input_ids": [[1] * 999], "attention_mask": [[1] * 999]}, "has 999 tokens"),
        ({"input_ids": [], "attention_mask": []}, "has no example"),
    ],
)
def test_wrong_tokens_are_refused(pipe: MCDiPipeline, batch: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(tokenised(pipe) | {"q": batch})


def test_tokens_are_refused_beside_texts_and_by_backbones_for_images(pipe: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="mixes texts and tokenised texts"):
        pipe(tokenised(pipe) | {"q": ["a b"]})
    images, _ = tiny_image_pipeline()
    with pytest.raises(ValueError, match="holds tokenised texts, but the backbone .* reads images"):
        images(tokenised(pipe))
    several = MCDiPipeline(**pipe.components, support_views=2)
    several.backbone = pipe.backbone
    with pytest.raises(ValueError, match="2 views"):
        several(tokenised(pipe))


def test_in_bfloat16_the_statistics_stay_float32() -> None:
    pipe, _ = tiny_pipeline()
    settings = {"num_inference_steps": 3, "num_candidates": 2, "combine": "select"}
    expected = pipe(TEXTS, generator=torch.manual_seed(0), **settings).adapters[0]
    mean = pipe.codec.mean.clone()
    pipe.to(torch.bfloat16)
    assert pipe.denoiser.dtype == pipe.task_encoder.dtype == torch.bfloat16
    assert pipe.codec.mean.dtype == pipe.codec.std.dtype == pipe.codec.head_std.dtype == torch.float32
    assert pipe.codec.mean.equal(mean)
    found = pipe(TEXTS, generator=torch.manual_seed(0), **settings).adapters[0]
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}
    free = found.details["support_losses"]["mean adapter"]
    assert free == pytest.approx(expected.details["support_losses"]["mean adapter"], rel=1e-5)
    refined = pipe(TEXTS, generator=torch.manual_seed(0), num_inference_steps=3, refine_steps=2).adapters[0]
    assert all(torch.isfinite(value).all() for value in refined.tensors.values())
