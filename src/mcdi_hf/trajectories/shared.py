"""The shared start: one adapter that serves every training task, learnt with a head that needs no training."""

import math
from collections.abc import Callable

import numpy as np
import torch

from ..adapters.head import head_logits
from ..adapters.layout import AdapterLayout
from ..adapters.stacked import StackedLora
from ..data.augmentation import draw_views
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_losses
from ..data.tasks import EpisodeSampler, Task


def initial_adapter(layout: AdapterLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    """PEFT's own initialisation of one LoRA adapter: `lora_A` uniform within 1 / sqrt(in_features), `lora_B` zero.

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


def episode_logits(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], scale: float, examples: EncodedExamples, task: Task
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify a task's query by a head that needs no training, support and query both seen through one adapter: logits
    `(1, queries, classes)` and labels `(1, queries)`."""
    support, query = (SupportBatch.from_tasks([task], part, stacked.device) for part in ("support", "query"))
    if stacked.backbone.is_causal_lm:
        features = stacked.features(tensors, examples[query.rows[0]])
    else:
        features = stacked.features(tensors, examples[torch.cat([support.rows, query.rows], dim=1)[0]])
        support.features, features = features.split([support.rows.shape[1], query.rows.shape[1]], dim=1)
    return head_logits(features, *stacked.free_heads(support, scale)), query.labels


def imprint_scale_for(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], examples: EncodedExamples, scale: float = 10.0
) -> float:
    """The sharpness of an imprinted head that features of any size need: `scale` over their variance.

    Sentence encoders make features of length 1, vision transformers some of length 10, and a head's logits grow with
    its square. Some 500 of the examples are looked at, through one adapter, key -> `(1, *shape)`.
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
    """Train one adapter on the episodes of many tasks, with the imprinted head (Snell et al. 2017) or a verbalizer.

    Every trajectory starts here, so that all of them lie in one basis, and it is the baseline that a generator has to
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
        The adapter, key -> `(1, *shape)`, and the sharpness of the head that it was trained with (the first one with a
        verbalizer).
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
        loss = task_losses(logits, labels).squeeze()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    return {key: value.detach() for key, value in tensors.items()}, log_scale.exp().item()
