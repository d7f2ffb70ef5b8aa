"""A backbone cut in two is the whole backbone."""

import pytest
import torch
from tiny import frozen_features, tiny_backbone

from mcdi_hf.backbones.layers import LowerLayers, UpperLayers


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


@pytest.mark.parametrize("names", [["classifier"], ["backbone.encoder.layer.1.output.dense", "backbone.pooler.dense"]])
def test_modules_outside_one_stack_of_layers_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="one stack of layers"):
        UpperLayers(tiny_backbone(), names)
