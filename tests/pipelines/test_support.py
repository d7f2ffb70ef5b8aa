"""What may be handed in as a support set: texts, data sets, encoded batches; and what may not."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from tiny import assert_close, seeded, tiny_image_pipeline, tiny_pipeline

from mcdi_hf import MCDiPipeline
from mcdi_hf.data.augmentation import augmented_views


SUPPORT = {"first": ["a b c", "a c", "b a"], "second": ["x y z", "z y"]}
TASKS = [
    SUPPORT,
    {"one": ["a x"], "two": ["b y b y"], "three": ["c z", "z c"], "four": ["a a a"]},
    {"u": ["c"], "v": ["b", "a c"]},
]


@pytest.fixture(scope="module")
def pipe() -> MCDiPipeline:
    pipe, _ = tiny_pipeline()
    return pipe


@pytest.mark.parametrize("output_type", ["peft", "pt", "latent"])
def test_an_encoded_support_is_the_support(pipe: MCDiPipeline, output_type: str) -> None:
    batch, settings = pipe.encode_support(TASKS), {"num_inference_steps": 3, "output_type": output_type}
    for first, size in ((0, 3), (0, 2), (1, 2)):  # handed in whole, in parts, and some of it
        found, expected = (
            pipe(support[first:], generator=seeded(), batch_size=size, **settings).adapters
            for support in (batch, TASKS)
        )
        if output_type == "peft":
            assert [one.labels for one in found] == [one.labels for one in expected] == list(map(list, TASKS[first:]))
            assert {one.support is None for one in found} == {True}  # its texts are not in it
            found, expected = ([one.tensors for one in adapters] for adapters in (found, expected))
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["examples", "classes"])
def test_a_batch_that_lacks_something_is_refused(pipe: MCDiPipeline, name: str) -> None:
    batch = replace(pipe.encode_support(TASKS), **{name: None})
    with pytest.raises(ValueError, match="no examples or no classes: expected what encode_support returns"):
        pipe(batch)


def make_dataset(**columns: list) -> Dataset:
    features = {name: Value("string") for name in columns if name != "intent"}
    return Dataset.from_dict(columns, Features({**features, "intent": ClassLabel(names=["none", "first", "second"])}))


@pytest.mark.parametrize("first", [1, 2])
def test_dataset_is_the_dict_in_the_order_of_its_class_names(pipe: MCDiPipeline, first: int) -> None:
    rows = [(text, index) for index, examples in enumerate(SUPPORT.values(), start=1) for text in examples]
    rows.sort(key=lambda row: row[1] != first)
    texts, labels = (list(column) for column in zip(*rows))
    dataset = make_dataset(query=texts, intent=labels)
    found, expected = (pipe(one, generator=seeded()).adapters[0] for one in (dataset, SUPPORT))
    assert found.labels == expected.labels and found.support == expected.support == SUPPORT
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        ({"only": ["a"]}, ValueError, r"\['only'\].*at least two"),
        ([], ValueError, "empty"),
        ({"first": [], "second": ["a"]}, ValueError, "'first' has no example"),
        ({"first": ["a", " "], "second": ["a"]}, ValueError, "'first' holds ' '"),
        ({"first": ["a", 3], "second": ["a"]}, ValueError, "'first' holds 3"),
        ({"first": "a b", "second": ["a"]}, ValueError, "'first' are one string"),
        ({"": ["a"], "second": ["a"]}, ValueError, "'' is no label"),
        ({0: ["a"], 1: ["a"]}, ValueError, "0 is no label"),
        ({"first": torch.zeros(1, 99), "second": torch.zeros(1, 99)}, ValueError, "'first' holds tensor"),
        ({**SUPPORT, "first": [("a", "b")]}, ValueError, "mixes texts and pairs of texts"),
        ("a text", TypeError, "is a str"),
        ([["a"], ["b"]], TypeError, "is a list"),
        (
            make_dataset(text=["a", "b"], more=["c", "d"], intent=[1, 2]),
            ValueError,
            "one ClassLabel and one of strings",
        ),
        (make_dataset(intent=[1, 2]), ValueError, "one ClassLabel and one of strings"),
        (make_dataset(text=["a", "b", "c"], intent=[1, 2, -1]), ValueError, "without a label in 'intent'"),
    ],
)
def test_wrong_support_is_refused(pipe: MCDiPipeline, support: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(support)


def test_in_bfloat16_the_statistics_stay_float32() -> None:
    pipe, _ = tiny_pipeline()
    settings = {"num_inference_steps": 3, "num_candidates": 2}
    expected = pipe.select(pipe(SUPPORT, generator=seeded(), **settings)).adapters[0]
    basis = {name: value.clone() for name, value in pipe.codec.state_dict().items()}
    pipe.to(torch.bfloat16)
    assert {part.dtype for part in (pipe, pipe.denoiser, pipe.task_encoder, pipe.codec)} == {torch.bfloat16}
    assert all(value.equal(basis[name]) for name, value in pipe.codec.state_dict().items())
    output = pipe(SUPPORT, generator=seeded(), **settings)
    found = pipe.select(output).adapters[0]
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}
    free, expected_free = (one.details.support_losses["shared adapter"] for one in (found, expected))
    assert free == pytest.approx(expected_free, rel=1e-5)
    assert all(torch.isfinite(value).all() for value in pipe.refine(output, num_steps=2).adapters[0].tensors.values())


def test_heads_are_made_of_all_views_of_the_support() -> None:
    made, backbone = tiny_image_pipeline()
    for wrong in (0, 10**9):
        with pytest.raises(ValueError, match=f"support_views is {wrong}: expected 1 to 64"):
            MCDiPipeline(**made.components, support_views=wrong)
    pipe = MCDiPipeline(**made.components, support_views=3)
    pipe.backbone = backbone
    pipe.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    tasks = [{"p": images[:3], "q": images[3:5], "r": images[5:]}, {"p": images[:1], "q": images[1:2]}]
    batch = pipe(pipe.encode_support(tasks), generator=[seeded(0), seeded(1)]).adapters
    for seed, task in enumerate(tasks):
        (alone,) = pipe(task, generator=seeded(seed)).adapters
        torch.testing.assert_close(batch[seed].tensors, alone.tensors, rtol=1e-3, atol=1e-3)
        own = {key: value.unsqueeze(0) for key, value in alone.tensors.items()}
        views = augmented_views([image for group in task.values() for image in group], 3)
        features = pipe.stacked.features_of_all(own, pipe.stacked.encode(views))[None]
        members = torch.tensor([[c for c, group in enumerate(task.values()) for _ in group] * 3])
        weight, bias = pipe.codec.head(features, members, torch.ones(1, len(task), dtype=torch.bool))
        assert_close(alone.tensors[pipe.codec.layout.head_keys[0]], weight[0])
        assert_close(alone.tensors[pipe.codec.layout.head_keys[1]], bias[0])
