"""Every family of backbones with adapters of every kind, and tasks for them."""

import dataclasses
import string

import numpy as np
from peft import LoraConfig
from PIL import Image
from tiny import (
    LORA_SETTINGS,
    tiny_backbone,
    tiny_dataset,
    tiny_image_backbone,
    tiny_language_model,
    tiny_lora_config,
)
from versions import VIT_QUERY, VIT_WIDE

from mcdi_hf import EpisodeSampler, FrozenBackbone, LabelledRows, Task


def text_tasks(number: int = 4) -> tuple[list[str], list[Task]]:
    dataset = tiny_dataset()
    sampler = EpisodeSampler(LabelledRows(dataset, "label", "domain"), (2, 4), (4, 6), 2, seed=1)
    tasks = [sampler[index] for index in range(number)]
    assert len({len(task.classes) for task in tasks}) > 1
    # letters, so that a language model of letters has a word for every class
    return dataset["text"][:], [
        dataclasses.replace(task, classes=tuple(string.ascii_lowercase[: len(task.classes)])) for task in tasks
    ]


def image_tasks() -> tuple[list[Image.Image], list[Task]]:
    random = np.random.default_rng(4)
    images = [Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(24)]
    tasks = [
        Task(tuple("abc"), ((0, 1, 2), (3, 4, 5), (6, 7, 8)), ((9,), (10,), (11,)), "all"),
        Task(tuple("de"), ((12, 13, 14), (15, 16, 17)), ((18, 19, 20), (21, 22, 23)), "all"),
    ]
    return images, tasks


def vit_config(**overrides) -> LoraConfig:
    settings = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [VIT_QUERY, VIT_WIDE],
        "modules_to_save": ["classifier"],
        "layers_to_transform": [1, 2],
    }
    return LoraConfig(**(settings | overrides))


def llama_config(**overrides) -> LoraConfig:
    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**(settings | overrides))


def dinov2() -> FrozenBackbone:
    return tiny_image_backbone("dinov2")


PATTERNS = {"r": 4, "rank_pattern": {VIT_QUERY: 1}, "alpha_pattern": {rf"layers?\.2\..*{VIT_QUERY}": 9}}
FAMILIES = {
    **{f"bert {index}": (tiny_backbone, tiny_lora_config(**settings)) for index, settings in enumerate(LORA_SETTINGS)},
    "bert, CLS": (lambda: tiny_backbone("default"), tiny_lora_config()),
    "bert without a head": (tiny_backbone, tiny_lora_config(task_type=None)),
    "vit": (tiny_image_backbone, vit_config()),
    "vit, patterns": (tiny_image_backbone, vit_config(**PATTERNS)),
    "vit, rslora without a head": (tiny_image_backbone, vit_config(use_rslora=True, modules_to_save=None)),
    "dinov2": (dinov2, vit_config(layers_to_transform=None)),
    "dinov2 without a head": (dinov2, vit_config(modules_to_save=None, lora_alpha=1)),
    "llama": (tiny_language_model, llama_config()),
    "llama, patterns": (tiny_language_model, llama_config(layers_to_transform=[1, 2], **PATTERNS)),
    "llama, rslora": (tiny_language_model, llama_config(use_rslora=True, layers_to_transform=[2])),
}


EXAMPLES = {False: text_tasks()[0], True: image_tasks()[0]}
