"""Layout and codec hold for any rank, targets, width of tokens and number of classes that a config may have."""

import json
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import random_adapters, tiny_backbone

from mcdi_hf import AdapterCodec, AdapterLayout
from mcdi_hf.adapters.layout import LoraModule
from mcdi_hf.trajectories.dataset import split_weights


# The same examples on every run, and no time limit: the machine may be busy.
ALWAYS_THE_SAME = settings(derandomize=True, deadline=None, max_examples=40, database=None)
TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
BACKBONE = tiny_backbone()

configs = st.builds(
    LoraConfig,
    task_type=st.sampled_from(["SEQ_CLS", None]),
    r=st.integers(1, 5),
    lora_alpha=st.integers(1, 32),
    use_rslora=st.booleans(),
    target_modules=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    layers_to_transform=st.lists(st.integers(0, 2), min_size=1, unique=True),
    rank_pattern=st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 6), max_size=2),
    alpha_pattern=st.dictionaries(st.sampled_from(TARGETS), st.integers(1, 9), max_size=2),
)
names = st.text(alphabet=string.ascii_lowercase + "._0", min_size=1, max_size=20)
sizes = st.integers(1, 40)
modules = st.builds(LoraModule, names, sizes, sizes, sizes, st.floats(0.01, 100))
layouts = st.builds(
    AdapterLayout,
    st.lists(modules, min_size=1, max_size=5, unique_by=lambda module: module.name),
    st.sampled_from([None, "classifier"]),
    st.integers(1, 20),
    st.integers(22, 90),
)


@ALWAYS_THE_SAME
@given(layouts)
def test_a_layout_is_its_json(layout: AdapterLayout) -> None:
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again.to_dict() == layout.to_dict() and again.shapes(3) == layout.shapes(3)
    assert again.tokens == layout.tokens and sum(token.width for token in layout.tokens) == layout.numel
    assert all(0 < token.width <= layout.token_dim for token in layout.tokens)


@ALWAYS_THE_SAME
@given(layouts, st.integers(1, 4), st.integers(2, 6))
def test_flat_weights_are_their_tensors(layout: AdapterLayout, count: int, ways: int) -> None:
    tensors = random_adapters(layout, count, ways)
    flat = torch.cat([tensors[key].flatten(1) for key in layout.keys], dim=1)
    assert flat.shape == (count, layout.width(ways))
    padded = torch.nn.functional.pad(flat, (0, 7))  # as a data set of more classes has them
    found = split_weights(padded, ways, layout)
    assert found.keys() == tensors.keys() and all(found[key].equal(tensors[key]) for key in tensors)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # of patterns that no target matches
@ALWAYS_THE_SAME
@given(configs, st.integers(18, 80), st.integers(1, 3), st.integers(2, 6))
def test_decode_is_the_inverse_of_encode(config: LoraConfig, token_dim: int, count: int, ways: int) -> None:
    codec = AdapterCodec.from_backbone(BACKBONE, config, token_dim)
    generator = torch.Generator().manual_seed(ways)
    codec.mean.normal_(generator=generator).mul_(codec.filled)
    codec.std.uniform_(0.5, 2, generator=generator)
    codec.head_std.uniform_(0.5, 2, generator=generator)
    tensors, head = random_adapters(codec.layout, count, ways), None
    if codec.layout.head_keys:
        head = torch.randn(count, ways, 16, generator=generator), torch.randn(count, ways, generator=generator)
    tokens = codec.encode(tensors, head)
    assert tokens.shape == (count, codec.num_tokens(ways), token_dim)
    mask = codec.token_mask(torch.ones(count, ways, dtype=torch.bool))
    assert not tokens[~mask].any()
    torch.testing.assert_close(codec.decode(tokens, head), tensors, rtol=1e-4, atol=1e-4)
    again = codec.encode(codec.decode(tokens, head), head)
    torch.testing.assert_close(again, tokens, rtol=1e-3, atol=1e-3)
