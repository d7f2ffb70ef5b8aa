"""Tokens are adapters in another form."""

import pytest
import torch
from tiny import random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterCodec


def tiny_codec(token_dim: int = 20, **settings) -> AdapterCodec:
    codec = AdapterCodec.from_backbone(tiny_backbone(), tiny_lora_config(**settings), token_dim=token_dim)
    codec.mean.normal_().mul_(codec.filled)
    codec.std.uniform_(0.5, 2)
    codec.head_std.uniform_(0.5, 2)
    return codec


def random_head(count: int, ways: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, ways, 16), torch.randn(count, ways)


@pytest.mark.parametrize("token_dim", [18, 20, 32, 100])
@pytest.mark.parametrize("settings", [{}, {"r": 4, "rank_pattern": {"value": 1}}])
def test_decode_is_the_inverse_of_encode(settings: dict, token_dim: int) -> None:
    codec = tiny_codec(token_dim, **settings)
    tensors, head = random_adapters(codec.layout, 5, ways=4), random_head(5, 4)
    tokens = codec.encode(tensors, head)
    assert tokens.shape == (5, codec.num_lora_tokens + 4, token_dim)
    mask = codec.token_mask(torch.ones(5, 4, dtype=torch.bool))
    gains = 5 * 4  # one a class, beside the adapter's own numbers
    assert (tokens[~mask] == 0).all() and mask.sum() == gains + sum(value.numel() for value in tensors.values())
    torch.testing.assert_close(codec.decode(tokens, head), tensors, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_some_times_the_free_one_is_a_gain_alone() -> None:
    codec, head = tiny_codec(), random_head(2, 3)
    gains = torch.tensor([[0.0, 0.5, 1.0], [2.0, -1.0, 1.0]])
    tensors = codec.mean_adapter(2)
    tensors |= dict(zip(codec.layout.head_keys, (head[0] * gains.unsqueeze(-1), head[1] * gains)))
    tokens = codec.encode(tensors, head)
    expected = torch.zeros_like(tokens)
    expected[:, codec.num_lora_tokens :, codec.layout.feature_dim + 1] = (gains - 1) / codec.head_std[2]
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_zero_tokens_are_exactly_what_is_free() -> None:
    codec, head = tiny_codec(), random_head(2, 3)
    tensors = codec.decode(torch.zeros(2, codec.num_lora_tokens + 3, 20), head)
    assert all(tensors[key].equal(free) for key, free in zip(codec.layout.head_keys, head))
    mean = codec.mean_adapter(2)
    assert mean.keys() == codec.layout.lora_shapes.keys() and all(tensors[key].equal(mean[key]) for key in mean)


@pytest.mark.parametrize("token_dim", [8, 20])
def test_without_a_head_there_are_lora_tokens_alone(token_dim: int) -> None:
    codec = tiny_codec(token_dim, task_type=None)
    tensors = random_adapters(codec.layout, 5)
    tokens = codec.encode(tensors)
    assert tokens.shape == (5, codec.num_lora_tokens, token_dim) and codec.num_tokens(3) == codec.num_lora_tokens
    mask = codec.token_mask(torch.ones(5, 4, dtype=torch.bool))
    assert mask.shape == tokens.shape and mask.sum() == sum(value.numel() for value in tensors.values())
    assert (tokens[~mask] == 0).all()
    torch.testing.assert_close(codec.decode(tokens), tensors, rtol=1e-5, atol=1e-6)
    zero = codec.decode(torch.zeros_like(tokens))
    mean = codec.mean_adapter(5)
    assert zero.keys() == mean.keys() and all(zero[key].equal(mean[key]) for key in mean)
    codec.fit_matrices([{key: value[index : index + 1] for key, value in tensors.items()} for index in range(5)])
    codec.fit_head([tensors], [])
    tokens = codec.encode(tensors)
    torch.testing.assert_close(tokens.mean(dim=0), torch.zeros_like(tokens[0]), rtol=0, atol=1e-5)
    assert tokens[mask].square().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_head_is_given_where_there_is_one_and_nowhere_else() -> None:
    headed, headless = tiny_codec(), tiny_codec(task_type=None)
    for codec, head, message in (
        (headed, None, "head of the adapters is 'classifier'"),
        (headless, random_head(2, 3), "no free head"),
    ):
        tokens = torch.zeros(2, codec.num_tokens(3), 20)
        with pytest.raises(ValueError, match=message):
            codec.encode(random_adapters(codec.layout, 2), head)
        with pytest.raises(ValueError, match=message):
            codec.decode(tokens, head)
    with pytest.raises(ValueError, match=f"expected {headless.num_lora_tokens}, of which 0"):
        headless.decode(torch.zeros(2, headless.num_lora_tokens + 3, 20))


def test_permuting_the_classes_permutes_the_head_tokens_and_nothing_else() -> None:
    codec = tiny_codec()
    tensors, head = random_adapters(codec.layout, 2, ways=4), random_head(2, 4)
    order = torch.tensor([2, 0, 3, 1])
    tokens = codec.encode(tensors, head)
    permuted = tensors | {key: tensors[key][:, order] for key in codec.layout.head_keys}
    found = codec.encode(permuted, tuple(values[:, order] for values in head))
    lora = codec.num_lora_tokens
    assert found[:, :lora].equal(tokens[:, :lora]) and found[:, lora:].equal(tokens[:, lora:][:, order])


def test_a_wrong_adapter_is_refused_by_the_name_of_its_tensor() -> None:
    codec, head = tiny_codec(), random_head(1, 3)
    tensors = random_adapters(codec.layout, 1)
    key = next(iter(tensors))
    for wrong in ({**tensors, key: torch.zeros(1, 3, 16)}, {k: v for k, v in tensors.items() if k != key}):
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            codec.encode(wrong, head)
    with pytest.raises(ValueError, match="unexpected.*surplus"):
        codec.encode({**tensors, "surplus": torch.zeros(1)}, head)


def test_fitted_statistics_give_residuals_of_unit_size() -> None:
    codec = tiny_codec()
    sizes = torch.linspace(0.1, 3, len(codec.layout.lora_shapes))
    adapters, heads = [], []
    for index in range(12):
        tensors = random_adapters(codec.layout, 1, ways=2 + index % 3, seed=index)
        for key, size in zip(codec.layout.lora_shapes, sizes):
            tensors[key] = 5 + size * tensors[key]
        adapters.append(tensors)
        heads.append(random_head(1, 2 + index % 3))
    codec.fit_matrices(adapters)
    codec.fit_head(adapters, heads)
    tokens = [codec.encode(tensors, head) for tensors, head in zip(adapters, heads)]
    lora = torch.cat([one[:, : codec.num_lora_tokens] for one in tokens])
    torch.testing.assert_close(lora.mean(dim=0), torch.zeros_like(lora[0]), rtol=0, atol=1e-4)
    for tensor in range(len(sizes)):  # two tokens a tensor, 32 numbers
        power = lora[:, 2 * tensor : 2 * tensor + 2].square().sum() / (12 * 32)
        assert power.item() == pytest.approx(1, abs=1e-4)
    rows = torch.cat([one[0, codec.num_lora_tokens :] for one in tokens])
    assert rows[:, :16].square().mean().item() == pytest.approx(1, abs=1e-4)
    assert rows[:, 16].square().mean().item() == pytest.approx(1, abs=1e-4)


def test_statistics_survive_saving_and_stay_float32(tmp_path) -> None:
    codec = tiny_codec()
    codec.save_pretrained(tmp_path)
    loaded = AdapterCodec.from_pretrained(tmp_path, dtype=torch.float16)
    for name in ("mean", "std", "head_std"):
        assert getattr(loaded, name).dtype == torch.float32 and getattr(loaded, name).equal(getattr(codec, name))
    assert loaded.layout.to_dict() == codec.layout.to_dict()


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
