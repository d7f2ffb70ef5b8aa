"""Pipelines for a language model, whose adapters have no head, and for images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import assert_close, seeded, tiny_image_pipeline, tiny_language_pipeline, tiny_lora_config, tiny_pipeline

from mcdi_hf import AdapterCodec, FrozenBackbone, MCDiDenoiser, MCDiPipeline


RANDOM = np.random.default_rng(0)


def noise_image(mode: str = "RGB") -> Image.Image:
    shape = (8, 8, 3) if mode == "RGB" else (8, 8)
    return Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))


TEXTS = {"p": ["a b c", "a c", "b a"], "q": ["x y z", "z y"], "r": ["k l", "m"]}
IMAGES = {label: [noise_image(), noise_image("L")] for label in ("cat", "dog", "owl")}
SUPPORTS = {"llama": TEXTS, "vit": IMAGES}
Made = tuple[MCDiPipeline, FrozenBackbone, dict]


@pytest.fixture(scope="module", params=list(SUPPORTS))
def made(request: pytest.FixtureRequest) -> Made:
    pipe, backbone = {"llama": tiny_language_pipeline, "vit": tiny_image_pipeline}[request.param]()
    return pipe, backbone, SUPPORTS[request.param]


@pytest.fixture(scope="module")
def llama() -> MCDiPipeline:
    pipe, _ = tiny_language_pipeline()
    return pipe


def test_an_adapter_has_the_tensors_of_its_layout(made: Made) -> None:
    pipe, backbone, support = made
    (adapter,) = pipe(support, num_candidates=2, num_inference_steps=3, generator=seeded()).adapters
    layout = pipe.codec.layout
    assert adapter.labels == list(support) and adapter.details["shots"] == [len(one) for one in support.values()]
    assert {key: tuple(value.shape) for key, value in adapter.tensors.items()} == layout.shapes(len(support))
    assert bool(layout.head_keys) != backbone.is_causal_lm
    flat = pipe(support, num_inference_steps=3, output_type="pt").adapters
    assert flat.shape == (1, layout.width(len(support)))
    latent = pipe([support, dict(list(support.items())[:2])], num_inference_steps=3, output_type="latent").adapters
    heads = 0 if backbone.is_causal_lm else len(support)
    assert latent.shape == (2, pipe.codec.num_lora_tokens + heads, layout.token_dim)


def test_strength_zero_is_the_mean_adapter(made: Made) -> None:
    pipe, backbone, support = made
    mean = pipe.codec.mean_adapter()
    for adapter in (pipe.baseline(support), pipe(support, strength=0.0, num_inference_steps=2).adapters[0]):
        assert all(adapter.tensors[key].equal(value[0]) for key, value in mean.items())
    generated = pipe(support, num_inference_steps=2, generator=seeded()).adapters[0]
    assert not any(torch.allclose(generated.tensors[key], value[0]) for key, value in mean.items())


def test_words_are_the_head_of_a_language_model(llama: MCDiPipeline) -> None:
    weights, biases = llama.stacked.word_heads([tuple(TEXTS), ("q", "p")])
    head, ids = llama.backbone.model.lm_head.weight, llama.backbone.processor.convert_tokens_to_ids
    assert weights[0].equal(head[ids(list(TEXTS))]) and weights[1, :2].equal(head[ids(["q", "p"])])
    assert not weights[1, 2].any() and not biases.any()
    features = torch.cat(list(llama.embed(TEXTS).values()))
    expected = logits_in_peft(
        llama.baseline(TEXTS), llama.backbone, [text for group in TEXTS.values() for text in group]
    )
    assert_close(features @ weights[0].T, expected)


def test_permuted_classes_leave_the_matrices_alone(made: Made) -> None:
    pipe, _, support = made
    turned = dict(reversed(support.items()))
    plain, other = (pipe(one, temperature=0.0, num_inference_steps=3).adapters[0] for one in (support, turned))
    assert other.labels == plain.labels[::-1]
    for key, value in plain.tensors.items():
        expected = value.flip(0) if key in pipe.codec.layout.head_keys else value
        assert_close(other.tensors[key], expected)


def test_the_condition_is_seen(made: Made) -> None:
    pipe, _, support = made
    mixed = dict(zip(support, [*list(support.values())[1:], list(support.values())[0][:1]]))
    settings = {"temperature": 0.0, "num_inference_steps": 3, "output_type": "pt"}
    plain, other = pipe(support, **settings).adapters, pipe(support, condition=mixed, **settings).adapters
    assert not torch.allclose(plain, other, atol=1e-3)
    assert_close(pipe(support, condition=support, **settings).adapters, plain)


def test_a_batch_is_its_tasks_one_by_one(made: Made) -> None:
    pipe, _, support = made
    tasks = [support, dict(list(support.items())[:2])]
    settings = {"num_candidates": 2, "combine": "select", "num_inference_steps": 3}
    batch = pipe(tasks, generator=[seeded(0), seeded(1)], **settings).adapters
    for seed, (task, adapter) in enumerate(zip(tasks, batch)):
        single = pipe(task, generator=seeded(seed), **settings).adapters[0]
        assert_close(adapter.tensors, single.tensors)
        assert adapter.details["support_loss"] == pytest.approx(single.details["support_loss"], rel=1e-4)


def test_features_in_place_of_examples(made: Made) -> None:
    pipe, backbone, support = made
    features = pipe.embed(support)
    assert [value.shape for value in features.values()] == [(len(v), backbone.feature_dim) for v in support.values()]
    adapters = [pipe(one, num_inference_steps=3, generator=seeded()).adapters[0] for one in (support, features)]
    assert_close(adapters[0].tensors, adapters[1].tensors)


def logits_in_peft(adapter, backbone: FrozenBackbone, examples: list) -> torch.Tensor:
    """The logits of the classes, example by example, as PEFT has them."""
    model = adapter.load_into(backbone.classifier(num_labels=len(adapter.labels)))
    rows = []
    for example in examples:
        with torch.no_grad():
            logits = model(**backbone.inputs([example])).logits[0]
        if backbone.is_causal_lm:
            words = [
                backbone.processor(f" {label}", add_special_tokens=False).input_ids[0] for label in adapter.labels
            ]
            logits = logits[-1, words]
        rows.append(logits)
    return torch.stack(rows)


def test_the_stack_says_what_peft_says(made: Made) -> None:
    pipe, backbone, support = made
    adapter = pipe(support, num_inference_steps=3, generator=seeded(), strength=3.0).adapters[0]
    examples = [example for group in support.values() for example in group]
    encoded = pipe.stacked.encode(examples)
    own = {key: value.unsqueeze(0) for key, value in adapter.tensors.items()}
    words = pipe.stacked.word_heads([tuple(adapter.labels)])
    found = pipe.stacked.logits(own, encoded[torch.arange(len(examples))], words=words)[0]
    torch.testing.assert_close(found, logits_in_peft(adapter, backbone, examples), rtol=1e-4, atol=1e-4)
    assert (found - found.mean(dim=0)).abs().max() > 1e-2


def test_saved_and_loaded(made: Made, tmp_path: Path) -> None:
    pipe, _, support = made
    pipe.save_pretrained(tmp_path)
    loaded = MCDiPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    adapters = [one(support, num_inference_steps=3, generator=seeded()).adapters[0] for one in (pipe, loaded)]
    assert_close(adapters[1].tensors, adapters[0].tensors)


def test_pairs_of_texts(llama: MCDiPipeline) -> None:
    pairs = {label: [("a", text) for text in texts] for label, texts in TEXTS.items()}
    lines = {label: ["\n".join(pair) for pair in texts] for label, texts in pairs.items()}
    assert_close(llama.embed(pairs), llama.embed(lines))  # a language model reads them as two lines
    bert, _ = tiny_pipeline()
    separate = {label: [f"{pair[0]} [SEP] {pair[1]}" for pair in texts] for label, texts in pairs.items()}
    assert not any(torch.allclose(value, bert.embed(separate)[label]) for label, value in bert.embed(pairs).items())
    assert bert(pairs, num_inference_steps=2).adapters[0].labels == list(pairs)


def image_rows(labels: list[int], **feature: bool) -> Dataset:
    images = [image for group in IMAGES.values() for image in group][: len(labels)]
    features = Features({"photo": ImageFeature(), "animal": ClassLabel(names=list(IMAGES))})
    dataset = Dataset.from_dict({"photo": images, "animal": labels}, features)
    return dataset.cast_column("photo", ImageFeature(**feature)) if feature else dataset


@pytest.mark.parametrize("format_name", [None, "numpy"])
def test_images_of_a_dataset(format_name: str | None) -> None:
    pipe, _ = tiny_image_pipeline()
    assert_close(pipe.embed(image_rows([0, 0, 1, 1, 2, 2]).with_format(format_name)), pipe.embed(IMAGES))


@pytest.mark.parametrize(
    ("kind", "support", "message"),
    [
        ("llama", IMAGES, "holds images, but the backbone '.*' reads texts"),
        ("vit", TEXTS, "holds texts, but the backbone '.*' reads images"),
        ("vit", {"a": [("x", "y")], "b": [("z", "y")]}, "holds pairs of texts, but"),
        ("vit", IMAGES | {"cat": IMAGES["cat"][0]}, "'cat' are one image: expected a list of images"),
        ("vit", IMAGES | {"cat": [np.zeros((8, 8))]}, "(?s)'cat' holds array.*or a PIL image"),
        ("vit", IMAGES | {"cat": ["a path.png"]}, "mixes texts and images"),
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
    pipe, _ = {"llama": tiny_language_pipeline, "vit": tiny_image_pipeline}[kind]()
    for call in (pipe, pipe.baseline, pipe.embed):
        with pytest.raises(ValueError, match=message):
            call(support)


def test_latents_of_adapters_without_a_head_have_no_head(llama: MCDiPipeline) -> None:
    count, width = llama.codec.num_lora_tokens, llama.codec.layout.token_dim
    with pytest.raises(ValueError, match=rf"\(1, {count + 3}, {width}\): expected \(1, {count}, {width}\)"):
        llama(TEXTS, latents=torch.zeros(1, count + 3, width))


def test_adapters_that_nothing_could_classify_with_are_refused(llama: MCDiPipeline) -> None:
    with pytest.raises(ValueError, match="no head.*got pooling 'last_token' and 'generated'"):
        MCDiPipeline(**llama.components, imprint_from="generated")
    bert, backbone = tiny_pipeline()
    codec = AdapterCodec.from_backbone(backbone, tiny_lora_config(task_type=None), token_dim=20)
    denoiser = MCDiDenoiser.from_layout(codec.layout, cond_dim=8, dim=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="no head: expected a causal language model.*'mean'"):
        MCDiPipeline(denoiser, bert.task_encoder, codec, bert.scheduler)
