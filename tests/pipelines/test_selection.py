"""Choosing among candidates and what is free: against PEFT, fold by fold, and task by task."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from kinds import SUPPORTS, TEXTS, Made
from tiny import assert_close, class_logits, logits_in_peft, seeded, tiny_pipeline

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline
from mcdi_hf.adapters.head import class_means, head_logits, imprint_head
from mcdi_hf.pipelines.pipeline_output import MCDiPipelineOutput
from mcdi_hf.pipelines.selection import FROZEN, MEAN_ADAPTER, MEAN_OF_CANDIDATES, Folds


SETTINGS = {"eta": 0.0, "num_inference_steps": 3, "temperature": 2.0}
TASKS = [TEXTS, {"u": ["a", "c"], "v": ["b y"]}, {"u": ["c z", "a"], "v": ["a a a", "b"]}]


@pytest.fixture(scope="module")
def bert() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


def select(pipe: MCDiPipeline, support: dict, **settings) -> GeneratedAdapter:
    return pipe.select(pipe(support, **settings)).adapters[0]


def starting_noise(pipe: MCDiPipeline, count: int, ways: int = 3) -> torch.Tensor:
    return torch.randn(count, pipe.codec.num_tokens(ways), pipe.codec.layout.token_dim, generator=seeded(5))


def held_out(support: dict, fold: int, folds: int) -> tuple[dict, list, list[int]]:
    """A support set without a fold, and the examples of the fold with their classes."""
    kept = {label: [one for i, one in enumerate(own) if i % folds != fold] for label, own in support.items()}
    pairs = [(one, c) for c, own in enumerate(support.values()) for i, one in enumerate(own) if i % folds == fold]
    return kept, [one for one, _ in pairs], [label for _, label in pairs]


def losses_of(logits: torch.Tensor, labels: list[int]) -> list[float]:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none").tolist()


def frozen_losses(pipe: MCDiPipeline, backbone: FrozenBackbone, kept: dict, examples: list, labels: list[int]):
    """The cross-entropy of the plain backbone with a head imprinted from `kept`, or with a verbalizer."""
    if backbone.is_causal_lm:
        with torch.no_grad():
            return losses_of(class_logits(backbone.model, backbone, list(kept), examples), labels)
    none = {key: torch.zeros_like(value) for key, value in pipe.codec.mean_adapter().items()}
    rows = [one for own in kept.values() for one in own]
    seen = pipe.stacked.features_of_all(none, pipe.stacked.encode(rows + examples))
    members = torch.tensor([[c for c, own in enumerate(kept.values()) for _ in own]])
    head = imprint_head(class_means(seen[None, : len(rows)], members, len(kept)), pipe.codec.config.imprint_scale)
    return losses_of(head_logits(seen[None, len(rows) :], *head)[0], labels)


@pytest.mark.parametrize("made", SUPPORTS, indirect=True)
def test_every_option_is_judged_on_what_it_was_not_made_of(made: Made) -> None:
    pipe, backbone, support = made
    noise = starting_noise(pipe, 2)
    found = {FROZEN: [], MEAN_ADAPTER: [], "candidate 1": [], "candidate 2": [], MEAN_OF_CANDIDATES: []}
    for fold in range(2):  # the smallest class has two examples
        kept, examples, labels = held_out(support, fold, 2)
        found[FROZEN] += frozen_losses(pipe, backbone, kept, examples, labels)
        adapters = {
            MEAN_ADAPTER: pipe(kept, strength=0.0).adapters[0],
            "candidate 1": pipe(kept, latents=noise[:1], **SETTINGS).adapters[0],
            "candidate 2": pipe(kept, latents=noise[1:], **SETTINGS).adapters[0],
            MEAN_OF_CANDIDATES: pipe(kept, latents=noise, num_candidates=2, **SETTINGS).adapters[0],
        }
        for name, adapter in adapters.items():
            found[name] += losses_of(logits_in_peft(backbone, adapter, examples), labels)
    details = select(pipe, support, latents=noise, num_candidates=2, **SETTINGS).details
    expected = {name: np.mean(losses) for name, losses in found.items()}
    assert details.folds == 2 and details.support_losses == pytest.approx(expected, rel=1e-3)
    assert details.chosen == min(expected, key=expected.get)


@pytest.mark.parametrize("made", SUPPORTS, indirect=True)
def test_the_adapter_is_that_of_the_option_made_of_all_examples(made: Made) -> None:
    pipe, _, support = made
    options = set()
    for seed in range(12):
        task = {label: own[seed % 2 :][:2] for label, own in list(support.items())[seed % 2 :]}
        shape = (2, pipe.codec.num_tokens(len(task)), pipe.codec.layout.token_dim)
        noise = torch.randn(shape, generator=seeded(seed))
        settings = SETTINGS | {"strength": (0.02, 0.2, 1.0)[seed % 3]}  # near what is free, and far from it
        chosen = select(pipe, task, latents=noise, num_candidates=2, **settings)
        name = chosen.details.chosen
        options.add(name)
        if name == FROZEN:
            assert all(not value.any() for key, value in chosen.tensors.items() if "lora_B" in key)
            continue
        if name == MEAN_ADAPTER:
            assert_close(chosen.tensors, pipe(task, strength=0.0).adapters[0].tensors)
            continue
        rows = noise if name == MEAN_OF_CANDIDATES else noise[int(name[-1]) - 1 :][:1]
        (expected,) = pipe(task, latents=rows, num_candidates=len(rows), **settings).adapters
        assert_close(chosen.tensors, expected.tensors)
    assert len(options) > 1


def test_folds_hold_out_every_example_once() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 1, 1, 2, 2, 2], [0, 0, 1, 1, -1, -1]])
    folds = Folds.of(labels)
    assert folds.tasks.tolist() == [0, 0, 2, 2]  # a class of the second task has one example
    assert folds.held_out.tolist() == [
        [0, -1, 0, 1, -1, -1],
        [-1, 0, -1, -1, 1, -1],
        [0, -1, 1, -1, -1, -1],
        [-1, 0, -1, 1, -1, -1],
    ]
    own = labels[folds.tasks]
    assert torch.where(folds.kept >= 0, folds.kept, folds.held_out).equal(own)
    assert not ((folds.kept >= 0) & (folds.held_out >= 0)).any()


def test_no_more_than_four_folds() -> None:
    assert len(Folds.of(torch.tensor([[0] * 6 + [1] * 9])).tasks) == 4


def test_one_example_of_a_class_leaves_no_folds(bert: MCDiPipeline) -> None:
    task = {"p": ["a b", "b"], "q": ["x"]}
    details = select(bert, task, num_candidates=2, generator=seeded()).details
    logits = logits_in_peft(bert.backbone, bert(task, strength=0.0).adapters[0], ["a b", "b", "x"])
    assert details.folds == 1
    assert details.support_losses[MEAN_ADAPTER] == pytest.approx(np.mean(losses_of(logits, [0, 0, 1])), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_folds_are_generated_from_the_noise_of_their_task(bert: MCDiPipeline, count: int) -> None:
    """Noise is drawn in turn for the candidates of a task: the mean of all is the same of any one draw."""
    settings = {"num_candidates": count, "num_inference_steps": 3}
    found = select(bert, TEXTS, generator=seeded(7), **settings).details.support_losses
    assert (MEAN_OF_CANDIDATES in found) == (count > 1)
    losses = []
    for fold in range(2):
        kept, examples, labels = held_out(TEXTS, fold, 2)
        (adapter,) = bert(kept, generator=seeded(7), **settings).adapters
        losses += losses_of(logits_in_peft(bert.backbone, adapter, examples), labels)
    assert found[MEAN_OF_CANDIDATES if count > 1 else "candidate 1"] == pytest.approx(np.mean(losses), rel=1e-3)


def assert_same(found: MCDiPipelineOutput, expected: MCDiPipelineOutput) -> None:
    for one, other in zip(found.adapters, expected.adapters, strict=True):
        assert one.labels == other.labels
        assert_close(one.tensors, other.tensors)
        found_details, expected_details = asdict(one.details), asdict(other.details)
        losses = expected_details.pop("support_losses")
        assert found_details.pop("support_losses") == pytest.approx(losses, rel=1e-4)
        assert found_details == expected_details


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_parts_are_selected_as_the_whole(bert: MCDiPipeline, batch_size: int, given: bool) -> None:
    latents = starting_noise(bert, 6) if given else None
    settings = {"num_candidates": 2, "num_inference_steps": 3, "latents": latents}
    whole, parts = (
        bert.select(bert(TASKS, batch_size=size, generator=seeded(), **settings)) for size in (64, batch_size)
    )
    assert_same(parts, whole)
    assert [one.details.folds for one in whole.adapters] == [2, 1, 2]


def test_of_an_encoded_support_and_again(bert: MCDiPipeline) -> None:
    expected = bert.select(bert(TASKS, num_candidates=2, generator=seeded()))
    found = bert.select(bert(bert.encode_support(TASKS), num_candidates=2, generator=seeded()))
    assert_same(found, expected)
    assert_same(bert.select(found), expected)  # drawn from the same noise, however often


def test_a_candidate_that_is_no_adapter_is_not_handed_out(bert: MCDiPipeline) -> None:
    output = bert(TASKS, num_inference_steps=1, batch_size=1)
    output.draws.candidates[1].fill_(float("nan"))  # the second task has no folds, for which it would be drawn anew
    with pytest.raises(ValueError, match=r"tasks \[1\] hold NaN or inf"):
        bert.select(output)


@pytest.mark.parametrize("name", ["select", "refine"])
def test_what_cannot_be_gone_on_from_is_refused(bert: MCDiPipeline, name: str) -> None:
    batch = bert.encode_support(TASKS[2])
    ready = dict(zip(TASKS[2], batch.features[0].split(2)))
    for output_type in ("pt", "latent"):
        with pytest.raises(ValueError, match=f"{name} needs adapters: .*output_type='peft'"):
            getattr(bert, name)(bert(batch, output_type=output_type, num_inference_steps=1))
    with pytest.raises(ValueError, match=f"{name} needs examples"):
        getattr(bert, name)(bert(ready, num_inference_steps=1))
