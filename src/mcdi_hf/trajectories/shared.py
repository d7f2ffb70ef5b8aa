"""The shared start: one adapter that serves every training task, learnt with class means as the head."""

import math
from collections.abc import Callable

import torch

from ..adapters.head import class_means, imprint_head
from ..adapters.layout import AdapterLayout
from ..adapters.stacked import StackedLora
from ..backbones import EncodedExamples
from ..tasks import EpisodeSampler, Task


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


def rows_and_labels(examples: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten rows by class to `(n,)` rows and `(n,)` labels."""
    rows = torch.tensor([row for members in examples for row in members])
    labels = torch.tensor([label for label, members in enumerate(examples) for _ in members])
    return rows, labels


def imprinted_logits(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], scale: float, examples: EncodedExamples, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify a task's query by a head imprinted from its support, both seen through one adapter.

    Returns:
        Logits `(queries, classes)` and labels `(queries,)`.
    """
    support, support_labels = rows_and_labels(task.support)
    query, query_labels = rows_and_labels(task.query)
    features = stacked.features(tensors, examples[torch.cat([support, query])])
    support_features, query_features = features.split([len(support), len(query)], dim=1)
    means = class_means(support_features, support_labels.unsqueeze(0), len(task.classes))
    weight, bias = imprint_head(means, scale)
    head = dict(zip(stacked.layout.head_keys, (weight, bias)))
    return stacked.apply_head(head, query_features)[0], query_labels


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
    """Train one adapter on the episodes of many tasks, with the imprinted head (Snell et al. 2017).

    Every trajectory starts here, so that all of them lie in one basis, and it is the rival that a generator has to
    beat: one adapter for everybody.

    Args:
        stacked (`StackedLora`): The adapted layers.
        examples (`EncodedExamples`): The data set that the sampler's rows point into.
        sampler (`EpisodeSampler`): The training tasks.
        num_steps (`int`, *optional*, defaults to 300): Episodes, one a step.
        learning_rate (`float`, *optional*, defaults to 1e-3): Adam's, with a linear decay to zero.
        scale (`float`, *optional*, defaults to 10.0): The first sharpness of the head; it is learnt along.
        seed (`int`, *optional*, defaults to 0): Of the initialisation.
        on_step (`Callable`, *optional*): Called with the step and its loss.

    Returns:
        The adapter, key -> `(1, *shape)`, and the sharpness of the head that it was trained with.
    """
    tensors = {key: value.requires_grad_() for key, value in initial_adapter(stacked.layout, seed).items()}
    log_scale = torch.tensor(math.log(scale), requires_grad=True)
    optimizer = torch.optim.Adam([*tensors.values(), log_scale], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for step in range(num_steps):
        logits, labels = imprinted_logits(stacked, tensors, log_scale.exp(), examples, sampler[step])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return {key: value.detach() for key, value in tensors.items()}, log_scale.exp().item()
