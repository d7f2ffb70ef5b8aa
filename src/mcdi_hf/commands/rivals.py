"""A generator and what it is compared with, on the same episodes."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn

from ..adapters.head import head_logits
from ..adapters.logistic import fit_logistic
from ..backbones.frozen import FrozenBackbone
from ..data.episodes import SupportBatch, task_accuracies
from ..data.tasks import Task
from ..pipelines.loading import backbone_place
from ..pipelines.pipeline_mcdi import MCDiPipeline
from ..pipelines.refinement import train_on_support
from ..training.validation import generated_accuracies
from ..trajectories.shared import batches_of, initial_adapter


TASKS_AT_ONCE, LORA_STEPS = 8, 40
PENALTIES, LORA_RATES = (0.1, 1.0, 10.0), (1e-3, 5e-3)
Method = Callable[[list[Task]], list[float]]


class Rivals:
    """Methods that answer the queries of tasks over some inputs, each by its name: tasks -> accuracies.

    Settings that a method has, the penalty of the regression and the learning rate of gradient LoRA, are chosen on tasks
    for `tuning`, which are none of those that count.
    """

    def __init__(self, pipe: MCDiPipeline, inputs: list, num_candidates: int, seed: int) -> None:
        self.pipe, self.stacked, self.codec, self.seed = pipe, pipe.stacked, pipe.codec, seed
        self.examples = self.stacked.encode(inputs)
        self.num_candidates = num_candidates
        # A language model answers by its words, and has no features that a regression is made of.
        self.features = None if pipe.backbone.is_causal_lm else self._features(inputs)

    def methods(self, tuning: list[Task]) -> dict[str, Method]:
        """All of them, the generator last."""

        def chosen(method: Callable, settings: tuple[float, ...]) -> Method:
            return partial(method, setting=max(settings, key=lambda one: np.mean(method(tuning, one))))

        generated = partial(generated_accuracies, self.pipe, self.examples, tasks_at_once=TASKS_AT_ONCE)
        methods = {"frozen backbone": self.frozen}
        if self.features is not None:
            methods["logistic regression"] = chosen(self.logistic, PENALTIES)
        methods["gradient LoRA"] = chosen(self.gradient_lora, LORA_RATES)
        methods["shared adapter"] = partial(generated, strength=0)
        methods["generated"] = partial(generated, num_candidates=self.num_candidates)
        return methods

    def frozen(self, tasks: list[Task]) -> list[float]:
        """The backbone as it is, with the head in closed form."""
        tensors = self.codec.frozen_adapter()
        logits = partial(self.stacked.episode_logits, tensors, self.codec.head)
        return self._accuracies(tasks, logits)

    def logistic(self, tasks: list[Task], setting: float) -> list[float]:
        """Logistic regression with a penalty, on features of the frozen backbone."""

        def logits(support: SupportBatch, query: SupportBatch) -> torch.Tensor:
            head = fit_logistic(self.features[support.rows], support.labels, support.class_mask, setting)
            return head_logits(self.features[query.rows], *head, query.class_mask)

        return self._accuracies(tasks, logits)

    def gradient_lora(self, tasks: list[Task], setting: float) -> list[float]:
        """LoRA from PEFT's own start, trained on the support by 40 steps of Adam with some learning rate."""
        start = initial_adapter(self.codec.layout, self.seed)

        def logits(support: SupportBatch, query: SupportBatch) -> torch.Tensor:
            own = {key: value.to(self.stacked.device).repeat(len(support), 1, 1) for key, value in start.items()}
            own = self.codec.complete(own, support, self.stacked)
            return self.stacked.logits(train_on_support(self.stacked, own, support, LORA_STEPS, setting), query)

        return self._accuracies(tasks, logits)

    @torch.no_grad()
    def _accuracies(self, tasks: list[Task], logits: Callable) -> list[float]:
        found = []
        for support, query in self._batches(tasks):
            found += task_accuracies(logits(support, query), query.labels).tolist()
        return found

    def _batches(self, tasks: list[Task]) -> Iterator[tuple[SupportBatch, SupportBatch]]:
        for first in range(0, len(tasks), TASKS_AT_ONCE):
            yield batches_of(tasks[first : first + TASKS_AT_ONCE], self.examples, self.stacked.device)

    @torch.no_grad()
    def _features(self, inputs: list) -> torch.Tensor:
        """What the regression reads, of unit variance: of texts the mean of the last states, for which sentence encoders
        are made; else what the head reads."""
        backbone = self.pipe.backbone
        if backbone.pooling == "default" and not backbone.reads_images:
            record = self.codec.config.base_model | {"pooling": "mean"}
            mean_pooled = FrozenBackbone.of(record, backbone_place(self.pipe))
            setattr(mean_pooled.model, mean_pooled.head_name, nn.Identity())
            mean_pooled.model.to(self.stacked.device)
            parts = [inputs[first : first + 64] for first in range(0, len(inputs), 64)]
            features = torch.cat([mean_pooled.model(**mean_pooled.inputs(part)).logits for part in parts])
        else:
            features = self.stacked.features_of_all(self.codec.frozen_adapter(), self.examples)
        features = features - features.mean(dim=0)
        return features / features.square().mean().sqrt()
