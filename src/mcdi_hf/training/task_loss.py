"""The task loss: what is generated, judged on query examples through the frozen backbone."""

import torch
from torch.nn.utils.rnn import pad_sequence

from ..adapters.codec import AdapterCodec
from ..adapters.completion import complete_adapters
from ..adapters.stacked import StackedLora
from ..episodes import Episodes
from ..layers import EncodedExamples
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from ..tasks import Task
from .objective import Condition, ConditionalDenoiser


class TaskLoss:
    """Cross-entropy of generated adapters on the query examples of tasks, all tasks in one stacked pass.

    The sampler is followed without gradient to one of its steps; the clean tokens that the network predicts there are
    decoded and judged, and the gradient goes through this last prediction only, as in DRaFT-1 (Clark et al., arXiv
    2309.17400). So every state that the sampler visits is trained, and no target is needed: any task will do, not only
    those with a trajectory.

    Args:
        stacked (`StackedLora`): The frozen backbone.
        codec (`AdapterCodec`): The fitted codec.
        scheduler (`LocalConsistencyScheduler`): With its timesteps set to those of the sampler.
        examples (`EncodedExamples`): The data set that the tasks' rows point into.
        features (`torch.Tensor` of shape `(rows, feature_dim)`): What the head reads of it under the mean adapter.
        imprint_from (`str`): As in [`MCDiPipeline`].
        condition_noise (`float`, *optional*, defaults to 0.0): Standard deviation of the noise on the features that
            the generator sees.
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
        """The mean cross-entropy of every task: `(tasks,)`.

        Args:
            model (`ConditionalDenoiser`): The network.
            tasks (`list[Task]`): The tasks.
            steps (`int`): How many steps of the sampler come before the prediction that is judged.
            generators (`list[torch.Generator]`): One a task, so that its draws do not depend on its neighbours.
        """
        episodes = Episodes.of(tasks, self.stacked.device)
        features = self.features[episodes.support]
        noise = self._noise(
            [(int(count), features.shape[2]) for count in (episodes.labels >= 0).sum(dim=1)], generators
        )
        condition = Condition(features + self.condition_noise * noise, episodes.labels, episodes.class_mask)
        tokens = self._predict(model, condition, steps, generators)
        tensors = complete_adapters(
            self.codec,
            tokens,
            features,
            episodes.labels,
            episodes.class_mask,
            self.stacked if self.imprint_from == "generated" else None,
            self.examples,
            episodes.support,
        )
        words = self.stacked.word_heads([task.classes for task in tasks])
        logits = self.stacked.logits(tensors, self.examples[episodes.query.flatten()], episodes.class_mask, words)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), episodes.query_labels, ignore_index=-1, reduction="none"
        )
        return losses.sum(dim=1) / (episodes.query_labels >= 0).sum(dim=1)

    def _predict(
        self, model: ConditionalDenoiser, condition: Condition, steps: int, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The clean tokens that the network predicts after some steps of the sampler."""
        ways = condition.class_mask.sum(dim=1).tolist()
        shapes = [(self.codec.num_tokens(count), self.codec.layout.token_dim) for count in ways]
        sample = self._noise(shapes, generators)
        for timestep in self.scheduler.timesteps[:steps]:
            with torch.no_grad():
                output = model(sample, timestep, condition)
                noise = self._noise(shapes, generators)
                sample = self.scheduler.step(output, timestep, sample, eta=1.0, variance_noise=noise).prev_sample
        timestep = self.scheduler.timesteps[steps]
        output = model(sample, timestep, condition)
        return self.scheduler.step(output, timestep, sample).pred_original_sample

    def _noise(self, shapes: list[tuple[int, int]], generators: list[torch.Generator]) -> torch.Tensor:
        draws = [torch.randn(shape, generator=generator) for shape, generator in zip(shapes, generators)]
        return pad_sequence(draws, batch_first=True).to(self.stacked.device)
