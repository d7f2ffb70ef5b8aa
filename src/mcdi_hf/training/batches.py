"""Training batches: local targets of a trajectory beside support sets of its task."""

import numpy as np
import torch

from ..adapters.condition import see_support
from ..data.episodes import SupportBatch
from ..data.tasks import Task, draw_shots
from .objective import TrainingBatch
from .training_data import TrainingData


CONDITIONS_AT_ONCE = 16


class TrajectoryBatches:
    """Makes the batches of the inner loops. The optimiser of a task saw all its data; the condition shows a few shots.

    For every trajectory `num_conditions` support sets of some `ways` of its classes are drawn, once, and seen by
    [`see_support`]: what a generator sees takes a pass through the backbone and back, which the inner loops could not
    afford.
    """

    def __init__(
        self,
        data: TrainingData,
        ways: tuple[int, int],
        shots: tuple[int, int],
        num_conditions: int,
        batch_size: int,
        seed: int,
    ) -> None:
        classes, supports = data.trajectories["classes"][:], data.trajectories["support"][:]
        fewest = min(len(rows) for support in supports for rows in support)
        if fewest < shots[1]:
            raise ValueError(f"A class of the trajectories has {fewest} examples, fewer than {shots[1]} shots.")
        self.targets = data.codec.encode(data.targets.to(data.stacked.device))
        self.batch_size = batch_size
        self.conditions: list[SupportBatch] = []
        shared = data.codec.shared_adapter()
        for number, (names, support) in enumerate(zip(classes, supports)):
            random = np.random.default_rng((seed, number, 5))
            tasks = [_condition(names, support, ways, shots, random) for _ in range(num_conditions)]
            batch = SupportBatch.from_tasks(tasks, device=data.stacked.device)
            batch.examples = data.train
            parts = [
                batch[first : first + CONDITIONS_AT_ONCE] for first in range(0, num_conditions, CONDITIONS_AT_ONCE)
            ]
            seen = [see_support(data.stacked, shared, data.codec.head, part) for part in parts]
            batch.features = torch.cat([part.features for part in seen])
            batch.gradients = torch.cat([part.gradients for part in seen])
            self.conditions.append(batch)
        self.filled = data.codec.filled

    def __len__(self) -> int:
        return len(self.targets)

    def draw(self, index: int, random: np.random.Generator) -> TrainingBatch:
        """Draw some of the support sets of one trajectory."""
        conditions = self.conditions[index]
        picked = torch.from_numpy(random.integers(len(conditions), size=self.batch_size))
        targets = self.targets[index].expand(self.batch_size, -1, -1, -1)
        return TrainingBatch(targets, self.filled, conditions[picked])


def _condition(
    names: list[str],
    support: list[list[int]],
    ways: tuple[int, int],
    shots: tuple[int, int],
    random: np.random.Generator,
) -> Task:
    """Some classes of a trajectory, and as many rows of each."""
    chosen = random.permutation(len(names))[: random.integers(ways[0], min(ways[1], len(names)) + 1)]
    count = draw_shots(shots, random)
    rows = tuple(tuple(random.choice(support[one], count, replace=False).tolist()) for one in chosen)
    return Task(tuple(names[one] for one in chosen), rows, (), "")
