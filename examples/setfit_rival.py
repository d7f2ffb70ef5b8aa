"""SetFit as a rival: the sentence encoder itself is fine-tuned on pairs of the shots, with a logistic head on top."""

import copy
import logging
import tempfile

import torch
from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments
from transformers import PrinterCallback


# The library's documented defaults: one epoch over the pairs in batches of 16, learning rate 2e-5 of the encoder.
DEFAULTS = {"num_epochs": 1, "batch_size": 16, "body_learning_rate": 2e-5}


class SetFitRival:
    """Trains SetFit models on support sets, each from the same encoder.

    Args:
        pretrained_model_name_or_path (`str`): The encoder, mean-pooled as sentence-transformers does.
    """

    def __init__(self, pretrained_model_name_or_path: str) -> None:
        logging.getLogger("setfit").setLevel(logging.ERROR)  # it says of every model that its head is untrained
        self.model = SetFitModel.from_pretrained(pretrained_model_name_or_path, device="cpu")

    def fit(self, support: dict[str, list[str]]) -> SetFitModel:
        """A model that answers with numbers of classes, in the order of the support set."""
        texts = [text for group in support.values() for text in group]
        labels = [label for label, group in enumerate(support.values()) for _ in group]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, report_to="none", save_strategy="no", show_progress_bar=False, **DEFAULTS
            )
            dataset = Dataset.from_dict({"text": texts, "label": labels})
            trainer = Trainer(copy.deepcopy(self.model), arguments, train_dataset=dataset)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.model

    @staticmethod
    def accuracy(model: SetFitModel, texts: list[str], labels: torch.Tensor) -> float:
        """The share of texts that a model classifies rightly."""
        return (torch.as_tensor(model.predict(texts)) == labels).float().mean().item()
