"""Layout and codec hold for any rank, targets and number of classes that a config may have."""

import json
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import random_codec, tiny_backbone

from mcdi_hf import AdapterLayout
from mcdi_hf.adapters.layout import LoraModule


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
)


@ALWAYS_THE_SAME
@given(layouts)
def test_a_layout_is_its_json(layout: AdapterLayout) -> None:
    again = AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again.to_dict() == layout.to_dict() and again.shapes(3) == layout.shapes(3)
    assert again.tokens == layout.tokens and len(layout.tokens) == len(layout.modules)
    assert [token.width for token in layout.tokens] == [module.rank for module in layout.modules]
    assert max(token.width for token in layout.tokens) == layout.token_dim


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # of patterns that no target matches
@ALWAYS_THE_SAME
@given(configs, st.integers(1, 3))
def test_reading_is_the_inverse_of_writing(config: LoraConfig, count: int) -> None:
    codec = random_codec(BACKBONE, config)
    codec.std.uniform_(0.5, 2, generator=torch.Generator().manual_seed(count))
    tokens = torch.randn(count, *codec.filled.shape, generator=torch.Generator().manual_seed(0)) * codec.filled
    tensors = codec.matrices(codec.coefficients(tokens))
    torch.testing.assert_close(codec.encode(codec.read(tensors)), tokens, rtol=1e-3, atol=1e-3)
    for module, own in zip(codec.layout.modules, codec.coefficients(tokens).unbind(dim=1)):
        product = tensors[module.key("lora_B")] @ tensors[module.key("lora_A")]
        shared = codec.shared_adapter()
        scaled = shared[module.key("lora_B")] @ torch.diag_embed(own[:, : module.rank]) @ shared[module.key("lora_A")]
        torch.testing.assert_close(product, scaled, rtol=1e-4, atol=1e-5)
