"""What tests write otherwise for older versions of the libraries below us; `docs/versions.md` has the tested ones."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Leaves a test out where an older package lacks what it tests."""
    return pytest.mark.skipif(Version(version(package)) < Version(least), reason=f"{package} before {least} {why}")


reads_heads = needs("transformers", "5.6", "leaves the head out when it loads an adapter by itself, without a word")
# diffusers 0.36 has the older name alone.
DTYPE = "dtype" if Version(version("diffusers")) >= Version("0.42") else "torch_dtype"
# Before, a card is checked by the true Hub, wherever HF_ENDPOINT points.
CARDS_ASK_ENDPOINT = Version(version("huggingface_hub")) >= Version("2")
# transformers 5.9 gave other names to the modules of ViT.
OLD_VIT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
NEW_VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
NEW_NAMES = Version(version("transformers")) >= Version("5.9")
VIT_LINEAR = VIT_QUERY, _, VIT_VALUE, _, VIT_WIDE, _ = NEW_VIT if NEW_NAMES else OLD_VIT
VIT_MODULE = (
    f"vit.layers.1.attention.{VIT_QUERY}" if NEW_NAMES else f"vit.encoder.layer.1.attention.attention.{VIT_QUERY}"
)
