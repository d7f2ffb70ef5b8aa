"""A batch in which each row names its adapter is what PEFT says of each row alone."""

import dataclasses
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import KINDS, TEXTS, changed, examples_for, make_adapter, make_codec
from tiny import logits_in_peft, tiny_backbone

from mcdi_hf import AdapterCodec, FrozenBackbone, GeneratedAdapter, MixedAdapters, MixedAdaptersOutput


Made = tuple[FrozenBackbone, AdapterCodec, MixedAdapters]


def make(kind: str = "bert", **settings) -> Made:
    backbone, codec = make_codec(kind, **settings)
    return backbone, codec, MixedAdapters(backbone, codec.layout)


def assert_as_alone(
    backbone: FrozenBackbone, adapters: dict[str, GeneratedAdapter], names: list[str], found: MixedAdaptersOutput
) -> None:
    """Every row is what PEFT makes of it, and its padding is minus infinity."""
    assert found.logits.shape == (len(names), max(len(adapters[name].labels) for name in names))
    for row, (name, example) in enumerate(zip(names, examples_for(backbone))):
        expected = logits_in_peft(backbone, adapters[name], [example])[0]
        torch.testing.assert_close(found.logits[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert (found.logits[row, len(expected) :] == float("-inf")).all()
        assert found.labels[row] == adapters[name].labels[expected.argmax()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_peft_one_by_one(kind: str) -> None:
    backbone, codec, mixed = make(kind)
    adapters = {f"user {seed}": make_adapter(codec, seed, ways=2 + seed % 3) for seed in range(4)}
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    names = [f"user {index}" for index in (2, 0, 3, 1, 1, 0, 2, 0)]
    found = mixed(examples_for(backbone), names)
    assert_as_alone(backbone, adapters, names, found)
    assert found.logits.isfinite().sum(dim=1).unique().tolist() == [2, 3, 4]
    assert not torch.allclose(found.logits[0, :2], mixed(examples_for(backbone)[:1], names[1:2]).logits[0], atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"r": 4, "use_rslora": True}, {"rank_pattern": {"value": 1}, "alpha_pattern": {"query": 9}}]
)
def test_any_rank_and_scaling(settings: dict) -> None:
    backbone, codec, mixed = make(**settings)
    adapters = {name: make_adapter(codec, seed) for seed, name in enumerate("pq")}
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    assert_as_alone(backbone, adapters, list("pqqpqppq"), mixed(TEXTS, list("pqqpqppq")))


def test_only_the_named_adapters_make_the_logits_wide() -> None:
    _, codec, mixed = make()
    mixed.add("narrow", make_adapter(codec, ways=2))
    before = mixed(TEXTS[:1], ["narrow"]).logits
    mixed.add("wide", make_adapter(codec, ways=7))
    torch.testing.assert_close(mixed(TEXTS[:1], ["narrow"]).logits, before)
    assert before.shape == (1, 2) and mixed(TEXTS[:2], ["narrow", "wide"]).logits.shape == (2, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_in_place_with_other_classes(kind: str) -> None:
    backbone, codec, mixed = make(kind)
    adapters = {"p": make_adapter(codec, 0, ways=4), "q": make_adapter(codec, 1)}
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    place = mixed._lora.data_ptr(), mixed._heads.data_ptr()
    adapters["p"] = make_adapter(codec, 5, ways=2)
    mixed.replace("p", adapters["p"])
    assert (mixed._lora.data_ptr(), mixed._heads.data_ptr()) == place
    assert mixed.names == ["p", "q"] and mixed.labels("p") == ["f", "g"]
    assert_as_alone(backbone, adapters, list("pqpqqqpp"), mixed(examples_for(backbone), list("pqpqqqpp")))


def test_dropped_adapters_make_room_for_others() -> None:
    backbone, codec, mixed = make()
    adapters = {str(seed): make_adapter(codec, seed) for seed in range(8)}
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    place, size = mixed._lora.data_ptr(), len(mixed._lora)
    for name in ("3", "5"):
        mixed.drop(name)
        del adapters[name]
    for seed in (8, 9):
        adapters[str(seed)] = make_adapter(codec, seed, ways=2)
        mixed.add(str(seed), adapters[str(seed)])
    assert mixed._lora.data_ptr() == place and len(mixed._lora) == size == len(mixed) == 8
    assert "3" not in mixed and "9" in mixed
    assert_as_alone(backbone, adapters, list(adapters), mixed(TEXTS, list(adapters)))


def test_storage_grows_now_and_then_and_keeps_what_is_there() -> None:
    backbone, codec, mixed = make()
    adapters = {str(seed): make_adapter(codec, seed, ways=2 + seed % 2) for seed in range(40)}
    places = set()
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
        places.add(len(mixed._lora))
    assert places == {8, 16, 32, 64}
    names = list(adapters)[::5]
    assert_as_alone(backbone, adapters, names, mixed(TEXTS, names))


def test_what_is_added_does_not_follow_its_source() -> None:
    _, codec, mixed = make()
    adapter = make_adapter(codec)
    mixed.add("p", adapter)
    before = mixed(TEXTS[:1], ["p"])
    for tensor in adapter.tensors.values():
        tensor.zero_()
    adapter.labels.reverse()
    mixed.labels("p").reverse()
    after = mixed(TEXTS[:1], ["p"])
    assert torch.equal(before.logits, after.logits) and before.labels == after.labels


def test_any_mode_may_add_and_run() -> None:
    backbone, codec = make_codec("bert")
    with torch.inference_mode():
        mixed = MixedAdapters(backbone, codec.layout)
        mixed.add("p", make_adapter(codec, 0))
        first = mixed(TEXTS[:2], ["p", "p"]).logits
    mixed.add("q", make_adapter(codec, 1))
    mixed.replace("p", make_adapter(codec, 0))
    found = mixed(TEXTS[:2], ["p", "p"]).logits
    assert not found.requires_grad
    torch.testing.assert_close(found, first)


def test_the_backbone_is_as_it_was() -> None:
    backbone, codec, mixed = make()
    with torch.no_grad():
        before = backbone.model(**backbone.inputs(TEXTS)).logits
        mixed.add("p", make_adapter(codec))
        mixed(TEXTS[:2], ["p", "p"])
        assert torch.equal(backbone.model(**backbone.inputs(TEXTS)).logits, before)


def test_names_that_are_wrong() -> None:
    _, codec, mixed = make()
    with pytest.raises(ValueError, match=r"no adapters \['p'\]: expected .* such as \[\]"):
        mixed(TEXTS[:1], ["p"])
    mixed.add("p", make_adapter(codec))
    mixed.add("q", make_adapter(codec))
    with pytest.raises(ValueError, match=r"no adapters \['qq', 'x'\]: expected .* such as \['q', 'p'\]"):
        mixed(TEXTS[:2], ["qq", "x"])
    with pytest.raises(ValueError, match=r"no adapters \['x', 'y'\]"):
        mixed(TEXTS[:4], ["x", "p", "y", "x"])
    with pytest.raises(ValueError, match="2 examples and 3 names of adapters"):
        mixed(TEXTS[:2], ["p", "q", "p"])
    with pytest.raises(ValueError, match="0 examples and 0 names of adapters"):
        mixed([], [])
    with pytest.raises(ValueError, match="an adapter 'p' already: replace it"):
        mixed.add("p", make_adapter(codec))
    for call in (mixed.drop, mixed.labels, lambda name: mixed.replace(name, make_adapter(codec))):
        with pytest.raises(ValueError, match=r"no adapters \['x'\]"):
            call("x")
    assert mixed.names == ["p", "q"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "lora_A.weight has shape .4, 16. an adapter; expected .2, 16."),
        ({"target_modules": ["query", "key"]}, "does not fit the layout: missing .*value.*unexpected .*key"),
        ({"layers_to_transform": [2]}, "does not fit the layout: missing .*layer.1"),
        ({"lora_alpha": 9}, "adapts or scales other modules than the layout: .*layer.1.*query"),
        ({"use_rslora": True}, "adapts or scales other modules"),
    ],
)
def test_adapters_of_other_layouts(settings: dict, message: str) -> None:
    _, codec, mixed = make()
    mixed.add("p", make_adapter(codec))
    other = make_adapter(make_codec("bert", **settings)[1])
    for call, name in ((mixed.add, "q"), (mixed.replace, "p")):
        with pytest.raises(ValueError, match=message):
            call(name, other)
    assert mixed.names == ["p"]


