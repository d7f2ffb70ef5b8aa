"""N adapters in one pass are N adapters in PEFT, forwards and backwards."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import (
    LORA_SETTINGS,
    assert_close,
    frozen_features,
    in_peft,
    random_adapters,
    tiny_backbone,
    tiny_language_pipeline,
    tiny_lora_config,
)

from mcdi_hf import AdapterLayout, FrozenBackbone, StackedLora
from mcdi_hf.adapters.head import RidgeHead, head_logits
from mcdi_hf.data.episodes import SupportBatch


TEXTS = [["a b c", "x y", "q", "m n o p"], ["z", "a a a", "b c d e f", "k l"], ["t u v", "w", "g h", "i j i j"]]
ROWS = [((0, 1), (2,), (3,)), ((4,), (5, 6), (7,)), ((8, 9), (10, 11))]
CLASSES = [("a", "b", "c"), ("d", "e", "f"), ("g", "h")]


def make(backbone: FrozenBackbone, **settings) -> tuple[StackedLora, SupportBatch]:
    """A stack, and three tasks with what it makes of their texts."""
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config(**settings)))
    examples = stacked.encode([text for texts in TEXTS for text in texts])
    return stacked, replace(SupportBatch.from_rows(ROWS, CLASSES), examples=examples)


WITH_POOLER = {"target_modules": ["bert.encoder.layer.2.output.dense", "pooler.dense"], "layers_to_transform": None}


@pytest.mark.parametrize(
    "pooling, settings",
    [*itertools.product(["mean", "default"], LORA_SETTINGS), ("default", WITH_POOLER)],
)
def test_a_stack_equals_each_adapter_in_peft(pooling: str, settings: dict) -> None:
    backbone = tiny_backbone(pooling)
    stacked, batch = make(backbone, **settings)
    tensors = {key: value.requires_grad_() for key, value in random_adapters(stacked.layout, len(TEXTS)).items()}
    logits = stacked.logits(tensors, batch)
    assert (logits[2, :, 2] == float("-inf")).all()  # of two classes
    heard = batch.class_mask.unsqueeze(1).expand_as(logits)
    logits[heard].square().sum().backward()
    for index, texts in enumerate(TEXTS):
        model = in_peft(backbone, tiny_lora_config(**settings), tensors, index)
        expected = model(**backbone.inputs(texts)).logits[:, : len(CLASSES[index])]
        torch.testing.assert_close(logits[index, :, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert len(grads) == len(tensors)
        for name, grad in grads.items():
            key = name.replace(".default", "").replace(".modules_to_save", "")
            torch.testing.assert_close(tensors[key].grad[index], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, passes", [(1, 3), (4, 3), (5, 2), (32, 1)])
def test_passes_of_any_size_are_one(size: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks of four rows, each padded to its own longest text where it is alone in a pass."""
    backbone, found = tiny_backbone(), {}
    stacked, batch = make(backbone)
    shapes = []
    stacked.upper.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(inputs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    for limit in (10**9, size):
        monkeypatch.setattr("mcdi_hf.adapters.stacked.ROWS_AT_ONCE", limit)
        tensors = {key: value.requires_grad_() for key, value in random_adapters(stacked.layout, 3).items()}
        features = stacked.features(tensors, batch.inputs())
        matrices = [tensors[key] for key in stacked.layout.lora_shapes]
        found[limit] = [features, *torch.autograd.grad(features.square().sum(), matrices)]
    assert len(shapes) == 1 + passes and (passes < 3 or len({length for _, length in shapes[1:]}) > 1)
    assert_close(found[size], found[10**9])


def test_features_of_all_keeps_the_order_of_its_rows_and_ignores_padding() -> None:
    stacked, batch = make(tiny_backbone())
    tensors = random_adapters(stacked.layout, 1)
    texts = [text for group in TEXTS for text in group]
    found = stacked.features_of_all(tensors, batch.examples, torch.tensor([7, 2, 11]))
    alone = [stacked.features_of_all(tensors, stacked.encode([texts[row]])) for row in (7, 2, 11)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_heads_are_made_of_what_each_adapter_sees() -> None:
    backbone, ridge = tiny_backbone(), RidgeHead(1.0, -1.0, 0.1, 3.0)
    stacked, batch = make(backbone)
    silent = {key: torch.zeros(3, *shape) for key, shape in stacked.layout.lora_shapes.items()}
    features = torch.stack([frozen_features(backbone, texts) for texts in TEXTS])
    expected = ridge(features, batch.labels, batch.class_mask)
    assert_close(stacked.heads(batch, ridge, silent), expected)
    # of an adapter its own: no other task's head moves
    loud = random_adapters(stacked.layout, 3)
    tensors = {key: torch.cat([loud[key][:1], value[1:]]) for key, value in silent.items()}
    weight, bias = stacked.heads(batch, ridge, tensors)
    assert not torch.allclose(weight[0], expected[0][0], atol=1e-3)
    assert_close((weight[1:], bias[1:]), (expected[0][1:], expected[1][1:]))


@pytest.mark.parametrize("count", [1, 3])
def test_episodes_in_one_pass_are_heads_and_logits_in_two(count: int) -> None:
    ridge = RidgeHead(1.0, -1.0, 0.1, 3.0)
    stacked, support = make(tiny_backbone())
    query = replace(SupportBatch.from_rows([((5,), (6,), (9,)), ((1,), (2,), (3, 4)), ((0,), (7,))]))
    query.examples = support.examples
    tensors = {key: value for key, value in random_adapters(stacked.layout, count).items() if "lora" in key}
    logits = stacked.episode_logits(tensors, ridge, support, query)
    each = {key: value.expand(3, -1, -1) for key, value in tensors.items()}
    heads = dict(zip(stacked.layout.head_keys, stacked.heads(support, ridge, each)))
    expected = stacked.logits(each | heads, replace(query, class_mask=support.class_mask))
    known = (query.labels >= 0).unsqueeze(-1).expand_as(logits)
    torch.testing.assert_close(logits[known], expected[known], rtol=1e-4, atol=1e-4)


def test_heads_of_a_language_model_are_verbalizers() -> None:
    pipe, backbone = tiny_language_pipeline()
    batch = SupportBatch.from_rows(ROWS, CLASSES, ways=5)
    weight, bias = pipe.stacked.verbalizers(batch)
    assert weight.shape == (3, 5, 16) and bias.shape == (3, 5)
    for task, classes in enumerate(CLASSES):
        expected, _ = backbone.verbalizer(classes)
        assert weight[task, : len(classes)].equal(expected)
        assert not weight[task, len(classes) :].any() and not bias[task].any()
    examples = pipe.stacked.encode([text for texts in TEXTS for text in texts])
    batch = replace(SupportBatch.from_rows(ROWS, CLASSES), examples=examples)
    logits = pipe.stacked.episode_logits(pipe.codec.shared_adapter(3), RidgeHead(), batch, batch)
    features = pipe.stacked.features(pipe.codec.shared_adapter(3), batch.inputs())
    assert_close(logits, head_logits(features, *pipe.stacked.verbalizers(batch), batch.class_mask))
