"""The shared start: one adapter that serves every training task, learnt with a head that needs no training."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..adapters.head import class_means, head_logits, imprint_head
from ..adapters.layout import AdapterLayout
from ..adapters.stacked import StackedLora
from ..episodes import rows_and_labels
from ..layers import EncodedExamples
from ..tasks import EpisodeSampler, Task
from .augmentation import draw_views


def initial_adapter(layout: AdapterLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    """PEFT's own initialisation of one LoRA adapter: `lora_A` uniform within 1 / sqrt(in_features), `lora_B` zero.

    Returns:
        Key -> tensor of shape `(1, *shape)`, without a head.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in layout.modules:
        bound = 1 / math.sqrt(module.in_features)
        lora_a = torch.empty(1, *module.shape("lora_A")).uniform_(-bound, bound, generator=generator)
        tensors[module.key("lora_A")] = lora_a
        tensors[module.key("lora_B")] = torch.zeros(1, *module.shape("lora_B"))
    return tensors


def free_heads(
    stacked: StackedLora,
    features: torch.Tensor | None,
    tasks: list[Task],
    class_mask: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads that need no training: imprinted from what one adapter sees of the support, or words.

    Args:
        stacked (`StackedLora`): The adapted layers; a language model's heads are the words for the classes.
        features (`torch.Tensor` of shape `(rows, feature_dim)`, *optional*): What the head reads of every example
            under the one adapter, see [`StackedLora.features_of_all`]. A language model needs none.
        tasks (`list[Task]` of length `N`): The tasks.
        class_mask (`torch.Tensor` of shape `(N, classes)`): False marks classes that are padding.
        scale (`float`): The sharpness of an imprinted head, see [`imprint_head`].

    Returns:
        The weights `(N, classes, feature_dim)` and the biases `(N, classes)`, zero for padding.
    """
    if stacked.backbone.is_causal_lm:
        return stacked.backbone.word_heads([task.classes for task in tasks])
    rows, labels = zip(*(rows_and_labels(task.support) for task in tasks))
    rows = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-1).to(features.device)
    return imprint_head(class_means(features[rows], labels, class_mask.shape[1]), scale, class_mask)


def episode_logits(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], scale: float, examples: EncodedExamples, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify a task's query by a head that needs no training, support and query both seen through one adapter.

    Returns:
        Logits `(queries, classes)` and labels `(queries,)`.
    """
    support, support_labels = rows_and_labels(task.support)
    query, query_labels = rows_and_labels(task.query)
    query_labels = query_labels.to(stacked.device)
    if stacked.backbone.is_causal_lm:
        weight, bias = (part.unsqueeze(0) for part in stacked.backbone.word_head(task.classes))
        return head_logits(stacked.features(tensors, examples[query]), weight, bias)[0], query_labels
    features = stacked.features(tensors, examples[torch.cat([support, query])])
    support_features, query_features = features.split([len(support), len(query)], dim=1)
    means = class_means(support_features, support_labels.unsqueeze(0).to(stacked.device), len(task.classes))
    return head_logits(query_features, *imprint_head(means, scale))[0], query_labels


def imprint_scale_for(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], examples: EncodedExamples, scale: float = 10.0
) -> float:
    """The sharpness of an imprinted head that features of any size need.

    Sentence encoders make features of length 1, vision transformers some of length 10, and a head's logits grow with
    its square.

    Args:
        stacked (`StackedLora`): The adapted layers.
        tensors (`dict[str, torch.Tensor]`): One adapter, key -> `(1, *shape)`.
        examples (`EncodedExamples`): A data set; some 500 of its examples are looked at.
        scale (`float`, *optional*, defaults to 10.0): What features of variance 1 would need.

    Returns:
        `scale` over the mean squared distance of the features from their mean.
    """
    rows = torch.arange(0, len(examples), max(1, len(examples) // 500))
    features = stacked.features_of_all(tensors, examples, rows)
    return scale / (features - features.mean(dim=0)).square().sum(dim=1).mean().item()


def train_shared_adapter(
    stacked: StackedLora,
    examples: EncodedExamples,
    sampler: EpisodeSampler,
    num_steps: int = 300,
    learning_rate: float = 1e-3,
    scale: float = 10.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Train one adapter on the episodes of many tasks, with the imprinted head (Snell et al. 2017) or words as head.

    Every trajectory starts here, so that all of them lie in one basis, and it is the rival that a generator has to
    beat: one adapter for everybody.

    Args:
        stacked (`StackedLora`): The adapted layers.
        examples (`EncodedExamples`): The data set that the sampler's rows point into; of several views any is taken.
        sampler (`EpisodeSampler`): The training tasks.
        num_steps (`int`, *optional*, defaults to 300): Episodes, one a step.
        learning_rate (`float`, *optional*, defaults to 1e-3): Adam's, with a linear decay to zero.
        scale (`float`, *optional*, defaults to 10.0): The first sharpness of the head for features of variance 1,
            [`imprint_scale_for`] makes it that for the backbone's; it is learnt along.
        seed (`int`, *optional*, defaults to 0): Of the initialisation.
        on_step (`Callable`, *optional*): Called with the step and its loss.

    Returns:
        The adapter, key -> `(1, *shape)`, and the sharpness of the head that it was trained with (the first one if the
        head is made of words).
    """
    start = initial_adapter(stacked.layout, seed)
    tensors = {key: value.to(stacked.device).requires_grad_() for key, value in start.items()}
    if not stacked.backbone.is_causal_lm:
        scale = imprint_scale_for(stacked, tensors, examples, scale)
    log_scale = torch.tensor(math.log(scale), device=stacked.device, requires_grad=True)
    optimizer = torch.optim.Adam([*tensors.values(), log_scale], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    random = np.random.default_rng(seed)
    for step in range(num_steps):
        task = draw_views(sampler[step], len(examples), examples.num_views, random)
        logits, labels = episode_logits(stacked, tensors, log_scale.exp(), examples, task)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return {key: value.detach() for key, value in tensors.items()}, log_scale.exp().item()
