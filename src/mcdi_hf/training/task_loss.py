"""The task loss: what is generated, judged on query examples through the frozen backbone."""

from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from ..adapters.codec import AdapterCodec
from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_losses
from ..data.tasks import Task
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .objective import ConditionalDenoiser


class TaskLoss:
    """Cross-entropy of generated adapters on the query examples of tasks, all tasks in one stacked pass.

    The sampler is followed without gradient to one of its steps; the clean tokens that the network predicts there are
    decoded and judged, and the gradient goes through this last prediction only, as in DRaFT-1 (Clark et al., arXiv
    2309.17400). So every state that the sampler visits is trained, and no target is needed: any task will do, not only
    those with a trajectory.

    The scheduler's timesteps are set to those of the sampler. `examples` are the table that the tasks' rows point
    into, and `features` `(rows, feature_dim)` what the head reads of it under the mean adapter; `condition_noise`
    is the standard deviation of noise on the features that the generator sees.
    """

    def __init__(
        self,
        stacked: StackedLora,
        codec: AdapterCodec,
        scheduler: LocalConsistencyScheduler,
        examples: EncodedExamples,
        features: torch.Tensor,
        imprint_from: str,
        condition_noise: float = 0.0,
    ) -> None:
        self.stacked, self.codec, self.scheduler = stacked, codec, scheduler
        self.examples, self.features = examples, features
        self.imprint_from, self.condition_noise = imprint_from, condition_noise

    def __call__(
        self, model: ConditionalDenoiser, tasks: list[Task], steps: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The mean cross-entropy of every task, `(tasks,)`, judged after so many `steps` of the sampler. Each task
        draws from a generator of its own, whatever its neighbours are."""
        support = SupportBatch.from_tasks(tasks, device=self.stacked.device)
        support.features, support.examples = self.features[support.rows], self.examples
        counts = (support.labels >= 0).sum(dim=1).tolist()
        noise = self._noise([(count, support.features.shape[2]) for count in counts], generators)
        seen = replace(support, features=support.features + self.condition_noise * noise)
        tokens = self._predict(model, seen, steps, generators)
        tensors = self.codec.complete(tokens, support, self.stacked if self.imprint_from == "generated" else None)
        query = replace(SupportBatch.from_tasks(tasks, "query", self.stacked.device), examples=self.examples)
        return task_losses(self.stacked.logits(tensors, query), query.labels)

    def _predict(
        self, model: ConditionalDenoiser, support: SupportBatch, steps: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The clean tokens that the network predicts after some steps of the sampler."""
        ways = support.class_mask.sum(dim=1).tolist()
        shapes = [(self.codec.num_tokens(count), self.codec.layout.token_dim) for count in ways]
        sample = self._noise(shapes, generators)
        for timestep in self.scheduler.timesteps[:steps]:
            with torch.no_grad():
                output = model(sample, timestep, support)
                noise = self._noise(shapes, generators)
                sample = self.scheduler.step(output, timestep, sample, eta=1.0, variance_noise=noise).prev_sample
        timestep = self.scheduler.timesteps[steps]
        output = model(sample, timestep, support)
        return self.scheduler.step(output, timestep, sample).pred_original_sample

    def _noise(self, shapes: list[tuple[int, int]], generators: list[torch.Generator]) -> torch.Tensor:
        draws = [torch.randn(shape, generator=generator) for shape, generator in zip(shapes, generators)]
        return pad_sequence(draws, batch_first=True).to(self.stacked.device)
