"""A family's benchmark in small: data sets of the same columns and names, tiny backbones, hardly any steps."""

import copy
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from data import installed_backbone
from datasets import ClassLabel, Dataset, Features, Image, Value
from families import ROOT
from PIL import Image as Pillow
from transformers import AutoTokenizer, BitImageProcessor, Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel


CONFIGS = ROOT / "examples" / "configs" / "benchmark"
ROWS = 8  # of a class in a domain and a split
STYLES = ["photo", "art_painting", "cartoon", "sketch"]
OBJECTS = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
REVIEWS = (
    "books electronics dvd kitchen_housewares apparel camera_photo health_personal_care music toys_games video baby "
    "magazines software sports_outdoors"
).split()
DOMAINS = "banking credit_cards kitchen_and_dining home auto_and_commute travel utility work small_talk meta".split()
SENTENCES = {  # name -> the columns of its texts, its splits
    "sst2": (["sentence"], ["train", "test"]),
    "cr": (["text"], ["train", "test"]),
    "mpqa": (["text"], ["train", "test"]),
    "subj": (["text"], ["train", "test"]),
    "mrpc": (["sentence1", "sentence2"], ["train", "test"]),
    "rte": (["sentence1", "sentence2"], ["train", "validation"]),
    "cola": (["sentence"], ["train", "validation_matched"]),
}
SIZES = {
    "episodes": 3,
    "slow_episodes": 2,
    "setfit_episodes": 1,
    "validation_episodes": 2,
    "shared_steps": 2,
    "reptile_steps": 1,
    "gradient_steps": [1, 2],
    "gradient_learning_rates": [1e-3],
    "lorahub_evaluations": 3,
    "ceiling_steps": 2,
    "ceiling_examples": 4,
    "timings": 1,
    "inference_steps": [1, 2],
    "chain_examples": 4,
    "grid": 3,
}
TRAJECTORIES = {
    "num_tasks": 4,
    "ways": [2, 3],
    "examples_per_class": [4, 4],
    "queries_per_class": 2,
    "shared_steps": 2,
    "shared_shots": [1, 1],
    "train_batch_size": 4,
    "max_train_steps": 3,
}
TRAINING = {
    "max_train_steps": 2,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "num_validation_episodes": 2,
    "shots": [1, 2],
    "train_batch_size": 2,
    "task_loss_tasks": 2,
    "queries_per_class": 2,
    "dim": 32,
    "num_layers": 1,
    "num_inference_steps": 2,
}


def smoke_family(family: dict, folder: Path) -> dict:
    """The same family in small, its data sets in FOLDER/data and its backbones in FOLDER/backbones."""
    family = copy.deepcopy(family)
    setfit = min(SIZES["setfit_episodes"], family.get("sizes", {}).get("setfit_episodes", 1))
    family |= {"sizes": SIZES | {"setfit_episodes": setfit}, "seeds": [0]}
    for values in family["generators"].values():
        values["trajectories"] |= TRAJECTORIES
        kinds = family.get("training", {}) | values["training"]
        values["training"] |= TRAINING | {"validation_tasks": _small(kinds["validation_tasks"])}
        values["folds"] = dict(itertools.islice(values["folds"].items(), 2))
        values["ablation_seeds"] = [own["seeds"][0] for own in values["folds"].values() if "seeds" in own] or [0]
    for table in family["tables"]:
        table["validation_kinds"] = _small(table.get("validation_kinds", table["kinds"]))[1:]
        table["kinds"] = _small(table["kinds"])[1:]
        table.pop("sizes", None)
    write_data(folder / "data")
    write_backbones(folder / "backbones")
    return family


def _small(kinds: list[str]) -> list[str]:
    """Two classes, and one shot or two, of the first group of tasks."""
    group, colon, _ = kinds[0].rpartition(":")
    return [f"{group}{colon}2x1", f"{group}{colon}2x2"]


