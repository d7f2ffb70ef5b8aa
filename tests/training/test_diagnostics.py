"""Diagnostics of generators that are made to have known ones."""

import math

import pytest
import torch
from tiny import tiny_pipeline

from mcdi_hf import LocalConsistencyScheduler, MCDiPipeline
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.diagnostics import diagnose
from mcdi_hf.training.objective import TrainingBatch


SEGMENTS, WAYS = 3, 3
TEXTS = ["a b", "c a d e", "b c", "x y w", "z y", "a x"]


@pytest.fixture
def pipe() -> MCDiPipeline:
    """A generator that answers zeros, which stand for the clean sample zero."""
    pipe, _ = tiny_pipeline()
    pipe.register_modules(scheduler=LocalConsistencyScheduler(20, num_segments=SEGMENTS, prediction_type="sample"))
    torch.nn.init.zeros_(pipe.denoiser.token_out.weight)
    torch.nn.init.zeros_(pipe.denoiser.token_out.bias)
    pipe.task_encoder.rescale(torch.zeros_like(pipe.codec.filled))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batch(pipe: MCDiPipeline, rows: int = 12) -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, WAYS, dtype=torch.bool)
    targets = torch.randn(rows, SEGMENTS, *pipe.codec.filled.shape, generator=generator)
    order = torch.stack([torch.randperm(len(TEXTS), generator=generator)[:WAYS] for _ in range(rows)])
    labels, classes = torch.arange(WAYS).repeat(rows, 1), [("a", "b", "c")] * rows
    support = SupportBatch(labels, mask, order, examples=pipe.stacked.encode(TEXTS), classes=classes)
    return TrainingBatch(
        targets, pipe.codec.filled, see_support(pipe.stacked, pipe.codec.shared_adapter(), pipe.codec.head, support)
    )


def names(pipe: MCDiPipeline) -> set[str]:
    layers = {token.layer for token in pipe.codec.layout.tokens}
    losses = {f"loss, segment {segment}" for segment in range(1, SEGMENTS + 1)}
    return losses | {f"norm, layer {layer}" for layer in layers} | {"not finite"}


def test_a_generator_that_says_nothing_has_no_norm(pipe: MCDiPipeline) -> None:
    found = diagnose(pipe, [batch(pipe), batch(pipe)])
    assert found.keys() == names(pipe)
    assert found["not finite"] == 0 and found["norm, layer 1"] == found["norm, layer 2"] == 0
    assert all(found[f"loss, segment {segment}"] > 0 for segment in range(1, SEGMENTS + 1))
    assert diagnose(pipe, [batch(pipe), batch(pipe)]) == found  # the same draws, the same numbers


def test_the_norm_is_that_of_what_is_generated_over_the_true_one(pipe: MCDiPipeline) -> None:
    """A bias of 2 in every number: against targets of variance 1 that is a norm of 2."""
    torch.nn.init.constant_(pipe.denoiser.token_out.bias, 2.0)
    found = diagnose(pipe, [batch(pipe, 200)])
    for name in names(pipe) - {"not finite"}:
        if name.startswith("norm"):
            assert found[name] == pytest.approx(2.0, rel=0.1)


def test_numbers_that_are_none_are_counted(pipe: MCDiPipeline) -> None:
    torch.nn.init.constant_(pipe.denoiser.token_out.bias, math.nan)
    found = diagnose(pipe, [batch(pipe)])
    assert found["not finite"] > 0.5  # attention carries them to all tokens but the padding of their width
    assert all(math.isnan(value) for name, value in found.items() if name.startswith("norm"))
