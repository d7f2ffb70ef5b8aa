"""Pipelines and adapters to the Hub and back, with the real clients against the fake Hub."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from fake_hub import FakeHub
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from tiny import tiny_pipeline

from mcdi_hf import FrozenBackbone, GeneratedAdapter, MCDiPipeline, MeanPooledForSequenceClassification


PIPE, ADAPTER = "tester/pipe", "tester/adapter"
SUPPORT = {"first": ["a b c", "a c"], "second": ["x y z", "z y"]}


@pytest.fixture(scope="module")
def made() -> tuple[MCDiPipeline, FrozenBackbone, GeneratedAdapter]:
    pipe, backbone = tiny_pipeline()
    return pipe, backbone, generate(pipe)


def generate(pipe: MCDiPipeline) -> GeneratedAdapter:
    pipe.set_progress_bar_config(disable=True)
    return pipe(SUPPORT, generator=torch.Generator().manual_seed(0), num_inference_steps=3).adapters[0]


@torch.no_grad()
def logits(model: torch.nn.Module, backbone: FrozenBackbone) -> torch.Tensor:
    return model(**backbone.inputs(["a b", "x", "c c z", "y b a"])).logits


def revision_of(create_pr: bool) -> str:
    return "refs/pr/1" if create_pr else "main"


@pytest.mark.parametrize("create_pr", [False, True])
@pytest.mark.parametrize("loader", [MCDiPipeline, DiffusionPipeline])
def test_pipeline(hub: FakeHub, made: tuple, loader: type[DiffusionPipeline], create_pr: bool) -> None:
    pipe, _, adapter = made
    pipe.push_to_hub(PIPE, create_pr=create_pr)
    assert ("model_index.json" in hub.files(PIPE)) != create_pr
    loaded = loader.from_pretrained(PIPE, revision=revision_of(create_pr))
    assert isinstance(loaded, MCDiPipeline)
    again = generate(loaded)
    assert again.labels == adapter.labels and again.details.generator == PIPE
    torch.testing.assert_close(again.tensors, adapter.tensors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"repo_id": "tester/named", "create_pr": True, "commit_message": "Mine"}])
def test_a_pipeline_saved_and_pushed_at_once(hub: FakeHub, made: tuple, tmp_path: Path, given: dict) -> None:
    made[0].save_pretrained(tmp_path / "pipe", push_to_hub=True, **given)
    paths = [path for path in (tmp_path / "pipe").rglob("*") if path.is_file()]
    saved = {str(path.relative_to(tmp_path / "pipe")): path.read_bytes() for path in paths}
    pushed = hub.files(given.get("repo_id", PIPE), ref=revision_of("create_pr" in given))
    assert saved.items() <= pushed.items() and pushed.keys() - saved.keys() == {"README.md", ".gitattributes"}


def test_a_pipeline_tells_nobody_where_it_was(made: tuple, tmp_path: Path) -> None:
    made[0].save_pretrained(tmp_path / "private")
    MCDiPipeline.from_pretrained(tmp_path / "private").save_pretrained(tmp_path / "again")
    for path in (tmp_path / "private").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "private")).read_bytes()


def test_card_of_a_pipeline_is_kept(hub: FakeHub, made: tuple) -> None:
    card = b"---\nlicense: mit\n---\n# Mine"
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=HfApi().create_repo(PIPE).repo_id)
    made[0].push_to_hub(PIPE)
    card = ModelCard.load(PIPE)
    assert card.data.license == "mit" and "# Mine" in card.text
    assert "model_index.json" in hub.files(PIPE)


@pytest.mark.parametrize("create_pr", [False, True])
def test_adapter(hub: FakeHub, made: tuple, create_pr: bool) -> None:
    _, backbone, adapter = made
    url = adapter.push_to_hub(ADAPTER, create_pr=create_pr, commit_message="Hand over")
    revision = revision_of(create_pr)
    assert url.startswith(f"{hub.url}/{ADAPTER}/commit/")
    files = {"adapter_config.json", "adapter_model.safetensors", "generation.json", "README.md"}
    assert hub.files(ADAPTER, ref=revision).keys() == {".gitattributes"} | files
    assert (files <= hub.files(ADAPTER).keys()) != create_pr
    assert f'PeftModel.from_pretrained(base, "{ADAPTER}")' in hub.files(ADAPTER, ref=revision)["README.md"].decode()
    base = MeanPooledForSequenceClassification.from_backbone(backbone.name_or_path, num_labels=2)
    model = PeftModel.from_pretrained(base, ADAPTER, revision=revision)
    live = logits(adapter.load_into(backbone.classifier(num_labels=2)), backbone)
    torch.testing.assert_close(logits(model, backbone), live, rtol=1e-6, atol=1e-6)


def test_adapter_is_named_after_a_local_pipeline_without_its_path(made: tuple, tmp_path: Path) -> None:
    made[0].save_pretrained(tmp_path / "private" / "generator")
    adapter = generate(MCDiPipeline.from_pretrained(tmp_path / "private" / "generator"))
    assert adapter.details.generator == "generator"
    assert "private" not in adapter.card(ADAPTER).text.replace(adapter.base_model["name_or_path"], "")


@pytest.mark.parametrize("private", [False, True])
def test_private_adapter(hub: FakeHub, made: tuple, private: bool) -> None:
    made[2].push_to_hub(ADAPTER, private=private)
    assert HfApi().repo_info(ADAPTER).private == private
