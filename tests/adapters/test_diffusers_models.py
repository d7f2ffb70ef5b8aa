"""Adapters for models of diffusers: no head, no labels, and an alpha that diffusers must not take for the rank."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from tiny import assert_close

from mcdi_hf import AdapterCodec, AdapterLayout, GeneratedAdapter


CONFIGS = {
    "alpha is not the rank": {"r": 4, "lora_alpha": 2},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_v": 1}, "alpha_pattern": {"to_q": 9}},
}


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return model(sample, torch.tensor([3, 7]), states).sample


def made(folder: Path, settings: dict) -> GeneratedAdapter:
    """An adapter that a codec read from tokens, for a UNet that was saved to a folder."""
    unet = tiny_unet()
    unet.save_pretrained(folder)
    config = LoraConfig(target_modules=["to_q", "to_v"], **settings)
    layout = AdapterLayout.from_model(unet, config, head_name=None, token_dim=32, feature_dim=8)
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    about = {"name_or_path": str(folder), "revision": None, "fingerprint": "0" * 16, "pooling": None}
    codec = AdapterCodec(layout.to_dict(), config, about | {"model_class": "UNet2DConditionModel"})
    tokens = torch.randn(1, codec.num_tokens(ways=0), 32, generator=torch.Generator().manual_seed(2))
    tensors = {key: value[0].contiguous() for key, value in codec.decode(tokens).items()}
    return GeneratedAdapter(tensors, config, codec.config.base_model, labels=[], details={"shots": []})


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_and_peft_load_it_with_its_alpha(tmp_path: Path, name: str) -> None:
    adapter = made(tmp_path / "unet", CONFIGS[name])
    adapter.save_pretrained(tmp_path / "adapter")
    before = output(tiny_unet())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = output(adapter.load_into(tiny_unet()))
        assert_close(output(PeftModel.from_pretrained(tiny_unet(), tmp_path / "adapter")), expected)
        unet = tiny_unet()
        options = {"prefix": "base_model.model", "weight_name": "adapter_model.safetensors"}
        unet.load_lora_adapter(tmp_path / "adapter", **options)
    assert_close(output(unet), expected)
    assert (expected - before).abs().max() > 0.01
    # What is lost without the alpha that the file tells diffusers.
    other = tiny_unet()
    other.load_lora_adapter(adapter.tensors, prefix="base_model.model")
    assert not torch.allclose(output(other), expected, atol=1e-3)


def test_its_card_says_how_to_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = made(tmp_path / "unet", CONFIGS["alpha is not the rank"])
    adapter.save_pretrained(tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    card = adapter.card("shelf")
    assert card.data.pipeline_tag is None and "diffusers" in card.data.tags
    assert "without labelled examples" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert_close(output(names["model"]), output(adapter.load_into(tiny_unet())))
    with safe_open(tmp_path / "shelf" / "adapter_model.safetensors", "pt") as file:
        assert "id2label" not in file.metadata() and json.loads(file.metadata()["lora_adapter_metadata"])


def test_a_layout_needs_a_head_or_a_width() -> None:
    config = LoraConfig(target_modules=["to_q"])
    for head_name, feature_dim in ((None, None), ("classifier", 8)):
        with pytest.raises(ValueError, match=f"head_name is {head_name!r} and feature_dim {feature_dim}"):
            AdapterLayout.from_model(tiny_unet(), config, head_name, feature_dim=feature_dim)
