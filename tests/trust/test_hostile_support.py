"""Support sets, repository names and tokens as nobody should hand them in: a result, or an error that says why not."""

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from fake_hub import FakeHub
from peft import PeftModel
from PIL import Image
from reliability import Reliability
from tiny import tiny_image_pipeline, tiny_language_pipeline, tiny_pipeline
from transformers import BatchEncoding
from versions import needs

from mcdi_hf import GeneratedAdapter, MCDiPipeline


PART = "hostile support sets"
LETTERS = ["x y", "y"]
SECRET = "hf_donttellthissecrettoanyone0123456789"


@pytest.fixture(scope="module")
def pipes() -> dict[str, MCDiPipeline]:
    return {"bert": tiny_pipeline()[0], "vit": tiny_image_pipeline()[0], "llama": tiny_language_pipeline()[0]}


def image(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.full(size[::-1], 40000, dtype=np.uint16))
    return Image.new(mode, size)


def truncated_image() -> Image.Image:
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return Image.open(BytesIO(file.getvalue()[:60]))


def dataset(inputs: list, labels: list[int], feature: Any = Value("string")) -> Dataset:
    features = Features({"input": feature, "label": ClassLabel(names=["p", "q"])})
    return Dataset.from_dict({"input": inputs, "label": labels}, features=features)


def usable(adapter: GeneratedAdapter, pipe: MCDiPipeline, folder: Path) -> bool:
    """Saved, loaded by PEFT, finite, and with the labels that were given."""
    adapter.save_pretrained(folder)
    PeftModel.from_pretrained(pipe.backbone.classifier(len(adapter.labels)), folder)
    assert all(tensor.isfinite().all() for tensor in adapter.tensors.values())
    return adapter.load_into(pipe.backbone.classifier(len(adapter.labels))).config.id2label == adapter.id2label


SIGNS = {
    "NUL": "\x00",
    "an escape": "\x1b[31m",
    "right to left": "\u202eabc",
    "no width": "\u200b",
    "emoji": "\U0001f600" * 500,
    "long": "a " * 20_000,
    "a path": "../../etc/passwd",
    "another path": "C:\\x/y",
    "braces": "{evil} %s",
    "a table": "a | b\n---",
    "code": '```\n"""; import os',
    "markup": "<script>alert(1)</script>",
}
ACCEPTED: dict[str, tuple[str, Any]] = {
    **{f"{name} as a text": ("bert", {"p": [sign], "q": LETTERS}) for name, sign in SIGNS.items()},
    **{f"{name} as a label": ("bert", {sign: ["a"], "q": LETTERS}) for name, sign in SIGNS.items()},
    **{f"{name} for a language model": ("llama", {"p": [sign], "q": LETTERS}) for name, sign in SIGNS.items()},
    **{
        f"an image of mode {mode}": ("vit", {"p": [image(mode)], "q": [image()]})
        for mode in ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV")
    },
    **{
        f"an image of {size}": ("vit", {"p": [image(size=size)], "q": [image()]})
        for size in [(1, 1), (2000, 3), (3, 2000)]
    },
    "10,000 examples": ("bert", {"p": ["a b"] * 10_000, "q": LETTERS}),
    "300 classes": ("bert", {f"class {index}": ["a"] for index in range(300)}),
    "the same example in both classes": ("bert", {"p": ["a"], "q": ["a"]}),
    "a generator of examples": ("bert", {"p": (text for text in LETTERS), "q": LETTERS}),
}
REFUSED: dict[str, tuple[str, Any, str]] = {
    "nothing": ("bert", None, "NoneType"),
    "no class": ("bert", {}, "at least two"),
    "one class": ("bert", {"p": ["a"]}, "at least two"),
    "an empty class": ("bert", {"p": [], "q": LETTERS}, "'p' has no example"),
    "an empty text": ("bert", {"p": [""], "q": LETTERS}, "'p' holds ''"),
    "a text of spaces": ("bert", {"p": ["\t\n"], "q": LETTERS}, "'p' holds"),
    "half a sign in a text": ("bert", {"p": ["\ud800"], "q": LETTERS}, "'p' holds"),
    "half a sign in a pair": ("bert", {"p": [("a", "\udfff")], "q": [("a", "b")]}, "'p' holds"),
    "half a sign in a label": ("bert", {"\ud800": ["a"], "q": LETTERS}, "is no label"),
    "a label of spaces": ("llama", {" ": ["a"], "q": LETTERS}, "is no label"),
    "labels that begin alike": ("llama", {"p a": ["a"], "p b": ["b"]}, "begin with the same token"),
    "bytes": ("bert", {"p": [b"a"], "q": LETTERS}, "'p' holds b'a'"),
    "texts and numbers": ("bert", {"p": ["a", 1], "q": LETTERS}, "'p' holds 1"),
    "texts and nothing": ("bert", {"p": ["a", None], "q": LETTERS}, "'p' holds None"),
    "texts and pairs": ("bert", {"p": [("a", "b")], "q": LETTERS}, "mixes texts and pairs"),
    "texts and images": ("vit", {"p": ["a"], "q": [image()]}, "mixes texts and images"),
    "images for texts": ("bert", {"p": [image()], "q": [image()]}, "reads texts"),
    "texts for images": ("vit", {"p": ["a"], "q": LETTERS}, "reads images"),
    "a number of examples": ("bert", {"p": 3, "q": LETTERS}, "'p' are a int"),
    "no examples at all": ("bert", {"p": None, "q": LETTERS}, "'p' are a NoneType"),
    "a dict of examples": ("bert", {"p": {"a": 1}, "q": LETTERS}, "'p' are a dict: expected a list"),
    "tokens": ("llama", {"p": BatchEncoding({"input_ids": [[1]]}), "q": LETTERS}, "'p' are a BatchEncoding: expected"),
    "ready features": ("bert", {"p": torch.zeros(1, 16), "q": torch.ones(1, 16)}, "'p' holds tensor"),
    "an image without pixels": ("vit", {"p": [image(size=(0, 5))], "q": [image()]}, r"size \(0, 5\)"),
    "an image of 16 bits": ("vit", {"p": [image("I;16")], "q": [image()]}, "mode 'I;16'"),
    "an image of 32 bits": ("vit", {"p": [image("I")], "q": [image()]}, "mode 'I'"),
    "an image of floats": ("vit", {"p": [image("F")], "q": [image()]}, "mode 'F'"),
    "half an image": ("vit", {"p": [truncated_image()], "q": [image()]}, "cannot be decoded"),
    "a data set without a text": ("bert", dataset(["a", None], [0, 1]), "'q' holds None"),
    "an empty data set": ("bert", dataset([], []), "at least two"),
    "a data set of one class": ("bert", dataset(["a", "b"], [0, 0]), "at least two"),
    "a broken image file": ("vit", dataset([__file__, __file__], [0, 1], ImageFeature()), "test_hostile_support.py"),
    "a stream": ("bert", dataset(["a", "b"], [0, 1]).to_iterable_dataset(), "IterableDataset"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_support_sets_give_adapters(
    pipes: dict[str, MCDiPipeline], reliability: Reliability, tmp_path: Path, name: str
) -> None:
    kind, support = ACCEPTED[name]
    generator = torch.Generator().manual_seed(0)

    def generate() -> GeneratedAdapter:
        return pipes[kind](support, num_inference_steps=2, generator=generator).adapters[0]

    adapter, said = reliability.attempt(PART, generate)
    assert not said and adapter.labels == list(support) and usable(adapter, pipes[kind], tmp_path / "adapter")


@pytest.mark.parametrize("name", REFUSED)
def test_support_sets_that_say_nothing_are_refused(
    pipes: dict[str, MCDiPipeline], reliability: Reliability, name: str
) -> None:
    kind, support, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError, OSError), match=message) as raised:
        pipes[kind](support)
    reliability.attempt(PART, lambda: pipes[kind](support), str(raised.value))


