"""Backbones of every family that people have: their defaults, and adapters on them that say what PEFT says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import (
    logits_in_peft,
    pipeline_for,
    seeded,
    tiny_backbone_folder,
    tiny_image_backbone,
    tiny_image_dataset,
    tiny_language_model,
)
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)
from versions import VIT_QUERY, needs

from mcdi_hf import FrozenBackbone
from mcdi_hf.backbones.layers import modules_to_adapt


VIT_WIDE = {"initializer_range": 0.3}  # with their own initialisation all examples look alike
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, **VIT_WIDE}
DISTILBERT = {"vocab_size": 31, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, **VIT_WIDE}
PIXELS = {"image_size": 8, "patch_size": 4}
WORDS = SIZES | {"vocab_size": 31}
# What a checkpoint on the Hub is, the pooling that suits it, and how many modules two of its four layers have.
FAMILIES: dict[str, tuple[Callable, str, int]] = {
    "bert": (lambda: BertModel(BertConfig(**WORDS)), "default", 13),
    "bert without pooler": (lambda: BertModel(BertConfig(**WORDS), add_pooling_layer=False), "mean", 12),
    "roberta": (lambda: RobertaModel(RobertaConfig(pad_token_id=0, **WORDS)), "mean", 12),
    "distilbert": (lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)), "mean", 12),
    "distilbert, tuned": (
        lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT)),
        "mean",  # PEFT would take its pre_classifier for a head
        12,
    ),
    "modernbert": (lambda: ModernBertModel(ModernBertConfig(pad_token_id=0, **WORDS)), "mean", 8),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZES, **PIXELS)), "default", 12),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **PIXELS)), "default", 12),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**WORDS)), "last_token", 14),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **WORDS)), "last_token", 14),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=8, **WORDS)), "last_token", 14),
}


NEWER = {"modernbert": needs("transformers", "5.1", "flattens the batch of a ModernBERT")}


@pytest.mark.parametrize("family", [pytest.param(name, marks=NEWER.get(name, ())) for name in FAMILIES])
def test_defaults_suit_the_model_and_a_stack_says_what_peft_says(family: str, tmp_path: Path) -> None:
    make, pooling, count = FAMILIES[family]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    if pooling == "last_token":
        tiny_language_model().processor.save_pretrained(tmp_path)
    elif family in ("vit", "dinov2"):
        tiny_image_backbone().processor.save_pretrained(tmp_path)
    else:
        AutoTokenizer.from_pretrained(tiny_backbone_folder()).save_pretrained(tmp_path)
    backbone = FrozenBackbone.suited(str(tmp_path), dtype=torch.float32)
    names = modules_to_adapt(backbone, None, None)
    assert backbone.pooling == pooling and len(names) == count
    if backbone.reads_images:
        config = LoraConfig(r=2, target_modules=names, modules_to_save=["classifier"])
    else:
        config = LoraConfig(task_type="CAUSAL_LM" if backbone.is_causal_lm else "SEQ_CLS", r=2, target_modules=names)
    pipe, _ = pipeline_for(backbone, config)
    pipe.set_progress_bar_config(disable=True)
    texts = ["a b", "c d e f", "x", "z z y"]
    examples = tiny_image_dataset()["image"][:4] if backbone.reads_images else texts
    support = {"p": examples[:2], "q": examples[2:]}
    (adapter,) = pipe(support, generator=seeded()).adapters
    for key in pipe.codec.layout.head_keys:  # a head of random numbers shows every difference of features
        adapter.tensors[key] = 10 * torch.randn(adapter.tensors[key].shape, generator=seeded(1))
    stack = {key: value.unsqueeze(0) for key, value in adapter.tensors.items()}
    found = pipe.stacked.logits(stack, pipe.encode_support(support))[0]
    torch.testing.assert_close(found, logits_in_peft(backbone, adapter, examples), rtol=1e-4, atol=1e-4)
    assert (found - found.mean(dim=0)).abs().max() > 1e-3


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"layers has \[3, 7\]: the backbone has the layers 0 to 2"):
        modules_to_adapt(tiny_image_backbone(), [VIT_QUERY], [1, 3, 7])
