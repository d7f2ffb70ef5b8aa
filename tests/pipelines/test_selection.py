"""Choosing among candidates and what is free, refining, and batches: against PEFT, fold by fold and task by task."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assert_close, seeded, tiny_image_pipeline, tiny_language_pipeline, tiny_pipeline

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline
from mcdi_hf.adapters.head import class_means, head_logits, imprint_head
from mcdi_hf.pipelines.selection import AVERAGE, FROZEN, MEAN_ADAPTER, Folds
from mcdi_hf.data.augmentation import augmented_views


RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
TEXTS = {"p": ["a b c", "a c", "b a"], "q": ["x y z", "z y"], "r": ["k l", "m", "l a"]}
SUPPORTS = {"bert": TEXTS, "llama": TEXTS, "vit": {"p": IMAGES[:3], "q": IMAGES[3:5], "r": IMAGES[5:]}}
PIPELINES = {"bert": tiny_pipeline, "llama": tiny_language_pipeline, "vit": tiny_image_pipeline}
SETTINGS = {"eta": 0.0, "num_inference_steps": 3, "temperature": 2.0}
Made = tuple[MCDiPipeline, FrozenBackbone, dict]


@pytest.fixture(scope="module", params=list(SUPPORTS))
def made(request: pytest.FixtureRequest) -> Made:
    pipe, backbone = PIPELINES[request.param]()
    return pipe, backbone, SUPPORTS[request.param]


@pytest.fixture(scope="module")
def bert() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


def starting_noise(pipe: MCDiPipeline, count: int, ways: int = 3) -> torch.Tensor:
    return torch.randn(count, pipe.codec.num_tokens(ways), pipe.codec.layout.token_dim, generator=seeded(5))


def held_out(support: dict, fold: int, folds: int) -> tuple[dict, list, list[int]]:
    """A support set without a fold, and the examples of the fold with their classes."""
    kept = {label: [one for i, one in enumerate(own) if i % folds != fold] for label, own in support.items()}
    pairs = [(one, c) for c, own in enumerate(support.values()) for i, one in enumerate(own) if i % folds == fold]
    return kept, [one for one, _ in pairs], [label for _, label in pairs]


def losses_in_peft(backbone: FrozenBackbone, adapter: GeneratedAdapter, examples: list, labels: list[int]):
    """The cross-entropy of every example, as PEFT has it."""
    model = adapter.load_into(backbone.classifier(num_labels=len(adapter.labels)))
    losses = []
    for example, label in zip(examples, labels):
        with torch.no_grad():
            logits = model(**backbone.inputs([example])).logits[0]
        if backbone.is_causal_lm:
            tokens = [backbone.processor(f" {name}", add_special_tokens=False).input_ids[0] for name in adapter.labels]
            logits = logits[-1, tokens]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(label)).item())
    return losses


def frozen_losses(pipe: MCDiPipeline, backbone: FrozenBackbone, kept: dict, examples: list, labels: list[int]):
    """The cross-entropy of the plain backbone with a head imprinted from `kept`, or with words."""
    none = {key: torch.zeros_like(value) for key, value in pipe.codec.mean_adapter().items()}
    rows = [one for own in kept.values() for one in own]
    seen = pipe.stacked.features_of_all(none, pipe.stacked.encode(rows + examples))
    if backbone.is_causal_lm:
        head = tuple(part.unsqueeze(0) for part in backbone.word_head(tuple(kept)))
    else:
        members = torch.tensor([[c for c, own in enumerate(kept.values()) for _ in own]])
        head = imprint_head(class_means(seen[None, : len(rows)], members, len(kept)), pipe.codec.config.imprint_scale)
    logits = head_logits(seen[None, len(rows) :], *head)[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none").tolist()


def test_every_option_is_judged_on_what_it_was_not_made_of(made: Made) -> None:
    pipe, backbone, support = made
    noise = starting_noise(pipe, 2)
    found = {FROZEN: [], MEAN_ADAPTER: [], "candidate 1": [], "candidate 2": [], AVERAGE: []}
    for fold in range(2):  # the smallest class has two examples
        kept, examples, labels = held_out(support, fold, 2)
        found[FROZEN] += frozen_losses(pipe, backbone, kept, examples, labels)
        adapters = {
            MEAN_ADAPTER: pipe.baseline(kept),
            "candidate 1": pipe(kept, latents=noise[:1], **SETTINGS).adapters[0],
            "candidate 2": pipe(kept, latents=noise[1:], **SETTINGS).adapters[0],
            AVERAGE: pipe(kept, latents=noise, num_candidates=2, **SETTINGS).adapters[0],
        }
        for name, adapter in adapters.items():
            found[name] += losses_in_peft(backbone, adapter, examples, labels)
    (chosen,) = pipe(support, latents=noise, num_candidates=2, combine="select", **SETTINGS).adapters
    expected = {name: np.mean(losses) for name, losses in found.items()}
    assert chosen.details["folds"] == 2
    assert chosen.details["support_losses"] == pytest.approx(expected, rel=1e-3)
    assert chosen.details["chosen"] == min(expected, key=expected.get)
    assert chosen.details["support_loss"] == min(chosen.details["support_losses"].values())


def test_the_adapter_is_that_of_the_option_made_of_all_examples(made: Made) -> None:
    pipe, _, support = made
    options = set()
    for seed in range(12):
        tasks = {label: own[seed % 2 :][:2] for label, own in list(support.items())[seed % 2 :]}
        shape = (2, pipe.codec.num_tokens(len(tasks)), pipe.codec.layout.token_dim)
        noise = torch.randn(shape, generator=seeded(seed))
        settings = SETTINGS | {"strength": (0.02, 0.2, 1.0)[seed % 3]}  # near what is free, and far from it
        (chosen,) = pipe(tasks, latents=noise, num_candidates=2, combine="select", **settings).adapters
        name = chosen.details["chosen"]
        options.add(name)
        if name == FROZEN:
            assert all(not value.any() for key, value in chosen.tensors.items() if "lora_B" in key)
            continue
        if name == MEAN_ADAPTER:
            assert_close(chosen.tensors, pipe.baseline(tasks).tensors)
            continue
        rows = noise if name == AVERAGE else noise[int(name[-1]) - 1 :][:1]
        (expected,) = pipe(tasks, latents=rows, num_candidates=len(rows), **settings).adapters
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


def test_one_example_of_a_class_leaves_no_folds(bert: MCDiPipeline) -> None:
    task = {"p": ["a b", "b"], "q": ["x"]}
    (chosen,) = bert(task, combine="select", num_candidates=2, generator=seeded()).adapters
    free = bert.baseline(task)
    examples, labels = ["a b", "b", "x"], [0, 0, 1]
    expected = np.mean(losses_in_peft(bert.backbone, free, examples, labels))
    assert chosen.details["folds"] == 1
    assert chosen.details["support_losses"][MEAN_ADAPTER] == pytest.approx(expected, rel=1e-4)


def test_first_is_the_first_candidate(bert: MCDiPipeline) -> None:
    noise = starting_noise(bert, 3)
    chosen = bert(TEXTS, latents=noise, num_candidates=3, combine="first", **SETTINGS).adapters[0]
    assert_close(chosen.tensors, bert(TEXTS, latents=noise[:1], **SETTINGS).adapters[0].tensors)


@pytest.mark.parametrize("output_type", ["peft", "pt", "latent"])
def test_batches_of_any_size_are_the_same(bert: MCDiPipeline, output_type: str) -> None:
    tasks = [TEXTS, {"one": ["a"], "two": ["b y"]}, {"u": ["c z", "a"], "v": ["a a a"]}]
    settings = {"num_candidates": 2, "num_inference_steps": 3, "output_type": output_type}
    whole, parts, single = (bert(tasks, generator=seeded(), batch_size=n, **settings).adapters for n in (64, 2, 1))
    if output_type == "peft":
        whole, parts, single = ([one.tensors for one in made] for made in (whole, parts, single))
    assert_close(parts, whole)
    assert_close(single, whole)


@pytest.mark.parametrize("output_type", ["peft", "latent"])
def test_progress_counts_the_tasks(bert: MCDiPipeline, output_type: str, capsys: pytest.CaptureFixture) -> None:
    bert.set_progress_bar_config(disable=False)
    bert([TEXTS] * 3, num_inference_steps=2, batch_size=2, output_type=output_type)
    bert.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


def test_folds_are_generated_from_the_noise_of_their_task(bert: MCDiPipeline) -> None:
    settings = {"num_candidates": 2, "num_inference_steps": 3}
    (chosen,) = bert(TEXTS, generator=seeded(7), combine="select", **settings).adapters
    for name, combine in (("candidate 1", "first"), (AVERAGE, "mean")):
        losses = []
        for fold in range(2):
            kept, examples, labels = held_out(TEXTS, fold, 2)
            (adapter,) = bert(kept, generator=seeded(7), combine=combine, **settings).adapters
            losses += losses_in_peft(bert.backbone, adapter, examples, labels)
        assert chosen.details["support_losses"][name] == pytest.approx(np.mean(losses), rel=1e-3)


def distance(found: dict, expected: dict, start: dict) -> float:
    """How far one training ended from another, as a share of the way that they went."""
    gap, way = (
        sum((one[key] - other[key]).square().sum() for key in start)
        for one, other in ((found, expected), (expected, start))
    )
    return float((gap / way).sqrt())


def test_refined_as_peft_would_train(made: Made) -> None:
    pipe, backbone, support = made
    # the classes contradict each other, so that the loss is not zero: of zero Adam would make the signs of rounding
    support = {label: [*own, *support["p"][:2]] for label, own in support.items()}
    start = pipe(support, generator=seeded(), num_inference_steps=3).adapters[0]
    found = pipe(support, generator=seeded(), num_inference_steps=3, refine_steps=3, refine_learning_rate=1e-2)
    model = start.load_into(backbone.classifier(num_labels=3))
    parameters = {}
    for name, parameter in model.named_parameters():
        key = name.replace(".default", "").replace(".modules_to_save", "")
        if key in start.tensors and ".original_module" not in name:
            parameters[key] = parameter.requires_grad_()
    assert parameters.keys() == start.tensors.keys()
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    examples = [one for own in support.values() for one in own]
    labels = torch.tensor([c for c, own in enumerate(support.values()) for _ in own])
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        logits = []
        for example in examples:
            one = model(**backbone.inputs([example])).logits[0]
            if backbone.is_causal_lm:
                words = [backbone.processor(f" {n}", add_special_tokens=False).input_ids[0] for n in support]
                one = one[-1, words]
            logits.append(one)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(torch.stack(logits), labels).backward()
        optimizer.step()
    refined = found.adapters[0]
    assert refined.details["refine_steps"] == 3
    # the queries of tiny models saturate: their gradients are rounding, of which Adam makes whole steps
    kept = {key: value for key, value in start.tensors.items() if ".query." not in key and ".q_proj." not in key}
    assert distance(refined.tensors, {key: value.detach() for key, value in parameters.items()}, kept) < 2e-3


def test_tasks_are_refined_apart(bert: MCDiPipeline) -> None:
    tasks = [{"u": ["a b", "c"], "v": ["c", "a b", "y"], "w": ["y"]}, {"one": ["a", "b y"], "two": ["b y"]}]
    settings = {"num_inference_steps": 3, "refine_steps": 4}
    both = bert(tasks, generator=[seeded(0), seeded(1)], **settings).adapters
    for seed, task in enumerate(tasks):
        (start,) = bert(task, generator=seeded(seed), num_inference_steps=3).adapters
        (alone,) = bert(task, generator=seeded(seed), **settings).adapters
        # the queries of the tiny model saturate: their gradients are rounding, of which Adam makes whole steps
        start = {key: value for key, value in start.tensors.items() if ".query." not in key}
        assert distance(both[seed].tensors, alone.tensors, start) < 2e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine_steps": -1}, "refine_steps is -1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"combine": "select", "output_type": "latent"}, "cannot say the frozen backbone"),
        ({"refine_steps": 1, "output_type": "latent"}, "nor a refined adapter"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"num_candidates": 1.5}, "num_candidates is 1.5"),
        ({"refine_steps": 3, "refine_learning_rate": 1e30}, r"tasks \[0\] hold NaN or inf"),
    ],
)
def test_wrong_settings_are_refused(bert: MCDiPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert(TEXTS, **settings)


def test_features_that_overflow_are_refused(bert: MCDiPipeline) -> None:
    features = {label: 1e30 * value for label, value in bert.embed(TEXTS).items()}
    with pytest.raises(ValueError, match=r"tasks \[1\] hold NaN or inf"):
        bert([bert.embed(TEXTS), features], num_inference_steps=3)


def test_features_cannot_be_refined(bert: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="refine_steps need examples"):
        bert(bert.embed(TEXTS), refine_steps=1)


@pytest.mark.parametrize("imprint_from", ["mean", "generated"])
def test_views_of_the_support(imprint_from: str) -> None:
    pipe, _ = tiny_image_pipeline()
    pipe = MCDiPipeline(**copy.copy(pipe.components), support_views=3, imprint_from=imprint_from)
    pipe.backbone = tiny_image_pipeline()[1]
    pipe.set_progress_bar_config(disable=True)
    tasks = [SUPPORTS["vit"], {"p": IMAGES[:1], "q": IMAGES[1:2]}]
    seen = pipe.embed(tasks[0])
    views = augmented_views(IMAGES, 3)
    features = pipe.stacked.features_of_all(pipe.codec.mean_adapter(), pipe.stacked.encode(views))
    assert_close(torch.cat(list(seen.values())), features.unflatten(0, (3, 8)).mean(dim=0))
    batch = pipe(tasks, generator=[seeded(0), seeded(1)]).adapters
    for seed, task in enumerate(tasks):
        (alone,) = pipe(task, generator=seeded(seed)).adapters
        assert_close(batch[seed].tensors, alone.tensors)
        own = {key: value.unsqueeze(0) for key, value in alone.tensors.items()}
        images = [image for group in task.values() for image in group]
        seen_views = pipe.stacked.encode(augmented_views(images, 3))
        adapter = own if imprint_from == "generated" else pipe.codec.mean_adapter()
        features = pipe.stacked.features_of_all(adapter, seen_views)[None]
        members = torch.tensor([[c for c, group in enumerate(task.values()) for _ in group] * 3])
        free = imprint_head(class_means(features, members, len(task)), pipe.codec.config.imprint_scale)
        tokens = pipe(task, generator=seeded(seed), output_type="latent").adapters
        assert_close(pipe.codec.decode(tokens, free), own)
