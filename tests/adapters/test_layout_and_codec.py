"""The layout is PEFT's, and tokens are adapters in another form."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import LORA_SETTINGS, random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterCodec, AdapterLayout
from mcdi_hf.adapters.head import class_means, imprint_head


def tiny_codec(token_dim: int = 20, **settings) -> AdapterCodec:
    codec = AdapterCodec.from_backbone(tiny_backbone(), tiny_lora_config(**settings), token_dim=token_dim)
    codec.mean.normal_().mul_(codec.filled)
    codec.std.uniform_(0.5, 2)
    codec.head_std.uniform_(0.5, 2)
    return codec


def random_head(count: int, ways: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, ways, 16), torch.randn(count, ways)


@pytest.mark.parametrize("settings", LORA_SETTINGS)
def test_layout_is_that_of_peft(settings: dict) -> None:
    backbone, config = tiny_backbone(), tiny_lora_config(**settings)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    layout = AdapterLayout.from_model(backbone.model, config)
    assert backbone.model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in backbone.model.state_dict().items())
    model = get_peft_model(backbone.classifier(num_labels=3), config)
    expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    assert layout.lora_shapes | dict(zip(layout.head_keys, [(3, 16), (3,)])) == expected
    for module in layout.modules:
        assert module.scaling == model.base_model.model.get_submodule(module.name).scaling["default"]
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again.to_dict() == layout.to_dict() and again.tokens == layout.tokens


def test_coordinates_and_parts_of_tokens() -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(), token_dim=20)
    # two layers, two modules, A and B of 2 x 16 numbers each: 20 in the first token and 12 in the second
    assert [(token.layer, token.module, token.matrix, token.part, token.width) for token in layout.tokens] == [
        (layer, module, matrix, part, width)
        for layer in (1, 2)
        for module in (0, 1)
        for matrix in (0, 1)
        for part, width in ((0, 20), (1, 12))
    ]


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"]), "pooler.*in modules_to_save the head"),
        (LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["word_embeddings"]), "only nn.Linear"),
        (tiny_lora_config(bias="lora_only"), "does not hold|bias"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(config: LoraConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterLayout.from_model(tiny_backbone().model, config)


def test_an_adapter_without_a_head_has_lora_matrices_alone() -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(task_type=None), token_dim=8)
    assert layout.head_keys == () and layout.keys == list(layout.lora_shapes)
    assert AdapterLayout.from_dict(layout.to_dict()).to_dict() == layout.to_dict()
    tensors = {key: torch.zeros(2, *shape) for key, shape in layout.shapes(5).items()}
    layout.check(tensors)
    with pytest.raises(ValueError, match="unexpected .*classifier.weight"):
        layout.check(tensors | {"base_model.model.classifier.weight": torch.zeros(2, 5, 16)})


def test_width_is_that_of_flat_weights() -> None:
    for settings in ({}, {"task_type": None}):
        layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(**settings))
        tensors = random_adapters(layout, 1, ways=5)
        assert layout.width(5) == sum(value.numel() for value in tensors.values())


def test_token_dim_must_hold_a_class() -> None:
    with pytest.raises(ValueError, match="at least 18"):
        AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(), token_dim=17)


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
        (headed, None, "have the head 'classifier'"),
        (headless, random_head(2, 3), "no head"),
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


def test_imprinted_head_classifies_by_the_nearest_mean() -> None:
    torch.manual_seed(0)
    features, queries = torch.randn(2, 7, 5), torch.randn(2, 9, 5)
    labels = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [1, 0, 0, 1, 1, -1, -1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    means = class_means(features, labels, 3)
    torch.testing.assert_close(means[1, 1], features[1, [0, 3, 4]].mean(dim=0))
    weight, bias = imprint_head(means, 4.0, mask)
    logits = queries @ weight.transpose(1, 2) + bias.unsqueeze(1)
    expected = -4.0 / 2 * torch.cdist(queries, means).square()
    for task, ways in ((0, 3), (1, 2)):
        difference = (logits - expected)[task, :, :ways]
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-4)
    assert (weight[1, 2] == 0).all() and bias[1, 2] == 0
    torch.testing.assert_close(weight.sum(dim=1), torch.zeros(2, 5), rtol=0, atol=1e-5)
