"""A backbone cut in two is the whole backbone."""

import pytest
import torch
from tiny import frozen_features, tiny_backbone

from mcdi_hf.backbones.layers import LowerLayers, UpperLayers, modules_to_adapt, split_point


TEXTS = ["a b c d e f", "x", "m n", "q r s t"]


@pytest.mark.parametrize("pooling", ["mean", "default"])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_lower_and_upper_layers_make_the_whole(pooling: str, first: int) -> None:
    backbone = tiny_backbone(pooling)
    prefix = "backbone" if pooling == "mean" else "bert"
    names = [f"{prefix}.encoder.layer.{index}.attention.self.query" for index in range(first, 3)]
    examples = LowerLayers(backbone, names)(TEXTS, batch_size=3)
    upper = UpperLayers(backbone, names)
    whole = frozen_features(backbone, TEXTS)
    found = upper(examples[torch.arange(4)])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(upper(examples[torch.tensor([1])]), whole[1:2], rtol=1e-5, atol=1e-6)


def test_the_tokenizer_may_prefer_to_pad_on_the_left() -> None:
    backbone = tiny_backbone()
    names = ["backbone.encoder.layer.1.attention.self.query"]
    expected = LowerLayers(backbone, names)(TEXTS)
    backbone.processor.padding_side = "left"
    found = LowerLayers(backbone, names)(TEXTS)
    assert found.hidden_states.equal(expected.hidden_states) and found.counts.equal(expected.counts)


def test_no_weight_of_a_backbone_is_trainable() -> None:
    backbone = tiny_backbone()
    upper = UpperLayers(backbone, ["backbone.encoder.layer.1.attention.self.query"])
    assert not [
        name
        for name, value in (*backbone.model.named_parameters(), *upper.model.named_parameters())
        if value.requires_grad
    ]


LAYER = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    "names, message",
    [(["classifier"], "one stack of layers"), ([LAYER, "bert.embeddings"], "stand before the layers")],
)
def test_modules_before_or_without_a_stack_of_layers_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpperLayers(tiny_backbone("default"), names)


def test_a_module_behind_the_layers_is_adapted_by_its_dotted_name() -> None:
    backbone = tiny_backbone("default")
    targets = ["query", "output.dense", "pooler.dense"]
    self_query, attention, output = "attention.self.query", "attention.output.dense", "output.dense"
    expected = [f"bert.encoder.layer.2.{name}" for name in (self_query, attention, output)] + ["bert.pooler.dense"]
    assert modules_to_adapt(backbone, targets, [2]) == expected
    assert split_point(backbone.model, expected) == ("bert.encoder.layer", 2)
    assert "bert.pooler.dense" not in modules_to_adapt(backbone, ["dense"], [2])


@pytest.mark.parametrize("targets, layers", [(["q_proj"], [2]), (["query", "pooler"], [2])])
def test_targets_that_name_nothing_are_refused_with_what_there_is(targets: list[str], layers: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"target_modules .* name no linear module .*attention.self.query.*pooler.dense"
    ):
        modules_to_adapt(tiny_backbone("default"), targets, layers)
