"""An experiment in small: classes that have words of their own, a tiny random backbone, hardly any steps."""

from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from seal import write_json
from transformers import BertConfig, BertModel, BertTokenizerFast


DOMAINS, CLASSES, ROWS = ["red", "green", "blue", "white"], 3, 8  # rows of a class and a split
FILLERS = ["slow", "fast", "old", "new", "far"]
RECIPE = {
    "backbone": "backbone",
    "sources": [{"dataset_name": "words", "group_column": "domain"}],
    "trajectories": {
        "base_model_name": "tiny",
        "rank": 2,
        "layers": [1],
        "target_modules": ["query", "value"],
        "pooling": "mean",
        "num_tasks": 4,
        "ways": [2, 3],
        "shots": [1, 2],
        "queries_per_class": 2,
        "shared_steps": 2,
        "tasks_per_step": 2,
        "max_train_steps": 3,
    },
    "training": {
        "tasks_per_step": 1,
        "train_batch_size": 2,
        "task_loss_weight": 1.0,
        "task_loss_tasks": 2,
        "queries_per_class": 2,
        "shots": [1, 2],
        "dim": 32,
        "num_layers": 1,
        "num_inference_steps": 2,
        "max_train_steps": 2,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "num_validation_episodes": 2,
        "validation_queries": 2,
        "num_conditions": 2,
        "validation_tasks": ["2x1"],
    },
    "seeds": [0],
    "folds": {"all": {"validation_domains": ["blue"], "test_domains": ["white"]}},
}
CONFIG = {
    "title": "Words of a domain that no generator has seen",
    "generator": "recipe.json",
    "sources": RECIPE["sources"],
    "split": "train",
    "query_split": "test",
    "kinds": ["2x1", "2x2"],
    "validation_kinds": ["2x1", "2x2"],
    "control_kind": "3x2",
    "sizes": {
        "episodes": 3,
        "slow_episodes": 2,
        "setfit_episodes": 1,
        "validation_episodes": 2,
        "gradient_steps": [1, 2],
        "gradient_learning_rates": [1e-3],
        "lorahub_evaluations": 3,
        "ceiling_steps": 2,
        "ceiling_examples": 4,
        "chain_episodes": 2,
        "timings": 1,
    },
}


def write_smoke(folder: Path) -> Path:
    """Write data, backbone, recipe and config below a folder; the config's path."""
    names = [f"{domain} {number}" for domain in DOMAINS for number in range(CLASSES)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *DOMAINS, *FILLERS, *map(str, range(CLASSES))]
    (folder / "words" / "data").mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(["train", "test"]):
        write_words(folder / "words" / "data" / f"{split}-00000-of-00001.parquet", names, seed)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=80, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder / "backbone")
    (folder / "backbone" / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast.from_pretrained(folder / "backbone").save_pretrained(folder / "backbone")
    write_json(folder / "recipe.json", RECIPE)
    write_json(folder / "smoke.json", CONFIG)
    return folder / "smoke.json"


def write_words(path: Path, names: list[str], seed: int) -> None:
    """Rows of every class: its name among words that say nothing."""
    random, labels = np.random.default_rng(seed), np.repeat(np.arange(len(names)), ROWS).tolist()
    texts = [" ".join([names[label], *random.choice(FILLERS, size=3)]) for label in labels]
    columns = {"text": texts, "label": labels, "domain": [label // CLASSES for label in labels]}
    kinds = {"text": Value("string"), "label": ClassLabel(names=names), "domain": ClassLabel(names=DOMAINS)}
    Dataset.from_dict(columns, features=Features(kinds)).to_parquet(path)
