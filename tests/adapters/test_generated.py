"""A generated adapter is plain PEFT: what PEFT and transformers load is what the live adapter says."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors import safe_open
from tiny import tiny_pipeline
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from versions import reads_heads

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline, MeanPooledForSequenceClassification


SUPPORT = {"red": ["a b c", "a c"], "green": ["x y z", "z y"], "blue": ["a z", "b y"]}
TEXTS = ["a b", "x", "c c z", "y b a"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "generation.json", "README.md"}


def generate(pipe: MCDiPipeline, seed: int = 0) -> GeneratedAdapter:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(SUPPORT, generator=generator, num_inference_steps=3, temperature=2.0).adapters[0]


@pytest.fixture(scope="module", params=["mean", "default"])
def made(request: pytest.FixtureRequest) -> tuple[MCDiPipeline, FrozenBackbone, GeneratedAdapter]:
    pipe, backbone = tiny_pipeline(pooling=request.param)
    return pipe, backbone, generate(pipe)


@pytest.fixture(scope="module")
def default() -> tuple[MCDiPipeline, FrozenBackbone, GeneratedAdapter]:
    pipe, backbone = tiny_pipeline(pooling="default")
    return pipe, backbone, generate(pipe)


def plain_base(backbone: FrozenBackbone, num_labels: int = 3) -> PreTrainedModel:
    """The backbone as a user loads it, with an untrained head."""
    if backbone.pooling == "mean":
        return MeanPooledForSequenceClassification.from_backbone(backbone.name_or_path, num_labels=num_labels)
    return AutoModelForSequenceClassification.from_pretrained(backbone.name_or_path, num_labels=num_labels)


@torch.no_grad()
def logits(model: torch.nn.Module, backbone: FrozenBackbone) -> torch.Tensor:
    return model(**backbone.inputs(TEXTS)).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_peft_loads_what_was_saved(made: tuple, tmp_path: Path) -> None:
    _, backbone, adapter = made
    adapter.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    live = logits(adapter.load_into(backbone.classifier(num_labels=3)), backbone)
    base = plain_base(backbone)
    before = logits(base, backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter")
        result = model.load_adapter(tmp_path / "adapter", "again")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_close(logits(model, backbone), live)
    model.set_adapter("again")
    assert_close(logits(model, backbone), live)
    assert not torch.allclose(live, before, atol=1e-2)
    assert (live - live.mean(dim=0)).abs().max() > 1e-3  # else the texts would not matter


def test_lora_matrices_are_heard(made: tuple) -> None:
    pipe, backbone, adapter = made
    model = adapter.load_into(backbone.classifier(num_labels=3))
    with_lora = logits(model, backbone)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not torch.allclose(with_lora, logits(model, backbone), atol=1e-4)


def test_saved_config_and_metadata(made: tuple, tmp_path: Path) -> None:
    _, backbone, adapter = made
    adapter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == backbone.name_or_path
    assert config["inference_mode"] and config["task_type"] == "SEQ_CLS" and config["peft_type"] == "LORA"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["id2label"]) == {"0": "red", "1": "green", "2": "blue"}
        assert file.metadata()["format"] == "pt"
        assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {
            key: value.tolist() for key, value in adapter.tensors.items()
        }


@reads_heads
def test_auto_classes_load_the_default_pooling(default: tuple, tmp_path: Path) -> None:
    _, backbone, adapter = default
    adapter.save_pretrained(tmp_path)
    live = logits(adapter.load_into(backbone.classifier(num_labels=3)), backbone)
    model = plain_base(backbone)
    model.load_adapter(str(tmp_path))
    assert_close(logits(model.eval(), backbone), live)
    assert_close(
        logits(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3), backbone), live
    )


def test_adapters_side_by_side(made: tuple) -> None:
    pipe, backbone, adapter = made
    other = generate(pipe, seed=1)
    alone = [logits(one.load_into(backbone.classifier(num_labels=3)), backbone) for one in (adapter, other)]
    model = adapter.load_into(backbone.classifier(num_labels=3))
    model = other.load_into(model, adapter_name="other")
    assert model.active_adapter == "other"
    assert_close(logits(model, backbone), alone[1])
    model.set_adapter("default")
    assert_close(logits(model, backbone), alone[0])
    assert not torch.allclose(*alone, atol=1e-3)


def test_loaded_model_knows_the_labels_and_is_ready_for_use(made: tuple) -> None:
    _, backbone, adapter = made
    model = adapter.load_into(backbone.classifier(num_labels=3).train())
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert model.peft_config["default"].base_model_name_or_path == backbone.name_or_path
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_backbone_of_another_place_makes_no_warning(made: tuple) -> None:
    _, backbone, adapter = made
    named = dataclasses.replace(adapter, base_model=adapter.base_model | {"name_or_path": "tiny/bert"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = named.load_into(backbone.classifier(num_labels=3))
        named.load_into(model, adapter_name="other")
    assert {config.base_model_name_or_path for config in model.peft_config.values()} == {"tiny/bert"}


def test_load_into_refuses_other_models(made: tuple) -> None:
    _, backbone, adapter = made
    with pytest.raises(ValueError, match="2 labels, the adapter 3: load the model with num_labels=3"):
        adapter.load_into(backbone.classifier(num_labels=2))
    other, _ = tiny_pipeline(pooling="default" if backbone.pooling == "mean" else "mean")
    wrong = other.backbone.classifier(num_labels=3)
    with pytest.raises(ValueError, match=f"for a {backbone.model_class}, the model is a {type(wrong).__name__}"):
        adapter.load_into(wrong)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_load_into_refuses_tensors_without_a_place(made: tuple, change: str) -> None:
    _, backbone, adapter = made
    key = next(iter(adapter.tensors))
    tensors = {name: value for name, value in adapter.tensors.items() if name != key}
    if change == "unexpected":
        tensors |= {key: adapter.tensors[key], key.replace("layer.", "layer.9"): adapter.tensors[key]}
    with pytest.raises(ValueError, match=f"does not fit the model:.*{change}"):
        dataclasses.replace(adapter, tensors=tensors).load_into(backbone.classifier(num_labels=3))


def test_failed_save_leaves_things_as_they_were(made: tuple, tmp_path: Path) -> None:
    _, _, adapter = made
    shared = dict.fromkeys(adapter.tensors, next(iter(adapter.tensors.values())))  # safetensors refuses these
    broken = dataclasses.replace(adapter, tensors=shared)
    with pytest.raises(RuntimeError):
        broken.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    adapter.save_pretrained(tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with pytest.raises(RuntimeError):
        broken.save_pretrained(tmp_path / "old")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_the_same_adapter_is_the_same_files(made: tuple, tmp_path: Path) -> None:
    _, _, adapter = made
    found = set()
    for number in range(8):  # safetensors alone would order the metadata of some of them otherwise
        adapter.save_pretrained(tmp_path / str(number) / "shelf")
        found.add(tuple(path.read_bytes() for path in sorted((tmp_path / str(number) / "shelf").iterdir())))
    assert len(found) == 1


def test_saved_again_and_into_a_deep_folder(made: tuple, tmp_path: Path) -> None:
    pipe, backbone, adapter = made
    folder = tmp_path / "some" / "adapter"
    generate(pipe, seed=1).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    adapter.save_pretrained(str(folder))
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert_close(
        logits(PeftModel.from_pretrained(plain_base(backbone), folder), backbone),
        logits(adapter.load_into(backbone.classifier(num_labels=3)), backbone),
    )


def test_seeds_make_adapters_again(made: tuple) -> None:
    pipe, _, adapter = made
    settings = {"num_inference_steps": 3, "temperature": 2.0}
    generator = torch.Generator().manual_seed(0)
    two = pipe([SUPPORT, SUPPORT], generator=generator, **settings).adapters
    assert two[0].details.seed != two[1].details.seed
    again = [torch.Generator().manual_seed(one.details.seed) for one in two]
    for one, other in zip(two, pipe([SUPPORT, SUPPORT], generator=again, **settings).adapters):
        torch.testing.assert_close(other.tensors, one.tensors, rtol=0, atol=0)
    # A generator that has drawn already seeds the task. No seed leads back to given noise.
    (later,) = pipe(SUPPORT, generator=generator, **settings).adapters
    again = torch.Generator().manual_seed(later.details.seed)
    torch.testing.assert_close(
        pipe(SUPPORT, generator=again, **settings).adapters[0].tensors, later.tensors, rtol=0, atol=0
    )
    latents = torch.zeros(1, *pipe.codec.filled.shape)
    assert pipe(SUPPORT, latents=latents, **settings).adapters[0].details.seed is None


def test_code_on_the_card_runs(made: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backbone, adapter = made
    adapter.save_pretrained(tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", adapter.card("shelf").text, flags=re.DOTALL)
    assert backbone.model_class in code or backbone.pooling == "default" and "AutoModelForSequence" in code
    names: dict = {}
    exec(code, names)
    assert names["model"].config.id2label == {0: "red", 1: "green", 2: "blue"}
    live = logits(adapter.load_into(backbone.classifier(num_labels=3)), backbone)
    assert_close(logits(names["model"], backbone), live)
