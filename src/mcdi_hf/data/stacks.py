"""Stacks of tasks of one shape, which fill tensors without padding."""

import numpy as np

from .crossed import CrossedSampler, identities
from .sources import Source, group_weights
from .tasks import EpisodeSampler, LabelledRows, Task, draw_shots


class StackSampler:
    """Draws stacks of tasks that have the same number of classes and of shots.

    Args:
        sampler (`EpisodeSampler`): Draws single tasks; its ways and shots are the stacks'.
        two_way_share (`float`, *optional*, defaults to 0.0): How often a stack has the least number of classes, beside
            the share that an even draw gives it: what is told by the number of classes need not be read from labels.
        crossed (`CrossedSampler`, *optional*): Draws twins, for stacks of two classes.
        crossed_share (`float`, *optional*, defaults to 0.0): The share of twins among the tasks of such a stack.
    """

    def __init__(
        self,
        sampler: EpisodeSampler,
        two_way_share: float = 0.0,
        crossed: CrossedSampler | None = None,
        crossed_share: float = 0.0,
    ) -> None:
        self.sampler, self.two_way_share = sampler, two_way_share
        self.crossed, self.crossed_share = crossed, crossed_share if crossed else 0.0
        self.most = min(sampler.ways[1], max(len(sampler.rows.groups[group]) for group in sampler.groups))

    def stack(self, number: int, count: int) -> list[Task]:
        """`count` tasks, the same whoever draws them; twins stand side by side."""
        random = np.random.default_rng((self.sampler.seed, number, 1))
        ways = self.draw_ways(random)
        shots = draw_shots(self.sampler.shots, random)
        crossed = ways == 2 and self.crossed_share > 0
        if crossed:
            shots += shots % 2  # as twins have them
        tasks: list[Task] = []
        while len(tasks) < count:
            if crossed and random.random() < self.crossed_share:
                tasks += self.crossed.twins(int(random.integers(2**62)), shots)
            else:
                tasks += [self.sampler.draw(ways, shots, random) for _ in range(2)]
        return tasks[:count]

    def draw_ways(self, random: np.random.Generator) -> int:
        """The number of classes of a stack."""
        least = self.sampler.ways[0]
        return least if random.random() < self.two_way_share else int(random.integers(least, self.most + 1))


def stack_sampler(
    rows: LabelledRows, sources: list[Source], drawn: dict, inputs: list | None, seed: int
) -> StackSampler:
    """The sampler of stacks of the rows of some sources, whose weights it keeps.

    `drawn` is what the description of trajectories calls `tasks`: `ways`, `shots`, `queries_per_class`, `two_way_share`
    and `crossed_share`. `inputs` are the rows' examples, which twins need.
    """
    shots, queries, crossed = tuple(drawn["shots"]), drawn["queries_per_class"], None
    if drawn["crossed_share"]:
        crossed = CrossedSampler(rows, identities(inputs), shots, queries, seed)
    weights = group_weights(sources, rows)
    sampler = EpisodeSampler(rows, tuple(drawn["ways"]), shots, queries, seed, weights=weights)
    return StackSampler(sampler, drawn["two_way_share"], crossed, drawn["crossed_share"])
