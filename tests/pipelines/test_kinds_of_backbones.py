"""Pipelines for a language model, whose adapters have no head, and for images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from kinds import PIPELINES, SUPPORTS, TEXTS, Made
from tiny import assert_close, logits_in_peft, seeded, tiny_language_pipeline, tiny_lora_config, tiny_pipeline

from mcdi_hf import AdapterCodec, MCDiDenoiser, MCDiPipeline
from mcdi_hf.data.episodes import SupportBatch


IMAGES = {label: images[:2] for label, images in SUPPORTS["vit"].items()}
IMAGES["p"][1] = IMAGES["p"][1].convert("L")
both_kinds = pytest.mark.parametrize("made", ["llama", "vit"], indirect=True)


@pytest.fixture(scope="module")
def llama() -> MCDiPipeline:
    pipe, _ = tiny_language_pipeline()
    return pipe


@both_kinds
def test_an_adapter_has_the_tensors_of_its_layout(made: Made) -> None:
    pipe, backbone, support = made
    (adapter,) = pipe(support, num_candidates=2, num_inference_steps=3, generator=seeded()).adapters
    layout = pipe.codec.layout
    assert adapter.labels == list(support) and adapter.details.shots == [len(one) for one in support.values()]
    assert {key: tuple(value.shape) for key, value in adapter.tensors.items()} == layout.shapes(len(support))
    assert bool(layout.head_keys) != backbone.is_causal_lm
    flat = pipe(support, num_inference_steps=3, output_type="pt").adapters
    assert flat.shape == (1, sum(value.numel() for value in adapter.tensors.values()))
    latent = pipe([support, dict(list(support.items())[:2])], num_inference_steps=3, output_type="latent").adapters
    assert latent.shape == (2, pipe.codec.num_tokens, layout.token_dim)


@both_kinds
def test_strength_zero_is_the_shared_adapter(made: Made) -> None:
    pipe, _, support = made
    shared = pipe.codec.shared_adapter()
    free = pipe(support, strength=0.0, num_inference_steps=2).adapters[0]
    assert all(free.tensors[key].equal(value[0]) for key, value in shared.items())
    generated = pipe(support, num_inference_steps=2, generator=seeded()).adapters[0]
    same = [key for key, value in shared.items() if torch.allclose(generated.tensors[key], value[0])]
    assert same == [key for key in shared if "lora_B" in key]


def test_the_verbalizer_is_the_head_of_a_language_model(llama: MCDiPipeline) -> None:
    batch = llama.encode_support([TEXTS, {"q": ["a"], "p": ["b"]}])
    weights, biases = llama.stacked.verbalizers(batch)
    head, ids = llama.backbone.model.lm_head.weight, llama.backbone.processor.convert_tokens_to_ids
    assert weights[0].equal(head[ids(list(TEXTS))]) and weights[1, :2].equal(head[ids(["q", "p"])])
    assert not weights[1, 2].any() and not biases.any()
    examples = [text for group in TEXTS.values() for text in group]
    expected = logits_in_peft(llama.backbone, llama(TEXTS, strength=0.0).adapters[0], examples)
    width = llama.codec.layout.feature_dim
    features = batch.features[0, :, :width] * llama.codec.head.feature_norm
    assert_close(features @ weights[0].T, expected)


@both_kinds
def test_permuted_classes_leave_the_matrices_alone(made: Made) -> None:
    pipe, _, support = made
    turned = dict(reversed(support.items()))
    plain, other = (pipe(one, temperature=0.0, num_inference_steps=3).adapters[0] for one in (support, turned))
    assert other.labels == plain.labels[::-1]
    for key, value in plain.tensors.items():
        expected = value.flip(0) if key in pipe.codec.layout.head_keys else value
        assert_close(other.tensors[key], expected)


@both_kinds
def test_the_support_is_seen(made: Made) -> None:
    pipe, _, support = made
    mixed = dict(zip(support, [*list(support.values())[1:], list(support.values())[0][:1]]))
    settings = {"temperature": 0.0, "num_inference_steps": 3, "output_type": "latent"}
    plain, other = pipe(support, **settings).adapters, pipe(mixed, **settings).adapters
    assert not torch.allclose(plain, other, atol=1e-3)


@both_kinds
def test_a_batch_is_its_tasks_one_by_one(made: Made) -> None:
    pipe, _, support = made
    tasks = [support, dict(list(support.items())[:2])]
    settings = {"num_candidates": 2, "num_inference_steps": 3}
    batch = pipe.select(pipe(tasks, generator=[seeded(0), seeded(1)], **settings)).adapters
    parts = pipe.select(pipe(tasks, generator=[seeded(0), seeded(1)], batch_size=1, **settings)).adapters
    for seed, task in enumerate(tasks):
        (expected,) = pipe.select(pipe(task, generator=seeded(seed), **settings)).adapters
        for adapter in (batch[seed], parts[seed]):
            assert_close(adapter.tensors, expected.tensors)
            assert adapter.details.chosen == expected.details.chosen
            assert adapter.details.support_losses == pytest.approx(expected.details.support_losses, rel=1e-3)


@both_kinds
def test_encoded_examples_in_place_of_examples(made: Made) -> None:
    pipe, backbone, support = made
    batch = pipe.encode_support(support)
    assert batch.features.shape == (1, sum(len(group) for group in support.values()), backbone.feature_dim + 16)
    expected, found = (pipe(one, num_inference_steps=3, generator=seeded()).adapters[0] for one in (support, batch))
    assert found.labels == expected.labels
    assert_close(found.tensors, expected.tensors)


@both_kinds
def test_the_stack_says_what_peft_says(made: Made) -> None:
    pipe, backbone, support = made
    adapter = pipe(support, num_inference_steps=3, generator=seeded(), strength=1.9).adapters[0]
    own = {key: value.unsqueeze(0) for key, value in adapter.tensors.items()}
    found = pipe.stacked.logits(own, pipe.encode_support(support))[0]
    expected = logits_in_peft(backbone, adapter, [example for group in support.values() for example in group])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - found.mean(dim=0)).abs().max() > 1e-2


@both_kinds
def test_saved_and_loaded(made: Made, tmp_path: Path) -> None:
    pipe, _, support = made
    pipe.save_pretrained(tmp_path)
    loaded = MCDiPipeline.from_pretrained(tmp_path)
    adapters = [one(support, num_inference_steps=3, generator=seeded()).adapters[0] for one in (pipe, loaded)]
    assert_close(adapters[1].tensors, adapters[0].tensors)


def seen(pipe: MCDiPipeline, support: Any) -> torch.Tensor:
    batch = pipe.encode_support(support)
    assert isinstance(batch, SupportBatch)
    return batch.features


def test_pairs_of_texts(llama: MCDiPipeline) -> None:
    pairs = {label: [("a", text) for text in texts] for label, texts in TEXTS.items()}
    lines = {label: ["\n".join(pair) for pair in texts] for label, texts in pairs.items()}
    assert_close(seen(llama, pairs), seen(llama, lines))  # a language model reads them as two lines
    bert, _ = tiny_pipeline()
    separate = {label: [f"{pair[0]} [SEP] {pair[1]}" for pair in texts] for label, texts in pairs.items()}
    assert not torch.isclose(seen(bert, pairs), seen(bert, separate)).all(dim=-1).any()
    assert bert(pairs, num_inference_steps=2).adapters[0].labels == list(pairs)


def image_rows(labels: list[int], **feature: bool) -> Dataset:
    images = [image for group in IMAGES.values() for image in group][: len(labels)]
    features = Features({"photo": ImageFeature(), "animal": ClassLabel(names=list(IMAGES))})
    dataset = Dataset.from_dict({"photo": images, "animal": labels}, features)
    return dataset.cast_column("photo", ImageFeature(**feature)) if feature else dataset


@pytest.mark.parametrize("made", ["vit"], indirect=True)
@pytest.mark.parametrize("format_name", [None, "numpy"])
def test_images_of_a_dataset(made: Made, format_name: str | None) -> None:
    rows = image_rows([0, 0, 1, 1, 2, 2]).with_format(format_name)
    assert_close(seen(made[0], rows), seen(made[0], IMAGES))


@pytest.mark.parametrize(
    ("kind", "support", "message"),
    [
        ("llama", IMAGES, "holds images, but the backbone '.*' reads texts"),
        ("vit", TEXTS, "holds texts, but the backbone '.*' reads images"),
        ("vit", {"a": [("x", "y")], "b": [("z", "y")]}, "holds pairs of texts, but"),
        ("vit", IMAGES | {"p": IMAGES["p"][0]}, "'p' are one image: expected a list of images"),
        ("vit", IMAGES | {"p": [np.zeros((8, 8))]}, "(?s)'p' holds array.*or a PIL image"),
        ("vit", IMAGES | {"p": ["a path.png"]}, "mixes texts and images"),
        ("vit", image_rows([0, 0, 1, 1], decode=False), "one of strings or of decoded images"),
        ("vit", image_rows([0, 0, 1, 1]).add_column("caption", ["a", "b", "c", "d"]), "one ClassLabel and one of"),
        ("llama", TEXTS | {"p": [("a", " ")]}, "'p' holds .*a tuple of two such texts"),
        ("llama", TEXTS | {"p": [("a", "b", "c")]}, "'p' holds "),
        ("llama", TEXTS | {"p": [["a", "b"]]}, "'p' holds "),
        ("llama", TEXTS | {"p": [("a", "b")]}, "mixes texts and pairs of texts"),
        ("llama", {"p one": ["a"], "p two": ["b"]}, r"\['p one', 'p two'\] begin with the same token"),
    ],
)
def test_wrong_support_is_refused(kind: str, support: Any, message: str) -> None:
    pipe, _ = PIPELINES[kind]()
    for call in (pipe, pipe.encode_support):
        with pytest.raises(ValueError, match=message):
            call(support)


def test_adapters_that_nothing_could_classify_with_are_refused() -> None:
    bert, backbone = tiny_pipeline()
    codec = AdapterCodec.from_backbone(backbone, tiny_lora_config(task_type=None))
    denoiser = MCDiDenoiser.from_layout(codec.layout, cond_dim=8, dim=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="no head: expected a causal language model.*'mean'"):
        MCDiPipeline(denoiser, bert.task_encoder, codec, bert.scheduler)
