"""Tiny real components: a random BERT with a tokenizer of single letters, its adapters, and a pipeline for them."""

import atexit
import copy
import functools
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from versions import VIT_QUERY, VIT_VALUE

from mcdi_hf import (
    AdapterCodec,
    AdapterLayout,
    FrozenBackbone,
    GeneratedAdapter,
    LocalConsistencyScheduler,
    MCDiDenoiser,
    MCDiPipeline,
    TaskEncoder,
)
from mcdi_hf.adapters.head import RidgeHead


# What a LoraConfig may ask for, beside the defaults of `tiny_lora_config`.
LORA_SETTINGS = [
    {},
    {"r": 4, "lora_alpha": 1},
    {"r": 4, "use_rslora": True},
    {"r": 4, "rank_pattern": {"value": 1}, "alpha_pattern": {r"layer\.2\.attention\.self\.query": 9}},
    {"target_modules": ["query", "intermediate.dense"], "layers_to_transform": [0, 2]},
]


@functools.cache
def tiny_backbone_folder(seed: int = 0) -> str:
    """A folder with the backbone and its tokenizer, as `AutoModel` and `AutoTokenizer` read them."""
    folder = tempfile.mkdtemp(prefix="tiny_backbone_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
        initializer_range=0.3,  # with BERT's own 0.02 all texts look alike
    )
    BertModel(config).save_pretrained(folder)
    return folder


def tiny_backbone(pooling: str = "mean", seed: int = 0) -> FrozenBackbone:
    return FrozenBackbone.from_pretrained(tiny_backbone_folder(seed), pooling=pooling)


def tiny_image_backbone(family: str = "vit") -> FrozenBackbone:
    """A random ViT or DINOv2 for images of 8 x 8 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    if family == "vit":
        model = ViTForImageClassification(ViTConfig(intermediate_size=32, initializer_range=0.3, **sizes))
    else:
        model = Dinov2ForImageClassification(Dinov2Config(mlp_ratio=2, initializer_range=0.3, **sizes))
    return FrozenBackbone(model, ViTImageProcessor(size={"height": 8, "width": 8}), f"tiny/{family}", "default")


def tiny_language_model() -> FrozenBackbone:
    """A random Llama whose words are single letters."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[EOS]", "Label", ":", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    processor = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )
    return FrozenBackbone(LlamaForCausalLM(config), processor, "tiny/llama", "last_token")


