"""Training batches: local targets of a trajectory beside support sets drawn anew for every row."""

import numpy as np
import torch
from datasets import Dataset

from ..adapters.codec import AdapterCodec
from ..adapters.head import class_means, imprint_head
from ..data.episodes import SupportBatch
from ..data.tasks import draw_shots
from ..trajectories.dataset import final_adapters, split_weights
from .objective import TrainingBatch


class TrajectoryBatches:
    """Makes the batches of the inner loops. The optimiser of a task saw all its data; the condition shows a few shots.

    Args:
        trajectories (`datasets.Dataset`): A trajectory data set in numpy format.
        features (`torch.Tensor` of shape `(rows, feature_dim)`): What the head reads under the mean adapter, for the
            source data set that `support` points into.
        codec (`AdapterCodec`): The fitted codec.
        shots (`tuple[int, int]`): The least and the greatest number of support examples a class, see [`draw_shots`].
        batch_size (`int`): Rows of a batch.
        condition_noise (`float`, *optional*, defaults to 0.0): Standard deviation of the noise on the features that the
            generator sees, in units of their own spread. A few dozen training classes are soon learnt by heart; noise
            on the input is Tikhonov's remedy (Bishop 1995).
    """

    def __init__(
        self,
        trajectories: Dataset,
        features: torch.Tensor,
        codec: AdapterCodec,
        shots: tuple[int, int],
        batch_size: int,
        condition_noise: float = 0.0,
    ) -> None:
        fewest = min(len(rows) for support in trajectories["support"][:] for rows in support)
        if fewest < shots[1]:
            raise ValueError(f"A class of the trajectories has {fewest} examples, fewer than {shots[1]} shots.")
        self.trajectories, self.features, self.codec = trajectories, features, codec
        self.shots, self.batch_size = shots, batch_size
        self.noise = condition_noise * (features - features.mean(dim=0)).square().mean().sqrt().item()

    def __len__(self) -> int:
        return len(self.trajectories)

    def draw(self, index: int, random: np.random.Generator) -> TrainingBatch:
        """Draw the support sets for one trajectory.

        Args:
            index (`int`): The trajectory.
            random (`np.random.Generator`): Draws numbers of shots, and the shots.
        """
        row = self.trajectories[index]
        ways = len(row["classes"])
        support = SupportBatch.from_rows([self._support(row["support"], random) for _ in range(self.batch_size)])
        support.features = self.features[support.rows]
        local_targets = torch.from_numpy(np.asarray(row["weights"][1:]))  # the first row is the start
        tensors = split_weights(local_targets, ways, self.codec.layout)
        count = len(local_targets)
        if self.codec.layout.head_keys:
            # Every target meets every row's own imprinted head: (rows, targets) flattened, encoded, unflattened.
            means = class_means(support.features, support.labels, ways)
            head = imprint_head(means, self.codec.config.imprint_scale, support.class_mask)
            repeated = {key: value.repeat(self.batch_size, *[1] * (value.ndim - 1)) for key, value in tensors.items()}
            heads = tuple(values.repeat_interleave(count, dim=0) for values in head)
            targets = self.codec.encode(repeated, heads).unflatten(0, (self.batch_size, count))
        else:
            targets = self.codec.encode(tensors).expand(self.batch_size, -1, -1, -1)
        noise = torch.from_numpy(random.standard_normal(support.features.shape, dtype=np.float32))
        support.features = support.features + self.noise * noise
        return TrainingBatch(targets, self.codec.token_mask(support.class_mask), support)

    def fit_head(self, random: np.random.Generator) -> None:
        """Fit the codec's scales of the head, each task with a drawn support set. Without a head there is none."""
        if not self.codec.layout.head_keys:
            return
        heads = []
        for members in self.trajectories["support"][:]:
            support = SupportBatch.from_rows([self._support(members, random)])
            means = class_means(self.features[support.rows], support.labels, len(members))
            heads.append(imprint_head(means, self.codec.config.imprint_scale))
        self.codec.fit_head(final_adapters(self.trajectories, self.codec.layout), heads)

    def _support(self, members: list, random: np.random.Generator) -> list[list[int]]:
        """The rows of a few shots of every class."""
        shots = draw_shots(self.shots, random)
        return [random.choice(rows, size=shots, replace=False).tolist() for rows in members]
