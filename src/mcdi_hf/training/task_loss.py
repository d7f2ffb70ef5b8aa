"""The task loss: what is generated, judged on query examples through the frozen backbone."""

import torch

from ..adapters.codec import AdapterCodec
from ..adapters.condition import see_support
from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_losses
from ..data.tasks import Task
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .objective import ConditionalDenoiser


class TaskLoss:
    """Cross-entropy of generated adapters on the query examples of tasks, over log(classes), all tasks in one stacked
    pass.

    The sampler is followed without gradient to one of its steps; the clean tokens that the network predicts there are
    decoded and judged under the heads that they make of their support, and the gradient goes through this last
    prediction only, as in DRaFT-1 (Clark et al., arXiv 2309.17400). So every state that the sampler visits is trained,
    and no target is needed: any task will do, not only those with a trajectory.

    The scheduler's timesteps are set to those of the sampler. `examples` are the table that the tasks' rows point into.
    """

    def __init__(
        self,
        stacked: StackedLora,
        codec: AdapterCodec,
        scheduler: LocalConsistencyScheduler,
        examples: EncodedExamples,
    ) -> None:
        self.stacked, self.codec, self.scheduler, self.examples = stacked, codec, scheduler, examples

    def __call__(
        self, model: ConditionalDenoiser, tasks: list[Task], steps: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The loss of every task, `(tasks,)`, judged after so many `steps` of the sampler. Each task draws from a
        generator of its own, whatever its neighbours are."""
        support, query = (SupportBatch.from_tasks(tasks, part, self.stacked.device) for part in ("support", "query"))
        support.examples = query.examples = self.examples
        tokens = self._predict(
            model, see_support(self.stacked, self.codec.shared_adapter(), self.codec.head, support), steps, generators
        )
        tensors = self.codec.matrices(self.codec.coefficients(tokens))
        logits = self.stacked.episode_logits(tensors, self.codec.head, support, query)
        return task_losses(logits, query.labels) / support.class_mask.sum(dim=1).log()

    def _predict(
        self, model: ConditionalDenoiser, support: SupportBatch, steps: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The clean tokens that the network predicts after some steps of the sampler."""
        sample = self._noise(generators)
        for timestep in self.scheduler.timesteps[:steps]:
            with torch.no_grad():
                output = model(sample, timestep, support)
                noise = self._noise(generators)
                sample = self.scheduler.step(output, timestep, sample, eta=1.0, variance_noise=noise).prev_sample
        timestep = self.scheduler.timesteps[steps]
        output = model(sample, timestep, support)
        return self.scheduler.step(output, timestep, sample).pred_original_sample

    def _noise(self, generators: list[torch.Generator]) -> torch.Tensor:
        shape = self.codec.filled.shape
        return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(self.stacked.device)
