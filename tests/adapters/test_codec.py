"""Tokens are adapters in the basis of the shared one."""

import pytest
import torch
from tiny import in_peft, random_adapters, random_codec, tiny_backbone, tiny_lora_config
from versions import DTYPE

from mcdi_hf import AdapterCodec, StackedLora
from mcdi_hf.adapters.head import RidgeHead
from mcdi_hf.data.episodes import SupportBatch


SETTINGS = [{}, {"r": 4, "rank_pattern": {"value": 1}}, {"task_type": None}]
TEXTS = ["a b c", "x y", "q", "m n o p", "z", "a a a"]


def tiny_codec(**settings) -> AdapterCodec:
    return random_codec(tiny_backbone(), tiny_lora_config(**settings))


def random_tokens(codec: AdapterCodec, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *codec.filled.shape, generator=torch.Generator().manual_seed(0)) * codec.filled


@pytest.mark.parametrize("settings", SETTINGS)
def test_reading_is_the_inverse_of_writing(settings: dict) -> None:
    codec = tiny_codec(**settings)
    tokens = random_tokens(codec)
    assert tokens.shape == (3, codec.num_tokens, codec.layout.token_dim)
    tensors = codec.matrices(codec.coefficients(tokens))
    assert {key: tuple(value.shape[1:]) for key, value in tensors.items()} == codec.layout.lora_shapes
    torch.testing.assert_close(codec.encode(codec.read(tensors)), tokens, rtol=1e-4, atol=1e-4)


def test_zero_tokens_are_the_shared_adapter_and_zero_coefficients_the_frozen_backbone() -> None:
    codec = tiny_codec()
    shared = codec.matrices(codec.coefficients(torch.zeros(2, *codec.filled.shape)))
    assert all(value.equal(codec.shared_adapter(2)[key]) for key, value in shared.items())
    stacked = StackedLora(tiny_backbone(), codec.layout)
    examples, rows = stacked.encode(TEXTS), torch.arange(len(TEXTS))
    silent = {key: torch.zeros(1, *shape) for key, shape in codec.layout.lora_shapes.items()}
    found = stacked.features_of_all(codec.frozen_adapter(), examples, rows)
    assert found.equal(stacked.features_of_all(silent, examples, rows))


def test_a_decoded_adapter_is_the_same_in_peft() -> None:
    codec, backbone = tiny_codec(), tiny_backbone()
    stacked = StackedLora(backbone, codec.layout)
    support = SupportBatch.from_rows([((0, 1), (2, 3)), ((4, 5), (0, 2))], [("a", "b")] * 2)
    support.examples = stacked.encode(TEXTS)
    tensors = codec.decode(random_tokens(codec, 2), support, stacked)
    logits = stacked.logits(tensors, support)
    for index, rows in enumerate(support.rows.tolist()):
        model = in_peft(backbone, tiny_lora_config(), tensors, index)
        expected = model(**backbone.inputs([TEXTS[row] for row in rows])).logits
        torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_another_basis_is_refused_by_the_name_of_its_module() -> None:
    codec = tiny_codec()
    with pytest.raises(ValueError, match=codec.layout.modules[0].name.replace(".", r"\.")):
        codec.read(random_adapters(codec.layout, 1))


def test_a_shared_adapter_of_another_layout_is_refused() -> None:
    codec = tiny_codec()
    with pytest.raises(ValueError, match="not the LoRA matrices of the layout"):
        codec.set_shared_adapter(tiny_codec(r=3).shared_adapter(), RidgeHead())


@pytest.mark.parametrize("settings", SETTINGS)
def test_fitted_scales_give_tokens_of_unit_size(settings: dict) -> None:
    codec = tiny_codec(**settings)
    sizes = torch.linspace(0.1, 3, codec.num_tokens).unsqueeze(-1)
    coefficients = 1 + sizes * torch.randn(12, *codec.filled.shape)
    codec.fit_scales(coefficients)
    power = codec.encode(coefficients).square().sum(dim=(0, 2)) / 12 / codec.filled.sum(dim=1)
    torch.testing.assert_close(power, torch.ones(codec.num_tokens), rtol=1e-4, atol=1e-4)


def test_basis_head_and_scales_survive_saving_and_stay_float32(tmp_path) -> None:
    codec = tiny_codec()
    codec.save_pretrained(tmp_path)
    loaded = AdapterCodec.from_pretrained(tmp_path, **{DTYPE: torch.float16})
    assert loaded.state_dict().keys() == codec.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and value.equal(codec.state_dict()[name])
    assert (codec.dtype, loaded.dtype, loaded.float().dtype) == (torch.float32, torch.float16, torch.float32)
    assert loaded.layout.to_dict() == codec.layout.to_dict() and loaded.head == codec.head


def test_another_backbone_is_refused_and_both_are_named() -> None:
    codec, other = tiny_codec(), tiny_backbone(seed=1)
    codec.check_backbone(tiny_backbone())
    for wrong in (other, tiny_backbone("default")):
        with pytest.raises(ValueError, match=f"(?s){codec.config.base_model['fingerprint']}.*{wrong.fingerprint}"):
            codec.check_backbone(wrong)


def test_a_codec_whose_lora_config_makes_other_adapters_takes_no_backbone() -> None:
    """From a config that somebody forged or edited: everything else of it is right."""
    codec = tiny_codec()
    config = codec.config.lora_config | {"lora_alpha": 400}
    edited = AdapterCodec(codec.config.layout, config, codec.config.base_model)
    with pytest.raises(
        ValueError, match="adapts or scales other modules.*Expected the same rank, lora_alpha and targets"
    ):
        edited.check_backbone(tiny_backbone())
