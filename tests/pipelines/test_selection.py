"""Choosing among candidates and what is free: against PEFT, fold by fold, and task by task."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from kinds import SUPPORTS, TEXTS, Made
from tiny import assert_close, logits_in_peft, seeded, tiny_pipeline

from mcdi_hf import GeneratedAdapter, MCDiPipeline
from mcdi_hf.pipelines.pipeline_output import MCDiPipelineOutput
from mcdi_hf.pipelines.selection import FROZEN, GENERATED, SHARED, TEMPERATURES, Folds, choose, held_out_scores


SETTINGS = {"eta": 0.0, "num_inference_steps": 3, "temperature": 2.0}
TASKS = [TEXTS, {"u": ["a", "c"], "v": ["b y"]}, {"u": ["c z", "a"], "v": ["a a a", "b"]}]


@pytest.fixture(scope="module")
def bert() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


def select(pipe: MCDiPipeline, support: dict, **settings) -> GeneratedAdapter:
    return pipe.select(pipe(support, **settings)).adapters[0]


def starting_noise(pipe: MCDiPipeline, count: int) -> torch.Tensor:
    return torch.randn(count, *pipe.codec.filled.shape, generator=seeded(5))


def held_out(support: dict, fold: int, folds: int) -> tuple[dict, list, list[int]]:
    """A support set without a fold, and the examples of the fold with their classes."""
    kept = {label: [one for i, one in enumerate(own) if i % folds != fold] for label, own in support.items()}
    pairs = [(one, c) for c, own in enumerate(support.values()) for i, one in enumerate(own) if i % folds == fold]
    return kept, [one for one, _ in pairs], [label for _, label in pairs]


def scores_of(logits: torch.Tensor, labels: list[int]) -> tuple[float, float]:
    """Accuracy, and the mean cross-entropy at the best temperature."""
    truth = torch.tensor(labels)
    losses = [torch.nn.functional.cross_entropy(logits / one, truth).item() for one in TEMPERATURES]
    return (logits.argmax(dim=1) == truth).float().mean().item(), min(losses)


def free_adapter(pipe: MCDiPipeline, support: dict, coefficient: float) -> GeneratedAdapter:
    """The adapter whose coefficients are all the same: 0 is the frozen backbone, 1 the shared adapter."""
    tokens = (torch.full(pipe.codec.filled.shape, coefficient) - 1) / pipe.codec.std
    tensors = pipe.decode_adapters(tokens[None], pipe.encode_support(support))
    own = {key: value[0] for key, value in tensors.items()}
    return replace(pipe(support, strength=0.0).adapters[0], tensors=own)


@pytest.mark.parametrize("made", SUPPORTS, indirect=True)
def test_every_option_is_judged_on_what_it_was_not_made_of(made: Made) -> None:
    pipe, backbone, support = made
    noise = starting_noise(pipe, 2)
    found: dict[str, list] = {name: [] for name in (FROZEN, SHARED, GENERATED, "candidate 1", "candidate 2")}
    truth = []
    for fold in range(2):  # the smallest class has two examples
        kept, examples, labels = held_out(support, fold, 2)
        truth += labels
        adapters = {
            FROZEN: free_adapter(pipe, kept, 0.0),
            SHARED: free_adapter(pipe, kept, 1.0),
            GENERATED: pipe(kept, latents=noise, num_candidates=2, **SETTINGS).adapters[0],
            "candidate 1": pipe(kept, latents=noise[:1], **SETTINGS).adapters[0],
            "candidate 2": pipe(kept, latents=noise[1:], **SETTINGS).adapters[0],
        }
        for name, adapter in adapters.items():
            found[name].append(logits_in_peft(backbone, adapter, examples))
    details = select(pipe, support, latents=noise, num_candidates=2, **SETTINGS).details
    expected = {name: scores_of(torch.cat(logits), truth) for name, logits in found.items()}
    assert details.folds == 2
    assert details.support_accuracies == pytest.approx({name: own[0] for name, own in expected.items()}, abs=1e-6)
    assert details.support_losses == pytest.approx({name: own[1] for name, own in expected.items()}, rel=1e-3)
    gains = {name: round(len(truth) * (own[0] - expected[GENERATED][0])) for name, own in expected.items()}
    assert details.chosen == GENERATED or gains[details.chosen] == max(gains.values()) > 0


@pytest.mark.parametrize("made", SUPPORTS, indirect=True)
def test_the_adapter_is_that_of_the_option_made_of_all_examples(made: Made) -> None:
    pipe, _, support = made
    options, pool = set(), [one for own in support.values() for one in own]
    for seed in range(20):
        drawn = np.random.default_rng(seed).integers(len(pool), size=(2, 6))  # classes without a meaning
        task = {label: [pool[place] for place in own] for label, own in zip("ab", drawn)}
        noise = torch.randn(2, *pipe.codec.filled.shape, generator=seeded(seed))
        settings = SETTINGS | {"strength": (0.02, 0.2, 1.0)[seed % 3]}  # near what is free, and far from it
        chosen = select(pipe, task, latents=noise, num_candidates=2, **settings)
        name = chosen.details.chosen
        options.add(name)
        if name in (FROZEN, SHARED):
            assert_close(chosen.tensors, free_adapter(pipe, task, float(name == SHARED)).tensors)
            continue
        rows = noise if name == GENERATED else noise[int(name[-1]) - 1 :][:1]
        (expected,) = pipe(task, latents=rows, num_candidates=len(rows), **settings).adapters
        assert_close(chosen.tensors, expected.tensors)
    assert len(options) > 1


@pytest.mark.parametrize(
    ("answers", "losses", "expected"),
    [
        (["110000", "111000", "011000"], [0.1, 0.2, 0.3], 0),  # one more of one that differs: chance
        (["110000", "111100", "110000"], [0.1, 0.2, 0.3], 1),  # two more of two
        (["110000", "111100", "111010"], [0.1, 0.4, 0.3], 2),  # as many: the loss decides
        (["110000", "111100", "111110"], [0.1, 0.1, 0.9], 2),  # more: it does not
        (["110000", "001111", "110000"], [0.5, 0.1, 0.3], 0),  # two more of six that differ: chance
        (["110000", "111111", "000000"], [0.5, 0.1, 0.0], 1),
    ],
)
def test_another_option_is_chosen_where_it_is_better_by_more_than_chance(
    answers: list[str], losses: list[float], expected: int
) -> None:
    right = torch.tensor([[int(one) for one in row] for row in answers]).bool()
    assert choose(right, torch.tensor(losses), 0) == expected
    assert choose(right[[1, 0, 2]], torch.tensor(losses)[[1, 0, 2]], 1) == [1, 0, 2].index(expected)


def test_a_sharper_head_is_no_worse_for_being_sharp() -> None:
    held = torch.tensor([[0, 1, 2, -1, -1, -1], [-1, -1, -1, 0, 1, 2]])
    logits = torch.randn(1, 2, 6, 3, generator=seeded()) + 2 * torch.eye(3).repeat(2, 1)
    right, losses = held_out_scores(torch.cat([logits, 10**0.5 * logits, -logits]), held)
    assert right[0].equal(right[1]) and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    assert losses[2] > losses[0]
    picked = torch.cat([logits[0, 0, :3], logits[0, 1, 3:]])
    assert right[0].equal(picked.argmax(dim=1) == torch.tensor([0, 1, 2, 0, 1, 2]))


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


def test_one_example_of_a_class_leaves_no_folds_and_keeps_what_was_generated(bert: MCDiPipeline) -> None:
    output = bert({"p": ["a b", "b"], "q": ["x"]}, num_candidates=2, generator=seeded())
    (kept,) = bert.select(output).adapters
    assert kept.details.folds == 0 and kept.details.chosen == GENERATED and kept.details.support_losses is None
    assert_close(kept.tensors, output.adapters[0].tensors)


@pytest.mark.parametrize("count", [1, 2])
def test_folds_are_generated_from_the_noise_of_their_task(bert: MCDiPipeline, count: int) -> None:
    """Noise is drawn in turn for the candidates of a task: the mean of all is the same of any one draw."""
    settings = {"num_candidates": count, "num_inference_steps": 3}
    found = select(bert, TEXTS, generator=seeded(7), **settings).details.support_losses
    assert ("candidate 1" in found) == (count > 1)
    logits, truth = [], []
    for fold in range(2):
        kept, examples, labels = held_out(TEXTS, fold, 2)
        (adapter,) = bert(kept, generator=seeded(7), **settings).adapters
        logits.append(logits_in_peft(bert.backbone, adapter, examples))
        truth += labels
    assert found[GENERATED] == pytest.approx(scores_of(torch.cat(logits), truth)[1], rel=1e-3)


def assert_same(found: MCDiPipelineOutput, expected: MCDiPipelineOutput) -> None:
    for one, other in zip(found.adapters, expected.adapters, strict=True):
        assert one.labels == other.labels
        assert_close(one.tensors, other.tensors)
        found_details, expected_details = asdict(one.details), asdict(other.details)
        losses = expected_details.pop("support_losses")
        assert found_details.pop("support_losses") == (losses and pytest.approx(losses, rel=1e-3))
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
    assert [one.details.folds for one in whole.adapters] == [2, 0, 2]


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
    for output_type in ("pt", "latent"):
        with pytest.raises(ValueError, match=f"{name} needs adapters: .*output_type='peft'"):
            getattr(bert, name)(bert(batch, output_type=output_type, num_inference_steps=1))
