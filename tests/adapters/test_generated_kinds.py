"""Generated adapters of language models and image classifiers, loaded as their cards say."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from PIL import Image
from safetensors import safe_open
from tiny import tiny_image_pipeline, tiny_language_pipeline
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline
from mcdi_hf.data.episodes import SupportBatch


RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(10)]
TEXTS = ["a b", "x", "c c z", "y b a", *"defghijklmnopqrstu", "d e f g " * 20]  # the last one is cut
SUPPORTS = {
    "llama": {"p": ["a b c", "a c"], "q": ["x y z", "z y"], "r": ["a z", "b y"]},
    "vit": {"cat": IMAGES[:2], "dog": IMAGES[2:4], "owl": IMAGES[4:6]},
}
Made = tuple[MCDiPipeline, FrozenBackbone, GeneratedAdapter]


@pytest.fixture(scope="module", params=list(SUPPORTS))
def made(request: pytest.FixtureRequest) -> Made:
    return make(request.param)


def make(kind: str) -> Made:
    pipe, backbone = {"llama": tiny_language_pipeline, "vit": tiny_image_pipeline}[kind]()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    adapter = pipe(SUPPORTS[kind], generator=generator, num_inference_steps=3, temperature=2.0).adapters[0]
    return pipe, backbone, adapter


def plain_base(backbone: FrozenBackbone) -> PreTrainedModel:
    """The backbone as a user loads it."""
    if backbone.is_causal_lm:
        return AutoModelForCausalLM.from_pretrained(backbone.name_or_path)
    return AutoModelForImageClassification.from_pretrained(
        backbone.name_or_path, num_labels=3, ignore_mismatched_sizes=True
    )


def class_logits(model: torch.nn.Module, backbone: FrozenBackbone, labels: list[str]) -> torch.Tensor:
    if not backbone.is_causal_lm:
        with torch.no_grad():
            return model(**backbone.inputs(IMAGES)).logits
    words = [backbone.processor(label, add_special_tokens=False).input_ids[0] for label in labels]
    with torch.no_grad():
        return torch.stack([model(**backbone.inputs([text])).logits[0, -1, words] for text in TEXTS])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_peft_loads_what_was_saved_and_says_what_the_stack_says(made: Made, tmp_path: Path) -> None:
    pipe, backbone, adapter = made
    adapter.save_pretrained(tmp_path / "adapter")
    base = plain_base(backbone)
    before = class_logits(base, backbone, adapter.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        result = model.load_adapter(tmp_path / "adapter", "again")
    assert result.missing_keys == [] and result.unexpected_keys == []
    found = class_logits(model, backbone, adapter.labels)
    examples = pipe.stacked.encode(TEXTS if backbone.is_causal_lm else IMAGES)
    own = {key: value.unsqueeze(0) for key, value in adapter.tensors.items()}
    batch = SupportBatch.from_rows([[range(len(examples)), [], []]], [tuple(adapter.labels)])
    assert_close(found, pipe.stacked.logits(own, dataclasses.replace(batch, examples=examples))[0])
    live = adapter.load_into(backbone.classifier(num_labels=3))
    assert_close(found, class_logits(live, backbone, adapter.labels))
    assert live.config.id2label == dict(enumerate(adapter.labels))
    assert not torch.allclose(found, before, atol=1e-2)


def test_saved_config_and_labels(made: Made, tmp_path: Path) -> None:
    _, backbone, adapter = made
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == backbone.name_or_path and config["peft_type"] == "LORA"
    assert config["task_type"] == ("CAUSAL_LM" if backbone.is_causal_lm else None)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert list(json.loads(file.metadata()["id2label"]).values()) == adapter.labels
        heads = [key for key in file.keys() if "lora_" not in key]
    assert len(heads) == (0 if backbone.is_causal_lm else 2)
    if backbone.is_causal_lm:
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
        live = adapter.load_into(backbone.classifier(num_labels=3))
        expected = class_logits(live, backbone, adapter.labels)
        assert_close(class_logits(model, backbone, adapter.labels), expected)


def test_code_on_the_card_runs(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backbone, adapter = made
    adapter.save_pretrained(tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    card = ModelCard.load("shelf/README.md")
    assert card.data.pipeline_tag == ("text-generation" if backbone.is_causal_lm else "image-classification")
    assert "# shelf" in card.text and "from 6 labelled examples in 3 classes" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", adapter.card("shelf").text, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    live = adapter.load_into(backbone.classifier(num_labels=3))
    expected = class_logits(live, backbone, adapter.labels)
    assert_close(class_logits(names["model"], backbone, adapter.labels), expected)
    if backbone.is_causal_lm:
        answers = [adapter.labels[row] for row in expected.argmax(dim=-1).tolist()]
        assert [names["classify"](text) for text in TEXTS] == answers and len(set(answers)) > 1
    else:
        assert names["model"].config.id2label == dict(enumerate(adapter.labels))


def test_load_into_refuses_other_models() -> None:
    (_, llama, words), (_, vit, images) = make("llama"), make("vit")
    with pytest.raises(ValueError, match="for a LlamaForCausalLM, the model is a ViTForImageClassification"):
        words.load_into(vit.classifier(num_labels=3))
    with pytest.raises(ValueError, match="2 labels, the adapter 3: load the model with num_labels=3"):
        images.load_into(vit.classifier(num_labels=2))
    assert words.load_into(llama.classifier(num_labels=3)).active_adapter == "default"
