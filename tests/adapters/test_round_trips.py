"""Generated adapters of all shapes through their files into everything that reads PEFT folders: the same logits."""

import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model_state_dict,
)
from PIL import Image
from safetensors.torch import load_file
from tiny import pipeline_for, saved_folder, tiny_backbone_folder, tiny_lora_config
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    pipeline,
)
from versions import VIT_QUERY, VIT_VALUE, reads_heads

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline
from mcdi_hf.data.episodes import SupportBatch


RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(6)]
TEXTS = ["a b", "c c z", "y b a", "d e", "f g h", "x"]
QUERY = slice(0, 4)
# Kind -> what loads the backbone, its folder and pooling, the adapted modules, and examples.
AUTO = {
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
}
POOLING = {"bert": "default", "vit": "default", "llama": "last_token"}
LORA = {
    "bert": {"target_modules": ["query", "value"]},
    "vit": {"task_type": None, "target_modules": [VIT_QUERY, VIT_VALUE], "modules_to_save": ["classifier"]},
    "llama": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]},
}
VALUE = {"bert": "value", "vit": "v_proj", "llama": "v_proj"}
SETTINGS = {
    "rank 1": {"r": 1, "lora_alpha": 1},
    "rank 4, alpha 2": {"r": 4, "lora_alpha": 2},
    "rank 16, rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 2},  # and the patterns that `lora_config` adds
    "bfloat16": {"r": 4, "lora_alpha": 8},
}


