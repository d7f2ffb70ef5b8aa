"""What accuracies of episodes say: the one interval of tables and pictures, paired differences, the spread over seeds.

Episodes come in groups, one for each generator that was trained: the group's name is `"FOLD-SEED"`, the fold being
what was left out of training. A group's values are in the order of its episodes.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


LEVEL = 0.95
RESAMPLES = 4000
DIGITS = 12  # of a mean: sums of the same numbers in another order differ behind them
Groups = dict[str, list[float]]


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and its interval.

    Attributes:
        mean (`float`): Over all episodes of all groups.
        low, high (`float`): The ends of the interval; infinite if a single episode says nothing about the spread.
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
    def verdict(self) -> str:
        """Of a difference: `"above"`, `"below"`, or `"tie"` if its interval includes zero."""
        if self.low <= 0 <= self.high:
            return "tie"
        return "above" if self.mean > 0 else "below"

    def text(self, signed: bool = False, digits: int = 1) -> str:
        """The mean in percent and half the width of the interval, which is `?` after a single episode."""
        half = "?" if math.isinf(self.half_width) else f"{100 * self.half_width:.{digits}f}"
        mean = round(100 * self.mean, digits) + 0.0  # no minus before a zero
        return f"{mean:{'+' if signed else ''}.{digits}f} ±{half}"


def bootstrap_interval(groups: Groups, seed: int = 0) -> Estimate:
    """The mean over episodes and its 95 % percentile bootstrap interval, stratified by group.

    Episodes are drawn anew inside each group, never across: groups are the few generators that were trained, and how
    far their levels lie apart is no noise of the mean. So the interval is about new episodes for these generators;
    what another training would change is [`seed_deviation`]'s to say.

    A group of `n` drawn with replacement spreads by `(n - 1) / n` too little; its drawn means are moved away from its
    mean to make up for that (the rescaled bootstrap of survey statistics). Where a group has one episode only, all
    groups are drawn from together, which errs towards wide.

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


def mean_estimate(estimates: list[Estimate]) -> Estimate:
    """The mean of estimates of independent episodes, each as heavy as the others, and its interval: half widths add up as
    standard errors do.

    Raises:
        `ValueError`: when there are none.
    """
    if not estimates:
        raise ValueError("There are no estimates: expected one at least.")
    mean = round(float(np.mean([one.mean for one in estimates])), DIGITS)
    half = math.hypot(*(one.half_width for one in estimates)) / len(estimates)
    return Estimate(mean, mean - half, mean + half, sum(one.count for one in estimates))


def paired_difference(own: Groups, other: Groups, seed: int = 0) -> Estimate:
    """One method minus another on the episodes that both have, paired by group and place in the list.

    Raises:
        `ValueError`: when no group is in both, besides the reasons of [`bootstrap_interval`].
    """
    pairs = {name: list(zip(own[name], other[name])) for name in own if name in other}
    if not pairs:
        raise ValueError(f"Nothing is paired: the groups are {sorted(own)} and {sorted(other)}, expected one in both.")
    return bootstrap_interval({name: [left - right for left, right in both] for name, both in pairs.items()}, seed)


def seed_deviation(groups: Groups) -> float:
    """The standard deviation over training seeds, each the mean over its folds; noise of episodes is part of it.

    Raises:
        `ValueError`: when a group's name has no seed or there are less than two, besides the reasons of
            [`bootstrap_interval`].
    """
    folds = defaultdict(list)
    for name, values in groups.items():
        _, dash, seed = name.rpartition("-")
        if not dash or not seed:
            raise ValueError(f"The group {name!r} names no training seed: expected FOLD-SEED, such as 'all-0'.")
        folds[seed].append(_finite(name, values).mean())
    if len(folds) < 2:
        raise ValueError(f"There is no deviation over the training seeds {sorted(folds)}: expected two or more.")
    return round(float(np.std([np.mean(means) for means in folds.values()], ddof=1)), DIGITS)


def _finite(name: str, values: list[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError(f"The group {name!r} has no episodes: expected one at least.")
    if not np.isfinite(array).all():
        wrong = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"Episode {wrong} of the group {name!r} has {array[wrong]}: expected a finite value.")
    return array


@lru_cache(maxsize=64)  # a report asks for hundreds of intervals over lists of a few lengths
def _draws(count: int, place: int, seed: int) -> np.ndarray:
    """How often each of `count` episodes of the stratum at this place is drawn: `(resamples, count)`."""
    random = np.random.default_rng([seed, place, count])
    return random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