@functools.cache
def saved_folder(kind: str) -> str:
    """A folder with the tiny Llama (`"llama"`) or ViT (`"vit"`) and its processor, as the Auto classes read them."""
    folder = tempfile.mkdtemp(prefix=f"tiny_{kind}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    backbone = tiny_language_model() if kind == "llama" else tiny_image_backbone()
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


def tiny_lora_config(**overrides) -> LoraConfig:
    settings = {
        "task_type": "SEQ_CLS",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
        "layers_to_transform": [1, 2],
    }
    return LoraConfig(**(settings | overrides))


def tiny_pipeline(pooling: str = "mean") -> tuple[MCDiPipeline, FrozenBackbone]:
    return pipeline_for(tiny_backbone(pooling), tiny_lora_config())


def tiny_language_pipeline() -> tuple[MCDiPipeline, FrozenBackbone]:
    backbone = FrozenBackbone.from_pretrained(saved_folder("llama"), pooling="last_token")
    return pipeline_for(backbone, tiny_lora_config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


def tiny_image_pipeline() -> tuple[MCDiPipeline, FrozenBackbone]:
    config = tiny_lora_config(task_type=None, target_modules=[VIT_QUERY, VIT_VALUE], modules_to_save=["classifier"])
    return pipeline_for(FrozenBackbone.from_pretrained(saved_folder("vit"), pooling="default"), config)


def pipeline_for(backbone: FrozenBackbone, lora_config: LoraConfig) -> tuple[MCDiPipeline, FrozenBackbone]:
    """A pipeline whose random weights are all unlike zero, so that everything that could matter does."""
    codec = random_codec(backbone, lora_config)
    generator = torch.Generator().manual_seed(1)
    denoiser = MCDiDenoiser.from_layout(codec.layout, cond_dim=8, dim=16, num_layers=1, num_heads=2).eval()
    seen = codec.layout.feature_dim + 16  # the width of what comes from below the adapted layers
    task_encoder = TaskEncoder(seen, *codec.filled.shape, dim=8, num_directions=6).eval()
    for parameter in (*denoiser.parameters(), *task_encoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    pipe = MCDiPipeline(denoiser, task_encoder, codec, LocalConsistencyScheduler())
    pipe.backbone = backbone
    pipe.set_progress_bar_config(disable=True)
    return pipe, backbone


def random_codec(backbone: FrozenBackbone, lora_config: LoraConfig) -> AdapterCodec:
    """A codec of a random shared adapter."""
    codec = AdapterCodec.from_backbone(backbone, lora_config)
    tensors = {key: value[:1] for key, value in random_adapters(codec.layout, 1, seed=1).items()}
    for key in codec.layout.head_keys:
        del tensors[key]
    codec.set_shared_adapter(tensors, RidgeHead(2.0, -3.0, 0.2, 1.5))
    codec.std.fill_(0.3)
    return codec


@torch.no_grad()
def frozen_features(backbone: FrozenBackbone, examples: list[Any]) -> torch.Tensor:
    """What the head of the plain backbone reads: `(examples, feature_dim)`."""
    model = copy.deepcopy(backbone.model)
    setattr(model, backbone.head_name, torch.nn.Identity())
    return model(**backbone.inputs(examples)).logits


def class_logits(
    model: torch.nn.Module, backbone: FrozenBackbone, labels: list[str], examples: list[Any]
) -> torch.Tensor:
    """The logits of the classes under an ordinary model, example by example: `(examples, classes)`."""
    rows = [model(**backbone.inputs([example])).logits[0] for example in examples]
    if backbone.is_causal_lm:
        words = [backbone.processor(label, add_special_tokens=False).input_ids[0] for label in labels]
        rows = [row[-1, words] for row in rows]
    return torch.stack(rows)


@torch.no_grad()
def logits_in_peft(backbone: FrozenBackbone, adapter: GeneratedAdapter, examples: list[Any]) -> torch.Tensor:
    """The logits of an adapter as PEFT has them: `(examples, classes)`."""
    model = adapter.load_into(backbone.classifier(num_labels=len(adapter.labels)))
    return class_logits(model, backbone, adapter.labels, examples)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: Any, expected: Any) -> None:
    # What is solved for heads amplifies the rounding of features.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def tiny_dataset(rows_per_class: int = 8) -> Dataset:
    """Three domains of four classes; a text is a few letters, most of them its class's own."""
    generator = torch.Generator().manual_seed(2)
    columns = {"text": [], "label": [], "domain": []}
    for label in range(12):
        for _ in range(rows_per_class):
            letters = torch.randint(0, 26, (4,), generator=generator).tolist()
            letters[0] = letters[1] = 2 * label
            columns["text"].append(" ".join(string.ascii_lowercase[letter] for letter in letters))
            columns["label"].append(label)
            columns["domain"].append(label // 4)
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=[f"class_{index}" for index in range(12)]),
            "domain": ClassLabel(names=["north", "south", "west"]),
        }
    )
    return Dataset.from_dict(columns, features=features)


def tiny_image_dataset(rows_per_class: int = 3) -> Dataset:
    """Two alphabets of two characters; an image is 8 x 8 grey noise."""
    random = np.random.default_rng(3)
    columns = {"image": [], "character": [], "alphabet": [], "drawer": []}
    for label in range(4):
        for drawer in range(rows_per_class):
            columns["image"].append(PILImage.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)))
            columns["character"].append(label)
            columns["alphabet"].append(label // 2)
            columns["drawer"].append(drawer)
    features = Features(
        {
            "image": Image(),
            "character": ClassLabel(names=["alpha", "beta", "aleph", "bet"]),
            "alphabet": ClassLabel(names=["greek", "hebrew"]),
            "drawer": Value("int8"),
        }
    )
    return Dataset.from_dict(columns, features=features)


def random_adapters(layout: AdapterLayout, count: int, ways: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = layout.lora_shapes | dict(zip(layout.head_keys, [(ways, layout.feature_dim), (ways,)]))
    return {key: 0.3 * torch.randn(count, *shape, generator=generator) for key, shape in shapes.items()}


def in_peft(backbone: FrozenBackbone, config, tensors: dict[str, torch.Tensor], index: int) -> PeftModel:
    """One adapter of a stack as an ordinary trainable PEFT model."""
    ways = tensors["base_model.model.classifier.bias"].shape[1]
    model = get_peft_model(backbone.classifier(num_labels=ways), config).eval()
    result = set_peft_model_state_dict(model, {key: value[index] for key, value in tensors.items()})
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return model
