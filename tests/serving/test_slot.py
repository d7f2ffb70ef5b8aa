"""A swap into a live PEFT model is what loading the adapter anew would be, and copies tensors alone."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from served import KINDS, changed, examples_for, make_adapter, make_codec

from mcdi_hf import AdapterCodec, AdapterSlot, FrozenBackbone, GeneratedAdapter


Made = tuple[FrozenBackbone, AdapterCodec, PeftModel, AdapterSlot]


def make(kind: str = "bert") -> Made:
    backbone, codec = make_codec(kind)
    model = make_adapter(codec, 0).load_into(backbone.classifier(num_labels=3))
    return backbone, codec, model, AdapterSlot(model)


@torch.no_grad()
def logits(model: PeftModel, backbone: FrozenBackbone) -> torch.Tensor:
    return model(**backbone.inputs(examples_for(backbone))).logits


def freshly_loaded(backbone: FrozenBackbone, adapter: GeneratedAdapter) -> PeftModel:
    return adapter.load_into(backbone.classifier(num_labels=3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_equals_a_freshly_loaded_adapter(kind: str) -> None:
    backbone, codec, model, slot = make(kind)
    before = logits(model, backbone)
    for seed in (1, 2, 0):
        adapter = make_adapter(codec, seed)
        slot.swap(adapter)
        fresh = freshly_loaded(backbone, adapter)
        assert torch.equal(logits(model, backbone), logits(fresh, backbone))
        assert (model.config.id2label, model.config.label2id) == (fresh.config.id2label, fresh.config.label2id)
        assert torch.equal(logits(model, backbone), before) == (seed == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_copies_tensors_and_nothing_else(kind: str) -> None:
    backbone, codec, model, slot = make(kind)
    adapter = make_adapter(codec, 1)
    modules = list(model.modules())
    places = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    slot.swap(adapter)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    for name, parameter in model.named_parameters():
        assert parameter is places[name][0] and parameter.data_ptr() == places[name][1]
        assert not parameter.requires_grad
    different = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(different) == len(adapter.tensors)
    assert all("lora_" in name or "modules_to_save" in name for name in different)
    labels = {"id2label": adapter.id2label, "label2id": {name: index for index, name in enumerate(adapter.labels)}}
    assert model.config.to_dict() == config | labels
    assert not model.training and model.active_adapter == "default"


def test_a_model_that_was_read_from_a_folder_and_any_mode(tmp_path: Path) -> None:
    backbone, codec, _, _ = make()
    make_adapter(codec, 0).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(backbone.classifier(num_labels=3), tmp_path).eval()
    slot = AdapterSlot(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for seed in (1, 2):
            adapter = make_adapter(codec, seed)
            with mode():
                slot.swap(adapter)
            assert torch.equal(logits(model, backbone), logits(freshly_loaded(backbone, adapter), backbone))


def test_parameters_that_train_stay_leaves() -> None:
    backbone, codec, model, slot = make()
    model.set_adapter("default")
    slot.swap(make_adapter(codec, 1))
    model(**backbone.inputs(["a b"])).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.is_leaf and parameter.grad is not None for parameter in trained)


def test_one_of_several_adapters() -> None:
    backbone, codec, model, _ = make()
    second = make_adapter(codec, 1)
    second.load_into(model, adapter_name="other")
    slot = AdapterSlot(model, "other")
    swapped = make_adapter(codec, 2)
    slot.swap(swapped)
    assert torch.equal(logits(model, backbone), logits(freshly_loaded(backbone, swapped), backbone))
    model.set_adapter("default")
    first = freshly_loaded(backbone, make_adapter(codec, 0))
    assert torch.equal(logits(model, backbone), logits(first, backbone))
    with pytest.raises(ValueError, match=r"active adapters are \['default'\]: call model.set_adapter\('other'\)"):
        slot.swap(second)
    with pytest.raises(ValueError, match=r"no adapter 'third': expected one of \['default', 'other'\]"):
        AdapterSlot(model, "third")


def test_a_merged_adapter() -> None:
    backbone, codec, model, slot = make()
    model.merge_adapter()
    before = logits(model, backbone)
    with pytest.raises(ValueError, match="'default' is merged into the backbone: call model.unmerge_adapter"):
        slot.swap(make_adapter(codec, 1))
    assert torch.equal(logits(model, backbone), before)
    model.unmerge_adapter()
    slot.swap(make_adapter(codec, 1))


@pytest.mark.parametrize(
    ("settings", "ways", "message"),
    [
        ({}, 2, r"classifier.weight': \(2, 16\).*expected .*\(3, 16\)"),
        ({"r": 4}, 3, r"lora_A.weight': \(4, 16\).*expected .*\(2, 16\)"),
        ({"target_modules": ["query", "key"]}, 3, "key.*: \\(.*value.*: None.*expected .*key.*: None"),
        ({"lora_alpha": 9}, 3, "adapter's lora_alpha is 9, the model's 4"),
        ({"use_rslora": True}, 3, "adapter's use_rslora is True, the model's False"),
        ({"alpha_pattern": {"query": 9}}, 3, "adapter's alpha_pattern is {'query': 9}, the model's {}"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(settings: dict, ways: int, message: str) -> None:
    backbone, _, model, slot = make()
    before, config = logits(model, backbone), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        slot.swap(make_adapter(make_codec("bert", **settings)[1], 1, ways))
    assert torch.equal(logits(model, backbone), before) and model.config.to_dict() == config


def test_adapters_without_a_place_or_of_another_backbone() -> None:
    backbone, codec, model, slot = make()
    adapter = make_adapter(codec, 1)
    before = logits(model, backbone)
    key = next(iter(adapter.tensors))
    with pytest.raises(ValueError, match="does not fit the model: it has .*layer.1.*: None"):
        slot.swap(dataclasses.replace(adapter, tensors={k: v for k, v in adapter.tensors.items() if k != key}))
    with pytest.raises(ValueError, match="it has {'more'"):
        slot.swap(changed(adapter, "more", torch.zeros(1)))
    for change in ({"name_or_path": "other/base"}, {"model_class": "BertForSequenceClassification"}):
        with pytest.raises(ValueError, match=f"for the .*{next(iter(change.values()))}.*the model is the MeanPooled"):
            slot.swap(dataclasses.replace(adapter, base_model=adapter.base_model | change))
    assert torch.equal(logits(model, backbone), before)
