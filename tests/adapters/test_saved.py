"""A saved adapter is read back as it was, from a folder or the Hub, and used where this package is not installed."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from tiny import tiny_language_pipeline, tiny_pipeline
from versions import reads_heads

from mcdi_hf import AdapterSlot, GeneratedAdapter, MCDiPipeline, MixedAdapters


SUPPORT = {"r": ["a b c", "a c"], "g": ["x y z", "z y"], "b": ["a z", "b y"]}
TEXTS = ["a b", "x", "c c z", "y b a"]


def generate(pipe: MCDiPipeline, seed: int = 0) -> GeneratedAdapter:
    pipe.set_progress_bar_config(disable=True)
    return pipe(SUPPORT, generator=torch.Generator().manual_seed(seed), temperature=2.0).adapters[0]


@pytest.mark.parametrize("kind", ["mean", "default", "llama"])
def test_an_adapter_is_read_back(kind: str, tmp_path: Path) -> None:
    pipe, backbone = tiny_language_pipeline() if kind == "llama" else tiny_pipeline(kind)
    adapter = generate(pipe)
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = GeneratedAdapter.from_pretrained(tmp_path / "adapter")
    assert (loaded.labels, loaded.base_model, loaded.details) == (adapter.labels, adapter.base_model, adapter.details)
    torch.testing.assert_close(loaded.tensors, adapter.tensors, rtol=0, atol=0)
    expected = pipe.predict(adapter, TEXTS)
    assert pipe.predict(str(tmp_path / "adapter"), TEXTS) == pipe.predict(loaded, TEXTS) == expected
    for answer, own in zip(loaded.predict(TEXTS, backbone), expected):
        assert answer["label"] == own["label"] and answer["score"] == pytest.approx(own["score"], abs=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "generation.json", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_of_the_hub_and_of_a_commit(hub: FakeHub) -> None:
    pipe, _ = tiny_pipeline("default")
    first = generate(pipe)
    commit = first.push_to_hub("tester/one").split("/")[-1]
    generate(pipe, seed=1).push_to_hub("tester/one")
    newest, old = (GeneratedAdapter.from_pretrained("tester/one", revision=one) for one in (None, commit))
    torch.testing.assert_close(old.tensors, first.tensors, rtol=0, atol=0)
    assert newest.details.seed == 1 != old.details.seed


def test_folders_are_served(tmp_path: Path) -> None:
    pipe, backbone = tiny_pipeline("default")
    adapters = [generate(pipe, seed) for seed in (0, 1)]
    for number, adapter in enumerate(adapters):
        adapter.save_pretrained(tmp_path / str(number))
    mixed = MixedAdapters(backbone, pipe.codec.layout)
    mixed.add("one", tmp_path / "0")
    mixed.add("two", adapters[0])
    mixed.replace("two", str(tmp_path / "1"))
    answers = mixed(TEXTS * 2, ["one"] * 4 + ["two"] * 4).labels
    assert answers == [one["label"] for adapter in adapters for one in pipe.predict(adapter, TEXTS)]
    slot = AdapterSlot(adapters[0].load_into(backbone.classifier(3)))
    slot.swap(tmp_path / "1")
    with torch.no_grad():
        found = slot.model(**backbone.inputs(TEXTS)).logits.argmax(dim=1).tolist()
    assert [adapters[1].labels[index] for index in found] == answers[4:]


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    pipe, _ = tiny_pipeline("default")
    adapter = generate(pipe)
    replace(adapter, labels=["r", "g"]).save_pretrained(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"\['r', 'g'\].*a head of others"):
        GeneratedAdapter.from_pretrained(tmp_path / "labels")
    broken = {key: value * float("nan") for key, value in adapter.tensors.items()}
    replace(adapter, tensors=broken).save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="holds NaN or inf"):
        GeneratedAdapter.from_pretrained(tmp_path / "broken")
    adapter.save_pretrained(tmp_path / "own")
    record = tmp_path / "own" / "generation.json"
    for wrong in ({"labels": ["a"]}, {**json.loads(record.read_text()), "more": 1}):
        record.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="holds no generated adapter"):
            GeneratedAdapter.from_pretrained(tmp_path / "own")
    record.unlink()
    with pytest.raises(FileNotFoundError, match="generation.json is missing"):
        GeneratedAdapter.from_pretrained(tmp_path / "own")


def test_its_repr_is_one_screen() -> None:
    pipe, backbone = tiny_pipeline("default")
    text = repr(replace(generate(pipe), labels=[f"a class of a long name {number}" for number in range(900)]))
    assert backbone.name_or_path in text and len(text) < 800 and "\n" not in text


ELSEWHERE = """
import importlib.util, json, sys
assert importlib.util.find_spec("mcdi_hf") is None
from peft import AutoPeftModelForSequenceClassification
from transformers import pipeline

place, base, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
names = {0: "r", 1: "g", 2: "b"}
model = AutoPeftModelForSequenceClassification.from_pretrained(place, num_labels=3, id2label=names)
by_peft = pipeline("text-classification", model=model, tokenizer=base)(texts)
classes = {"num_labels": 3, "id2label": names}
by_name = pipeline("text-classification", model=place, tokenizer=base, model_kwargs=classes)(texts)
print(json.dumps([by_peft, by_name]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with this one's packages, but not this project's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (own,) = (folder / "lib").glob("*/site-packages")
    # A path added this way is not searched for .pth files, so the editable checkout does not come along.
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize("pooling", [pytest.param("default", marks=reads_heads), "mean"])
def test_where_this_package_is_not_installed_it_answers_the_same_or_refuses(
    python: Path, pooling: str, tmp_path: Path
) -> None:
    pipe, backbone = tiny_pipeline(pooling)
    adapter = generate(pipe)
    adapter.save_pretrained(tmp_path)
    command = [python, "-I", "-c", ELSEWHERE, tmp_path, backbone.name_or_path, json.dumps(TEXTS)]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    if pooling == "mean":  # its head reads what the plain class does not make
        assert ended.returncode and "No modules were targeted" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    for answers in json.loads(ended.stdout.splitlines()[-1]):
        for one, expected in zip(answers, pipe.predict(adapter, TEXTS), strict=True):
            assert one["label"] == expected["label"] and one["score"] == pytest.approx(expected["score"], abs=1e-4)