@dataclasses.dataclass
class Case:
    """A pipeline with two adapters, saved, and what the stack says of each."""

    kind: str
    pipe: MCDiPipeline
    adapters: list[GeneratedAdapter]
    folders: list[Path]
    expected: list[torch.Tensor]

    @property
    def examples(self) -> list:
        return (IMAGES if self.kind == "vit" else TEXTS)[QUERY]

    def base(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        own = {} if self.kind == "llama" else {"num_labels": 3, "ignore_mismatched_sizes": True}
        return AUTO[self.kind].from_pretrained(self.pipe.backbone.name_or_path, dtype=dtype, **own).eval()

    @torch.no_grad()
    def logits(self, model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
        inputs = self.pipe.backbone.inputs(self.examples)
        if self.kind == "vit":
            inputs = {"pixel_values": inputs["pixel_values"].to(model.dtype)}
        logits = model(**inputs, **kwargs).logits.float()
        if self.kind != "llama":
            return logits
        tokenizer = self.pipe.backbone.processor
        words = [tokenizer(label, add_special_tokens=False).input_ids[0] for label in self.adapters[0].labels]
        last = inputs["attention_mask"].sum(dim=1) - 1
        return logits[torch.arange(len(last)), last][:, words]

    def check(self, model: torch.nn.Module, index: int = 0) -> None:
        torch.testing.assert_close(self.logits(model), self.expected[index], rtol=1e-4, atol=1e-4)


def make(kind: str, name: str, root: Path) -> Case:
    settings = LORA[kind] | SETTINGS[name]
    if name == "patterns":
        settings |= {"rank_pattern": {VALUE[kind]: 1}, "alpha_pattern": {rf"layers?\.2\..*{VALUE[kind]}": 9}}
    folder = tiny_backbone_folder() if kind == "bert" else saved_folder(kind)
    backbone = FrozenBackbone.from_pretrained(folder, pooling=POOLING[kind])
    pipe, _ = pipeline_for(backbone, tiny_lora_config(**settings))
    examples = IMAGES if kind == "vit" else TEXTS
    support = {label: examples[2 * index : 2 * index + 2] for index, label in enumerate("pqr")}
    generator = torch.Generator().manual_seed(0)
    adapters = pipe([support, support], num_inference_steps=2, temperature=2.0, generator=generator).adapters
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    queries = SupportBatch.from_rows([((0, 1), (2,), (3,))], [tuple(support)])
    queries.examples = pipe.stacked.encode(examples[QUERY])
    folders, expected = [], []
    for index, adapter in enumerate(adapters):
        adapter.tensors = {key: value.to(dtype) for key, value in adapter.tensors.items()}
        own = {key: value.float().unsqueeze(0) for key, value in adapter.tensors.items()}
        expected.append(pipe.stacked.logits(own, queries)[0])
        folders.append(root / str(index))
        adapter.save_pretrained(folders[-1])
    return Case(kind, pipe, adapters, folders, expected)


@pytest.fixture(scope="module", params=[(kind, name) for kind in AUTO for name in SETTINGS], ids=" ".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(*request.param, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(autouse=True)
def warnings_are_failures() -> Iterator[None]:
    """PEFT warns of missing and unexpected keys, and of configs that it does not like."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_peft_and_its_auto_classes(case: Case) -> None:
    model = PeftModel.from_pretrained(case.base(), case.folders[0])
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert (
        loaded.keys()
        == case.adapters[0].tensors.keys()
        == load_file(case.folders[0] / "adapter_model.safetensors").keys()
    )
    assert all(loaded[key].equal(value.to(loaded[key].dtype)) for key, value in case.adapters[0].tensors.items())
    case.check(model)
    assert (case.expected[0] - case.expected[1]).abs().max() > 0.1  # else any adapter would do
    if case.kind != "vit":  # PEFT has no such class for images
        auto = {"bert": AutoPeftModelForSequenceClassification, "llama": AutoPeftModelForCausalLM}[case.kind]
        own = {"num_labels": 3} if case.kind == "bert" else {}
        case.check(auto.from_pretrained(case.folders[0], **own))


def test_two_adapters_side_by_side_and_in_one_batch(case: Case) -> None:
    model = PeftModel.from_pretrained(case.base(), case.folders[0], adapter_name="first")
    result = model.load_adapter(case.folders[1], "second")
    assert result.missing_keys == [] and result.unexpected_keys == []
    alone = []
    for index, name in enumerate(("first", "second")):
        model.set_adapter(name)
        case.check(model, index)
        alone.append(case.logits(model))
    mixed = case.logits(model, adapter_names=["second", "first", "first", "second"])
    expected = torch.stack([alone[1][0], alone[0][1], alone[0][2], alone[1][3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@reads_heads
def test_transformers_itself(case: Case) -> None:
    model = case.base()
    model.load_adapter(str(case.folders[0]))
    case.check(model.eval())
    if case.kind == "bert":
        tokenizer = case.pipe.backbone.processor
        own = {"num_labels": 3, "id2label": case.adapters[0].id2label}
        model = AutoModelForSequenceClassification.from_pretrained(case.folders[0], **own)
        case.check(model)
        answers = pipeline("text-classification", model=model, tokenizer=tokenizer)(case.examples, top_k=None)
        probabilities = case.logits(model).softmax(dim=-1)
        for answer, row in zip(answers, probabilities.tolist(), strict=True):
            scores = {one["label"]: one["score"] for one in answer}
            assert scores == pytest.approx(dict(zip("pqr", row)), abs=1e-4)


def test_a_backbone_in_half_precision(case: Case) -> None:
    """Rounding is the backbone's own then: live and from files it is the same."""
    live = case.adapters[0].load_into(case.base(torch.bfloat16))
    loaded = PeftModel.from_pretrained(case.base(torch.bfloat16), case.folders[0])
    assert case.logits(loaded).equal(case.logits(live))


def test_merged(case: Case) -> None:
    case.check(case.adapters[0].load_into(case.base()))
    merged = PeftModel.from_pretrained(case.base(), case.folders[0]).merge_and_unload(safe_merge=True)
    assert type(merged) is type(case.base()) and not any("lora" in name for name, _ in merged.named_parameters())
    case.check(merged)


@pytest.mark.parametrize("name", ["rank 4, alpha 2", "rank 16, rslora"])
def test_what_vllm_asks_of_a_folder(tmp_path: Path, name: str) -> None:
    """The conditions of vllm/lora/peft_helper.py and of `parse_fine_tuned_lora_name`, in our words."""
    case = make("llama", name, tmp_path)
    config = json.loads((case.folders[0] / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none" and config["r"] <= 16
    assert not config["modules_to_save"] and not config["use_dora"] and not config["rank_pattern"]
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = load_file(case.folders[0] / "adapter_model.safetensors")
    modules = {module.name: module for module in case.pipe.codec.layout.modules}
    for key, tensor in tensors.items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        assert parts[-3] in config["target_modules"] and config["r"] in tensor.shape
        module = modules[".".join(parts[2:-2])]
        assert module.scaling == pytest.approx(scaling) and module.name.startswith("model.layers.")
