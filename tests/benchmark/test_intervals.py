"""Intervals, paired differences and deviations over seeds, against what is known in closed form."""

import numpy as np
import pytest
from intervals import Estimate, bootstrap_interval, paired_difference, seed_deviation


def test_the_interval_covers_the_mean_of_normal_data() -> None:
    """Three groups of different levels: 95 % of the intervals hold the true mean, whatever the levels."""
    random, levels, trials = np.random.default_rng(0), np.array([0.2, 0.5, 0.95]), 1000
    data = levels[:, None] + 0.1 * random.standard_normal((trials, 3, 30))
    found = [bootstrap_interval({f"all-{i}": list(own) for i, own in enumerate(one)}) for one in data]
    held = np.mean([one.low <= levels.mean() <= one.high for one in found])
    assert held == pytest.approx(0.95, abs=0.02)  # three standard deviations of the share itself


@pytest.mark.parametrize("sizes", [(40, 40), (100, 10), (3, 3, 3)])
def test_the_interval_is_as_wide_as_the_standard_error_inside_groups_says(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    groups = {f"all-{i}": list(i + random.standard_normal(size)) for i, size in enumerate(sizes)}
    found, values = bootstrap_interval(groups), [np.array(own) for own in groups.values()]
    error = sum(len(own) * own.var(ddof=1) for own in values) ** 0.5 / sum(sizes)
    assert found.mean == pytest.approx(np.concatenate(values).mean()) and found.count == sum(sizes)
    assert found.half_width == pytest.approx(1.96 * error, rel=0.06)
    assert found.low < found.mean < found.high


def test_levels_of_groups_are_not_noise() -> None:
    apart = bootstrap_interval({"left-0": [0.2] * 5, "right-0": [0.8] * 15})
    assert apart == Estimate(pytest.approx(0.65), pytest.approx(0.65), pytest.approx(0.65), 20)


def test_the_draws_depend_on_the_seed_only() -> None:
    groups = {"all-0": list(np.random.default_rng(2).random(20))}
    assert bootstrap_interval(groups) == bootstrap_interval(groups, seed=0) != bootstrap_interval(groups, seed=1)


def test_a_constant_shift_is_never_a_tie_and_identical_lists_are() -> None:
    random = np.random.default_rng(3)
    own = {"all-0": random.random(4).tolist(), "all-1": random.random(9).tolist()}
    for shift in (1e-6, -0.001, 0.3):
        shifted = {name: [value + shift for value in values] for name, values in own.items()}
        found = paired_difference(shifted, own)
        assert found.verdict != "tie" and found.mean == pytest.approx(shift) and found.half_width < 1e-9
    assert paired_difference(own, own) == Estimate(0, 0, 0, 13) and paired_difference(own, own).verdict == "tie"


def test_pairs_are_ties_at_the_rate_that_the_level_says() -> None:
    """Two methods that are equally good on average differ in 5 % of the comparisons."""
    noise = np.random.default_rng(4).standard_normal((1000, 40)) * 0.1
    nothing = {"all-0": [0.0] * 40}
    ties = np.mean([paired_difference({"all-0": list(own)}, nothing).verdict == "tie" for own in noise])
    assert ties == pytest.approx(0.95, abs=0.02)


def test_pairs_that_cancel_are_a_tie_whatever_the_order_of_the_sum() -> None:
    values = [0.1, 0.7, 0.2, 0.9, 0.3, 0.6]
    found = paired_difference({"all-0": values}, {"all-0": values[::-1]})
    assert found.mean == 0 and found.verdict == "tie"


def test_episodes_are_paired_by_group_and_place() -> None:
    """Of the longer lists only the first count, and groups of one method only do not."""
    own = {"a-0": [0.5, 0.7, 0.0, 0.0], "b-0": [0.9, 0.8], "only-1": [0.0, 0.0]}
    other = {"b-0": [0.5, 0.4], "a-0": [0.1, 0.3], "other-1": [1.0]}
    found = paired_difference(own, other)
    assert found == Estimate(pytest.approx(0.4), pytest.approx(0.4), pytest.approx(0.4), 4)
    back = paired_difference(other, own)
    assert back.mean == pytest.approx(-0.4) and back.verdict == "below"


def test_single_episodes_of_groups_are_drawn_from_together_and_a_lone_one_says_nothing() -> None:
    single = bootstrap_interval({"a-0": [0.2], "b-0": [0.4], "c-0": [0.9]})
    assert single.half_width == pytest.approx(1.96 * np.std([0.2, 0.4, 0.9], ddof=1) / 3**0.5, rel=0.2)
    lone = paired_difference({"a-0": [0.9, 0.8]}, {"a-0": [0.1]})
    assert lone == Estimate(pytest.approx(0.8), -np.inf, np.inf, 1) and lone.verdict == "tie"


def test_the_deviation_is_over_seeds_after_their_folds_are_averaged() -> None:
    groups = {"left-out-0": [0.1, 0.3], "right-0": [0.8], "left-out-1": [0.4], "right-1": [0.4, 0.4, 0.4]}
    assert seed_deviation(groups) == pytest.approx(0.1 / 2**0.5)
    values = np.random.default_rng(5).normal(0.7, 0.05, size=5)
    assert seed_deviation({f"all-{i}": [one] for i, one in enumerate(values)}) == pytest.approx(values.std(ddof=1))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "There are no groups"),
        ({"all-0": [0.5], "all-1": []}, "The group 'all-1' has no episodes: expected one at least"),
        ({"all-0": [0.5, float("nan")]}, "Episode 1 of the group 'all-0' has nan: expected a finite value"),
        ({"all-0": [float("inf")]}, "Episode 0 of the group 'all-0' has inf"),
    ],
)
def test_values_without_a_mean_are_refused(groups: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(groups)


def test_pairs_and_seeds_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"Nothing is paired: the groups are \['a-0'\] and \['b-0'\]"):
        paired_difference({"a-0": [0.5]}, {"b-0": [0.5]})
    with pytest.raises(ValueError, match="Episode 1 of the group 'a-0' has nan"):
        paired_difference({"a-0": [0.5, 0.5]}, {"a-0": [0.5, float("nan")]})
    with pytest.raises(ValueError, match="The group 'all' names no training seed: expected FOLD-SEED"):
        seed_deviation({"all": [0.5]})
    with pytest.raises(ValueError, match=r"no deviation over the training seeds \['0'\]: expected two or more"):
        seed_deviation({"a-0": [0.5], "b-0": [0.6]})


def test_a_text_says_the_mean_in_percent_and_half_the_interval() -> None:
    found = Estimate(0.7126, 0.7, 0.74, 9)
    assert (found.text(), found.text(signed=True)) == ("71.3 ±2.0", "+71.3 ±2.0")
    assert Estimate(-0.0001, -np.inf, np.inf, 1).text(signed=True) == "+0.0 ±?"
