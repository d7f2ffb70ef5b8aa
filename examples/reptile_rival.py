"""The rival REPTILE: a start for the adapter itself, from which a few gradient steps on a task's shots go far."""

from dataclasses import dataclass
from pathlib import Path

import torch
from data import write_whole
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from mcdi_hf import EpisodeSampler, StackedLora, Task, TrajectorySettings, collect_trajectories
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


TASKS_PER_STEP, INNER_STEPS, BATCH_SIZE = 4, 5, 20


@dataclass
class AdapterReptile:
    """REPTILE on the adapter itself (Nichol et al. 2018).

    Heads are imprinted under the start, or made of words, while it is learnt and for test tasks.

    Attributes:
        stacked (`StackedLora`): The backbone.
        start (`dict[str, torch.Tensor]`): The start, key -> `(1, *shape)`.
        scale (`float`): The sharpness of the imprinted heads, see [`imprint_head`].
        seed (`int`): Of everything that is drawn.
    """

    stacked: StackedLora
    start: dict[str, torch.Tensor]
    scale: float
    seed: int

    @classmethod
    def train(
        cls,
        stacked: StackedLora,
        examples: EncodedExamples,
        sampler: EpisodeSampler,
        steps: int,
        seed: int,
        scale: float,
    ) -> "AdapterReptile":
        """Learn the start: four tasks a step, five steps of Adam on the support of each, and towards their mean end.

        Args:
            stacked (`StackedLora`): The backbone.
            examples (`EncodedExamples`): The data set that the sampler's rows point into.
            sampler (`EpisodeSampler`): The training tasks; their queries are not looked at.
            steps (`int`): Steps towards the ends, each shorter than the last.
            seed (`int`): Of the first start and of the batches.
            scale (`float`): As in the class.
        """
        reptile = cls(stacked, initial_adapter(stacked.layout, seed), scale, seed)
        for step in tqdm(range(steps), desc=f"REPTILE, seed {seed}"):
            tasks = [sampler[TASKS_PER_STEP * step + number] for number in range(TASKS_PER_STEP)]
            used = sorted({row for task in tasks for rows in task.support for row in rows})
            features = torch.zeros(len(examples), stacked.layout.feature_dim, device=stacked.device)
            features[used] = stacked.features_of_all(reptile.start, examples, torch.tensor(used))
            ends = [
                split_weights(torch.from_numpy(row["weights"][-1:]), len(row["classes"]), stacked.layout)
                for row in reptile._adapted(examples, features, tasks, INNER_STEPS)
            ]
            zeta = 1 - step / steps
            for key, value in reptile.start.items():
                mean = torch.cat([end[key] for end in ends]).mean(dim=0, keepdim=True)
                reptile.start[key] = value + zeta * (mean - value)
        return reptile

    @classmethod
    def load(cls, stacked: StackedLora, path: Path) -> "AdapterReptile":
        """Read what [`AdapterReptile.save`] wrote."""
        start = load_file(path)
        scale, seed = start.pop("scale").item(), start.pop("seed").item()
        found = {key: tuple(value.shape[1:]) for key, value in start.items()}
        if found != stacked.layout.lora_shapes:
            raise ValueError(
                f"{path} has a start for other adapters: its matrices are {found}, expected {stacked.layout.lora_shapes}."
            )
        return cls(stacked, start, scale, seed)

    def save(self, path: Path) -> None:
        """Write the start, its scale and its seed to a safetensors file."""
        settings = {"scale": torch.tensor(self.scale, dtype=torch.float64), "seed": torch.tensor(self.seed)}
        write_whole(path, lambda part: save_file(self.start | settings, part))

    def features(self, examples: EncodedExamples) -> torch.Tensor:
        """What the head reads of every example under the start, once for all tasks: `(rows, feature_dim)`."""
        start = {key: value.to(self.stacked.device) for key, value in self.start.items()}
        return self.stacked.features_of_all(start, examples)

    def accuracies(
        self,
        examples: EncodedExamples,
        features: torch.Tensor,
        tasks: list[Task],
        num_steps: int,
        tasks_at_once: int = 16,
    ) -> list[float]:
        """The share of right answers on each task's query, after some steps of Adam on its shots.

        Args:
            examples (`EncodedExamples`): The data set that the tasks' rows point into.
            features (`torch.Tensor` of shape `(rows, feature_dim)`): [`AdapterReptile.features`] of it.
            tasks (`list[Task]`): The tasks.
            num_steps (`int`): Adam's steps, with a linear decay of the learning rate to zero.
            tasks_at_once (`int`, *optional*, defaults to 16): Tasks of a stack.
        """
        found = []
        for first in range(0, len(tasks), tasks_at_once):
            rows = self._adapted(examples, features, tasks[first : first + tasks_at_once], num_steps)
            found += [row["accuracy"] for row in rows]
        return found

    def _adapted(
        self, examples: EncodedExamples, features: torch.Tensor, tasks: list[Task], num_steps: int
    ) -> list[dict]:
        """Some steps of Adam on the support of each task, from the start."""
        settings = TrajectorySettings(
            num_steps=num_steps, num_targets=1, batch_size=BATCH_SIZE, imprint_scale=self.scale, seed=self.seed
        )
        numbers = list(range(len(tasks)))
        return collect_trajectories(self.stacked, examples, self.start, features, tasks, numbers, settings)
