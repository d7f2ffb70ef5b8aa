"""Labels and scores of examples under one adapter."""

from typing import Any

import torch
from tqdm.auto import tqdm

from .head import head_logits
from .stacked import StackedLora


AT_ONCE = 1024  # examples between the lower layers and the upper ones; more than that is a long list


@torch.no_grad()
def predict(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    labels: list[str],
    examples: list[Any],
    top_k: int | None = 1,
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """Classify texts, pairs of texts or PIL images, in the form of transformers' `pipeline("text-classification")`. With more
    than 1024 of them a progress bar is shown.

    Args:
        stacked ([`StackedLora`]): The backbone and the layout.
        tensors (`dict[str, torch.Tensor]`): One adapter, key on disk -> `shape`.
        labels (`list[str]`): Its class names, in the order of its logits.
        examples (`list`): What is to be classified; it may be empty.
        top_k (`int`, *optional*, defaults to 1): How many labels of each example to return; `None` for all of them.

    Returns:
        For each example `{"label": ..., "score": ...}`, or with another `top_k` a list of these, the likeliest first.
        Scores are probabilities.
    """
    if not isinstance(examples, list | tuple):
        raise TypeError(
            f"examples are a {type(examples).__name__}: expected a list of texts, pairs of texts or images."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: expected 1 or more, or None for all labels.")
    one = {key: value.unsqueeze(0).to(stacked.device) for key, value in tensors.items()}
    head = tuple(one[key] for key in stacked.layout.head_keys)
    if not head:
        head = tuple(part.unsqueeze(0) for part in stacked.backbone.verbalizer(tuple(labels)))
    found = []
    with tqdm(total=len(examples), unit="example", disable=len(examples) <= AT_ONCE) as bar:
        for first in range(0, len(examples), AT_ONCE):
            part = list(examples[first : first + AT_ONCE])
            features = stacked.features_of_all(one, stacked.encode(part))
            scores = head_logits(features.unsqueeze(0), *head)[0].softmax(dim=-1)
            best = scores.topk(min(top_k or len(labels), len(labels)), dim=-1)
            for values, classes in zip(best.values.tolist(), best.indices.tolist()):
                ranked = [{"label": labels[index], "score": score} for score, index in zip(values, classes)]
                found.append(ranked[0] if top_k == 1 else ranked)
            bar.update(len(part))
    return found