def test_adapters_of_other_backbones() -> None:
    _, codec, mixed = make()
    adapter = make_adapter(codec)
    other = tiny_backbone(seed=1)
    for change in ({"fingerprint": other.fingerprint, "revision": "abc"}, {"pooling": "default"}):
        wrong = dataclasses.replace(adapter, base_model=adapter.base_model | change)
        with pytest.raises(ValueError, match=f"weights {wrong.base_model['fingerprint']}, pooling .*but the backbone"):
            mixed.add("p", wrong)
    with pytest.raises(ValueError, match="for the ViTForImageClassification 'tiny/vit'.*backbone is the MeanPooled"):
        mixed.add("p", make_adapter(make_codec("vit")[1]))
    # The same weights under another name or commit are the same backbone.
    moved = adapter.base_model | {"name_or_path": "elsewhere", "revision": "abc"}
    mixed.add("p", dataclasses.replace(adapter, base_model=moved))


def test_a_config_as_it_comes_from_a_file_is_the_same() -> None:
    _, codec, mixed = make()
    adapter = make_adapter(codec)
    mixed.add("p", adapter)
    config = adapter.lora_config
    saved = config | {"inference_mode": True, "base_model_name_or_path": "tiny", "target_modules": {"value", "query"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mixed.add("q", dataclasses.replace(adapter, lora_config=saved))
    found = mixed([TEXTS[0], TEXTS[0]], ["p", "q"]).logits
    torch.testing.assert_close(found[0], found[1])


def test_broken_adapters_change_nothing() -> None:
    _, codec, mixed = make()
    adapter = make_adapter(codec)
    mixed.add("p", adapter)
    before = mixed(TEXTS[:1], ["p"]).logits
    for key in adapter.tensors:
        for bad in (float("nan"), float("inf")):
            broken = adapter.tensors[key].clone()
            broken.view(-1)[-1] = bad
            with pytest.raises(ValueError, match="holds NaN or inf"):
                mixed.replace("p", changed(adapter, key, broken))
    with pytest.raises(ValueError, match="2 labels .* its head 3"):
        mixed.replace("p", dataclasses.replace(adapter, labels=["a", "b"]))
    with pytest.raises(ValueError, match=r"bias has shape \(2,\) an adapter; expected \(3,\)"):
        mixed.replace("p", changed(adapter, codec.layout.head_keys[1], torch.zeros(2)))
    assert torch.equal(mixed(TEXTS[:1], ["p"]).logits, before) and len(mixed) == 1


def test_words_that_a_language_model_cannot_tell_apart() -> None:
    _, codec, mixed = make("llama")
    with pytest.raises(ValueError, match="begin with the same token"):
        mixed.add("p", dataclasses.replace(make_adapter(codec), labels=["a b", "a c"]))
    assert len(mixed) == 0


def test_threads_take_turns() -> None:
    """Eight threads that call, replace and add get each their own answers."""
    backbone, codec, mixed = make()
    adapters = {f"adapter {seed}": make_adapter(codec, seed) for seed in range(8)}
    for name, adapter in adapters.items():
        mixed.add(name, adapter)
    expected = {name: mixed(TEXTS, [name] * len(TEXTS)).logits for name in adapters}

    def serve(number: int) -> list[bool]:
        name, right = f"adapter {number}", []
        for round in range(10):
            mixed.replace(name, adapters[name])
            mixed.add(f"{name}, {round}", adapters[name])
            found = mixed(TEXTS, [name] * len(TEXTS)).logits
            right.append(torch.allclose(found, expected[name], atol=1e-5))
        return right

    with ThreadPoolExecutor(8) as pool:
        answers = [one for own in pool.map(serve, range(8)) for one in own]
    assert answers == [True] * 80 and len(mixed) == 88
