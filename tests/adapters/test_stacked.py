"""N adapters in one pass are N adapters in PEFT, forwards and backwards."""

import pytest
import torch
from tiny import LORA_SETTINGS, in_peft, random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterLayout, StackedLora


TEXTS = [["a b c", "x y", "q", "m n o p"], ["z", "a a a", "b c d e f", "k l"], ["t u v", "w", "g h", "i j i j"]]


@pytest.mark.parametrize("pooling", ["mean", "default"])
@pytest.mark.parametrize("settings", LORA_SETTINGS)
def test_a_stack_equals_each_adapter_in_peft(pooling: str, settings: dict) -> None:
    backbone, config = tiny_backbone(pooling), tiny_lora_config(**settings)
    layout = AdapterLayout.from_model(backbone.model, config)
    stacked = StackedLora(backbone, layout)
    tensors = {key: value.requires_grad_() for key, value in random_adapters(layout, len(TEXTS)).items()}
    examples = stacked.encode([text for texts in TEXTS for text in texts])
    logits = stacked.logits(tensors, examples[torch.arange(len(examples))])
    logits.square().sum().backward()
    for index, texts in enumerate(TEXTS):
        model = in_peft(backbone, config, tensors, index)
        expected = model(**backbone.inputs(texts)).logits
        torch.testing.assert_close(logits[index], expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert len(grads) == len(tensors)
        for name, grad in grads.items():
            key = name.replace(".default", "").replace(".modules_to_save", "")
            torch.testing.assert_close(tensors[key].grad[index], grad, rtol=1e-4, atol=1e-5)


def test_features_of_all_keeps_the_order_of_its_rows_and_ignores_padding() -> None:
    backbone = tiny_backbone()
    layout = AdapterLayout.from_model(backbone.model, tiny_lora_config())
    stacked = StackedLora(backbone, layout)
    tensors = random_adapters(layout, 1)
    texts = [text for group in TEXTS for text in group]
    found = stacked.features_of_all(tensors, stacked.encode(texts), torch.tensor([7, 2, 11]))
    alone = [stacked.features_of_all(tensors, stacked.encode([texts[row]])) for row in (7, 2, 11)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_padding_classes_get_no_probability() -> None:
    backbone = tiny_backbone()
    layout = AdapterLayout.from_model(backbone.model, tiny_lora_config())
    stacked = StackedLora(backbone, layout)
    tensors = random_adapters(layout, 2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    examples = stacked.encode(TEXTS[0])
    logits = stacked.logits(tensors, examples[torch.arange(4)], mask)
    assert (logits[0, :, 2] == float("-inf")).all() and torch.isfinite(logits[1]).all()