def test_class_names_cannot_be_doubled(pipes: dict[str, MCDiPipeline]) -> None:
    with pytest.raises(ValueError, match="duplicated"):
        ClassLabel(names=["p", "p"])
    adapter = pipes["bert"]({"p": ["a"], "p ": ["b"]}, num_inference_steps=2).adapters[0]
    assert adapter.labels == ["p", "p "]


ASCII = needs("huggingface_hub", "1.33", "leaves it to the Hub to refuse other letters")


@pytest.mark.parametrize(
    "name",
    ["a b", "tester/a/b", "../up", pytest.param("tester/ü", marks=ASCII), "tester/-a", "tester/a--b", "", "a" * 200],
)
def test_bad_repository_names_are_refused(
    pipes: dict[str, MCDiPipeline], hub: FakeHub, reliability: Reliability, name: str
) -> None:
    adapter = pipes["bert"]({"p": ["a"], "q": LETTERS}, strength=0.0).adapters[0]
    for push in (adapter.push_to_hub, pipes["bert"].push_to_hub):
        _, said = reliability.attempt("bad repository names", lambda: push(name), "Repo id", "repo_id", "repository")
        assert said
    assert not hub.repos


def test_a_token_is_told_to_nobody(
    pipes: dict[str, MCDiPipeline],
    hub: FakeHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("fake_hub.TOKEN", SECRET)  # the Hub takes no other
    caplog.set_level(logging.DEBUG)
    pipe = pipes["bert"]
    pipe.push_to_hub("tester/pipe", token=SECRET)
    loaded = MCDiPipeline.from_pretrained("tester/pipe", token=SECRET)
    loaded.backbone = pipe.backbone
    loaded.save_pretrained(tmp_path / "pipe")
    adapter = loaded({"p": ["a"], "q": LETTERS}, num_inference_steps=2).adapters[0]
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.push_to_hub("tester/adapter", token=SECRET)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pushed = {**hub.files("tester/pipe"), **hub.files("tester/adapter")}
    assert len(written) > 8 and "model_index.json" in pushed and "adapter_config.json" in pushed
    for data in (*written.values(), *pushed.values()):
        assert SECRET.encode() not in data
    printed = capfd.readouterr()
    assert (
        SECRET not in caplog.text and SECRET not in printed.out + printed.err and SECRET not in repr(adapter.details)
    )
