"""What accuracies of episodes say: intervals, paired differences of two ways, and the spread over training seeds.

Episodes come in groups, one for each generator that was trained: the group's name is `"FOLD-SEED"`, the fold being what
was left out of training. A group's values are in the order of its episodes.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


LEVEL = 0.95
RESAMPLES = 4000
DIGITS = 12  # of a mean: sums of the same numbers in another order differ behind them


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and its interval.

    Attributes:
        mean (`float`): Over all episodes of all groups.
        low (`float`): Where the interval begins; minus infinity if a single episode says nothing about the spread.
        high (`float`): Where it ends.
        count (`int`): How many episodes there were.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def is_tie(self) -> bool:
        """Of a difference: whether its interval includes zero."""
        return self.low <= 0 <= self.high


def bootstrap_interval(groups: dict[str, list[float]], seed: int = 0) -> Estimate:
    """The mean over episodes and its 95 % percentile bootstrap interval, stratified by group.

    Episodes are drawn anew inside each group, never across. Groups are the few generators that were trained, not a sample
    of episodes: how many episodes each has is fixed, and how far their levels lie apart (another fold is another problem)
    is not noise of the mean. So the interval is about new episodes for these generators. What another training would
    change is [`seed_deviation`]'s to say.

    A group of `n` drawn with replacement spreads by `(n - 1) / n` too little, which matters for ways that are judged on
    few episodes; its drawn means are moved away from its mean to make up for that (the rescaled bootstrap of survey
    statistics). Where a group has one episode only, all groups are drawn from together, which errs towards wide.
    Intervals of very few episodes are still somewhat narrow, as those of any bootstrap.

    Args:
        groups (`dict[str, list[float]]`): Group -> a value an episode.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        `ValueError`: when there are no groups, a group has no episodes, or a value is not finite.
    """
    strata = [_finite(name, values) for name, values in groups.items()]
    if not strata:
        raise ValueError("There are no groups: expected the values of one at least.")
    every = np.concatenate(strata)
    mean = round(float(every.mean()), DIGITS)
    if len(every) == 1:
        return Estimate(mean, -np.inf, np.inf, 1)
    if min(map(len, strata)) == 1:
        strata = [every]
    total = np.zeros(RESAMPLES)
    for place, values in enumerate(strata):
        count, own = len(values), values.mean()
        drawn = _draws(count, place, seed) @ (values - own)  # sums of deviations from the group's mean
        total += count * own + (count / (count - 1)) ** 0.5 * drawn
    # Rounded, so that what is zero but for the order of a sum is zero.
    low, high = np.quantile((total / len(every)).round(DIGITS), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, round(float(low), DIGITS), round(float(high), DIGITS), len(every))


def paired_difference(own: dict[str, list[float]], other: dict[str, list[float]], seed: int = 0) -> Estimate:
    """One way minus another on the episodes that both have, with its interval ([`bootstrap_interval`]).

    Args:
        own (`dict[str, list[float]]`): Group -> a value an episode.
        other (`dict[str, list[float]]`): The same of the other way. Episodes are paired by group and place in the list,
            so the shorter list of two says how many pairs its group has.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Raises:
        `ValueError`: when no group is in both, a group has no episodes, or a value is not finite.
    """
    pairs = {name: list(zip(own[name], other[name])) for name in own if name in other}
    if not pairs:
        raise ValueError(
            f"Nothing is paired: one way has the groups {sorted(own)}, the other {sorted(other)}; expected one in both."
        )
    return bootstrap_interval({name: [left - right for left, right in both] for name, both in pairs.items()}, seed)


def seed_means(groups: dict[str, list[float]]) -> dict[str, float]:
    """Training seed -> mean of its groups' means; the seed is what follows the last `-` of a group's name.

    Args:
        groups (`dict[str, list[float]]`): `"FOLD-SEED"` -> a value an episode.

    Raises:
        `ValueError`: when a name has no seed, a group has no episodes, or a value is not finite.
    """
    folds = defaultdict(list)
    for name, values in groups.items():
        _, dash, seed = name.rpartition("-")
        if not dash or not seed:
            raise ValueError(f"The group {name!r} names no training seed: expected FOLD-SEED, such as 'all-0'.")
        folds[seed].append(_finite(name, values).mean())
    return {seed: float(np.mean(means)) for seed, means in folds.items()}


def seed_deviation(groups: dict[str, list[float]]) -> float:
    """The standard deviation over training seeds, each seed being the mean of its folds ([`seed_means`]).

    Every seed has episodes of its own, so their noise is part of it.

    Args:
        groups (`dict[str, list[float]]`): `"FOLD-SEED"` -> a value an episode.

    Raises:
        `ValueError`: when there are less than two seeds, besides the reasons of [`seed_means`].
    """
    means = seed_means(groups)
    if len(means) < 2:
        raise ValueError(f"There is no deviation over the training seeds {sorted(means)}: expected two seeds or more.")
    return round(float(np.std(list(means.values()), ddof=1)), DIGITS)


def _finite(name: str, values: list[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError(f"The group {name!r} has no episodes: expected one at least.")
    if not np.isfinite(array).all():
        wrong = int(np.argmin(np.isfinite(array)))
        raise ValueError(
            f"The value of episode {wrong} of the group {name!r} is {array[wrong]}: expected a finite one."
        )
    return array


@lru_cache(maxsize=64)  # a table asks for hundreds of intervals over lists of a few lengths
def _draws(count: int, place: int, seed: int) -> np.ndarray:
    """How often each of `count` episodes of the stratum at this place is drawn: `(resamples, count)`."""
    random = np.random.default_rng([seed, place, count])
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
