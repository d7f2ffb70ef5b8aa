"""Random adapters as the pipeline hands them out, on backbones of every kind."""

import dataclasses

import numpy as np
import torch
from PIL import Image
from tiny import random_adapters, tiny_backbone, tiny_image_backbone, tiny_language_model, tiny_lora_config
from versions import VIT_LINEAR

from mcdi_hf import AdapterCodec, FrozenBackbone, GeneratedAdapter
from mcdi_hf.adapters.generated import GenerationDetails


RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
TEXTS = ["a b c", "x y", "q", "m n o p", "a b c", ("z", "a a a"), "b c d e f", "k l"]
KINDS = ("bert", "vit", "llama")


def make_codec(kind: str, **settings) -> tuple[FrozenBackbone, AdapterCodec]:
    """A tiny backbone and the codec of its adapters, whose layout and records are those of generated ones."""
    if kind == "bert":
        backbone, own = tiny_backbone(), {}
    elif kind == "vit":
        own = {"task_type": None, "target_modules": VIT_LINEAR, "modules_to_save": ["classifier"]}
        backbone, own["layers_to_transform"] = tiny_image_backbone(), [0, 1, 2]
    else:
        backbone, own = tiny_language_model(), {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    return backbone, AdapterCodec.from_backbone(backbone, tiny_lora_config(**(own | settings)))


def make_adapter(codec: AdapterCodec, seed: int = 0, ways: int = 3) -> GeneratedAdapter:
    tensors = random_adapters(codec.layout, 1, ways, seed)
    return GeneratedAdapter(
        tensors={key: value[0].contiguous() for key, value in tensors.items()},
        lora_config=codec.config.lora_config,
        base_model=codec.config.base_model,
        labels=["abcdefgh"[(seed + place) % 8] for place in range(ways)],
        details=GenerationDetails(shots=[1] * ways),
    )


def changed(adapter: GeneratedAdapter, key: str, value: torch.Tensor) -> GeneratedAdapter:
    """The adapter with another tensor in one place."""
    return dataclasses.replace(adapter, tensors=adapter.tensors | {key: value})


def examples_for(backbone: FrozenBackbone) -> list:
    return IMAGES if backbone.reads_images else TEXTS