def write_data(root: Path) -> None:
    """Data sets whose classes can be told apart: each has a word or a grey of its own."""
    omniglot = json.loads((CONFIGS / "few_shot.json").read_text())["generators"]["omniglot"]
    own = omniglot["folds"]["all"]
    alphabets = omniglot["trajectories"]["train_domains"] + own["validation_domains"] + own["test_domains"]
    tables = {
        "clinc150": (["text"], "intent", _own_classes(DOMAINS), "domain", ["train", "validation", "test"]),
        "banking77": (["text"], "label", _own_classes(["all"]), None, ["train", "test"]),
        "fdu_mtl": (
            ["text"],
            "label",
            {name: ["negative", "positive"] for name in REVIEWS},
            "domain",
            ["train", "test"],
        ),
        "omniglot": (["image"], "character", _own_classes(alphabets), "alphabet", ["train", "test"]),
        "pacs": (["image"], "label", dict.fromkeys(STYLES, OBJECTS), "domain", ["train"]),
        "digits": (["image"], "label", _own_classes(["all"]), None, ["train"]),
    }
    for name, (columns, splits) in SENTENCES.items():
        tables[name] = (columns, "label", {"all": ["no", "yes"]}, None, splits)
    for name, (columns, label, classes, domain, splits) in tables.items():
        folder = root / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(splits):
            # the Hub's own pattern, under which a split may have any name
            path = folder / f"{split}-00000-of-00001.parquet"
            _split(columns, label, classes, domain, number).to_parquet(path)


def _own_classes(domains: list[str]) -> dict[str, list[str]]:
    """Three classes for each domain, that no other has."""
    return {domain: [f"{domain} {number}" for number in range(3)] for domain in domains}


def _split(columns: list[str], label: str, classes: dict[str, list[str]], domain: str | None, seed: int) -> Dataset:
    """Rows of every class in every domain."""
    random = np.random.default_rng(seed)
    names = list(dict.fromkeys(itertools.chain(*classes.values())))
    rows = [(place, own) for place, group in enumerate(classes.values()) for own in group for _ in range(ROWS)]
    images = columns == ["image"]
    values = {
        column: [_image(names.index(own), random) if images else _text(own, random) for _, own in rows]
        for column in columns
    }
    features = {column: Image() if images else Value("string") for column in columns}
    values[label], features[label] = [names.index(own) for _, own in rows], ClassLabel(names=names)
    if domain is not None:
        values[domain], features[domain] = [place for place, _ in rows], ClassLabel(names=list(classes))
    return Dataset.from_dict(values, features=Features(features))


def _text(name: str, random: np.random.Generator) -> str:
    return " ".join([name, *random.choice(["red", "green", "blue", "slow", "fast"], size=3)])


def _image(number: int, random: np.random.Generator) -> Pillow.Image:
    return Pillow.fromarray((random.integers(60, size=(28, 28)) + 5 * (number % 39)).astype(np.uint8))


def write_backbones(root: Path) -> None:
    """A backbone for each name in the configs, as deep as the real one, since its last layers are adapted."""
    torch.manual_seed(0)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "model_cards" / "mcdi-omniglot-vit" / "backbone", root / "omniglot-vit", dirs_exist_ok=True)
    sizes = {"hidden_size": 32, "num_attention_heads": 2}
    vit = Dinov2Config(num_hidden_layers=8, image_size=28, patch_size=14, mlp_ratio=2, **sizes)
    Dinov2Model(vit).save_pretrained(root / "dinov2-small-focus-84px")
    side = {"height": 28, "width": 28}
    BitImageProcessor(size=side, crop_size=side).save_pretrained(root / "dinov2-small-focus-84px")
    tokenizer = AutoTokenizer.from_pretrained(installed_backbone())
    llama = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=32, num_hidden_layers=30, pad_token_id=0, **sizes)
    LlamaModel(llama).save_pretrained(root / "SmolLM2-135M-Instruct")
    tokenizer.save_pretrained(root / "SmolLM2-135M-Instruct")
