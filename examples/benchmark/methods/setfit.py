"""SetFit: the sentence encoder itself is fine-tuned on pairs of the shots, with a logistic head on top."""

import copy
import logging
import tempfile
from typing import Any

import torch
from datasets import Dataset
from fold import Fold
from setfit import SetFitModel, Trainer, TrainingArguments
from splits import Sizes, Split
from transformers import PrinterCallback

from mcdi_hf import Task

from .base import Method


# The library's documented defaults: one epoch over the pairs in batches of 16, learning rate 2e-5 of the encoder.
DEFAULTS = {"num_epochs": 1, "batch_size": 16, "body_learning_rate": 2e-5}


class SetFit(Method):
    """Reads texts through encoders only, and not many of them, as it is slow; a pair of texts is one behind the other."""

    reads_encoded = False

    def fits(self, fold: Fold, seed: int) -> bool:
        of_texts = not fold.backbone.reads_images and not fold.backbone.is_causal_lm
        return of_texts and fold.sizes.setfit_episodes > 0

    def episodes(self, sizes: Sizes, task: Task) -> int:
        few = sum(map(len, task.support)) <= sizes.setfit_examples
        return min(sizes.setfit_episodes, sizes.episodes) if few else 0

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        model = fold.once("SetFit", lambda: _load(fold.backbone_folder))
        found = []
        for task in tasks:
            (texts, labels), (queries, answers) = _examples(split, task.support), _examples(split, task.query)
            predicted = fit(model, texts, labels, seed).predict(queries)
            found.append((torch.as_tensor(predicted) == torch.tensor(answers)).float().mean().item())
        return found


def _load(folder: str) -> SetFitModel:
    logging.getLogger("setfit").setLevel(logging.ERROR)  # it says of every model that its head is untrained
    return SetFitModel.from_pretrained(folder, device="cpu")


def _examples(split: Split, classes: tuple[tuple[int, ...], ...]) -> tuple[list[str], list[int]]:
    inputs = split.inputs([row for rows in classes for row in rows])
    texts = [one if isinstance(one, str) else " ".join(one) for one in inputs]
    return texts, [label for label, rows in enumerate(classes) for _ in rows]


def fit(model: SetFitModel, texts: list[str], labels: list[int], seed: int) -> SetFitModel:
    """A copy of the model, trained: it answers with numbers of classes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, report_to="none", save_strategy="no", show_progress_bar=False, seed=seed, **DEFAULTS
        )
        dataset = Dataset.from_dict({"text": texts, "label": labels})
        trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model
