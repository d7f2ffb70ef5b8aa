"""One table of the benchmark in Markdown: accuracies, differences, deviations, and what else was measured."""

import math
from collections import defaultdict
from collections.abc import Callable

from benchmark_ways import CEILING, CONTROLS, FROZEN, GENERATED, MC_DI, REPTILE, RIVALS, SHARED, WAYS
from markdown_tables import duration, markdown_table

from mcdi_hf.evaluation.statistics import Estimate, bootstrap_interval, paired_difference, seed_deviation, seed_means


GROUPS = {"rivals": RIVALS, "ceiling": [CEILING], "generated": GENERATED, "controls": CONTROLS}
MISSING = "-"
NEW, BETWEEN = "generated to nearest training adapter", "training adapter to nearest other"
NOISED_COPY, OVERLAP = "noised nearest to nearest training adapter", "overlap of errors with the nearest"
MEMORISATION = [NEW, BETWEEN, NOISED_COPY, OVERLAP]


def kind_text(kind: str) -> str:
    """A kind as a heading says it: `sentiment:2x5` may be broken behind its group."""
    return kind.replace(":", " ")


def half_text(estimate: Estimate) -> str:
    return "±?" if math.isinf(estimate.half_width) else f"±{100 * estimate.half_width:.1f}"


def percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} {half_text(estimate)}"


def points(estimate: Estimate) -> str:
    """A difference in points, called a tie if its interval includes zero."""
    rounded = round(100 * estimate.mean, 1) + 0.0  # no minus before a zero
    return f"{'tie ' if estimate.is_tie else ''}{rounded:+.1f} {half_text(estimate)}"


def verdict(estimate: Estimate) -> str:
    """Above, below or a tie."""
    if estimate.is_tie:
        return "tie"
    return "above" if estimate.mean > 0 else "below"


def difference(table: dict, way: str, other: str, kind: str) -> Estimate | None:
    """One way minus another, on the episodes of a kind that both have; nothing if there are none."""
    own, rival = (table["accuracy"].get(name, {}).get(kind, {}) for name in (way, other))
    return paired_difference(own, rival) if set(own) & set(rival) else None


def best_rival(table: dict, kind: str) -> str:
    """The rival that is highest beside Mc-Di on the episodes that both have.

    Among rivals that saw all episodes it is the one with the highest mean. The mean of one that saw only the first of them
    cannot be held against the others': those may have been the easier ones.
    """
    found = {way: difference(table, MC_DI, way, kind) for way in RIVALS}
    return min((way for way in RIVALS if found[way] is not None), key=lambda way: found[way].mean)


def way_text(way: str) -> str:
    return f"**{way}**" if way == MC_DI else way


def group_row(group: str, width: int) -> list[str]:
    return [f"*{group}*", *[""] * (width - 1)]


def grouped_rows(cells: Callable[[str], list[str]], leave_out: str | None = None) -> list[list[str]]:
    """A row a way, each group of ways under its name."""
    rows = []
    for group, ways in GROUPS.items():
        own = [[way_text(way), *cells(way)] for way in ways if way != leave_out]
        rows += [group_row(group, len(own[0])), *own]
    return rows


def accuracy_table(table: dict) -> str:
    """Mean accuracy of every way and kind, how many episodes it is of where Mc-Di has more, and its time to an adapter."""
    every = {kind: sum(map(len, groups.values())) for kind, groups in table["accuracy"][MC_DI].items()}

    def cell(groups: dict[str, list[float]], kind: str) -> str:
        found = bootstrap_interval(groups)
        return f"{percent(found)} ({found.count})" if found.count < every[kind] else percent(found)

    def cells(way: str) -> list[str]:
        kinds, seconds = table["accuracy"].get(way, {}), table["seconds"].get(way)
        found = [cell(kinds[kind], kind) if kind in kinds else MISSING for kind in table["kinds"]]
        return [*found, MISSING if seconds is None else duration(seconds)]

    header = ["accuracy, %", *map(kind_text, table["kinds"]), "time"]
    return markdown_table(header, grouped_rows(cells))


def difference_table(table: dict) -> str:
    """Mc-Di minus every other way."""

    def cells(way: str) -> list[str]:
        found = [difference(table, MC_DI, way, kind) for kind in table["kinds"]]
        return [MISSING if one is None else points(one) for one in found]

    return markdown_table([f"{MC_DI} minus", *map(kind_text, table["kinds"])], grouped_rows(cells, leave_out=MC_DI))


def rival_table(table: dict) -> str:
    """For each kind its best rival, and every generated way minus that."""
    rows = []
    for kind in table["kinds"]:
        rival = best_rival(table, kind)
        found = [difference(table, way, rival, kind) for way in GENERATED]
        cells = [MISSING if one is None else _with_verdict(one) for one in found]
        rows.append([kind_text(kind), rival, percent(bootstrap_interval(table["accuracy"][rival][kind])), *cells])
    return markdown_table(["kind", "best rival", "its accuracy, %", *GENERATED], rows)


def _with_verdict(estimate: Estimate) -> str:
    return points(estimate) if estimate.is_tie else f"{verdict(estimate)} {points(estimate)}"


def deviation_section(table: dict) -> str:
    """The standard deviation over training seeds of what is trained anew for each, or that there is none."""
    rows, seeds = [], {seed for groups in table["accuracy"][MC_DI].values() for seed in seed_means(groups)}
    if len(seeds) < 2:
        return f"There is one training seed ({', '.join(seeds)}), so no deviation over seeds."
    for way in (FROZEN, SHARED, REPTILE, *GENERATED):
        kinds = table["accuracy"].get(way, {})
        several = [kind in kinds and len(seed_means(kinds[kind])) > 1 for kind in table["kinds"]]
        cells = [
            f"{100 * seed_deviation(kinds[kind]):.1f}" if known else MISSING
            for kind, known in zip(table["kinds"], several)
        ]
        rows.append([way, *cells])
    folds = defaultdict(set)
    for name in {name for groups in table["accuracy"][MC_DI].values() for name in groups}:
        fold, _, seed = name.rpartition("-")
        folds[seed].add(fold)
    text = (
        f"Standard deviation over {len(seeds)} training seeds, points. Each seed has test episodes of its own: the row "
        f"of {FROZEN}, which no seed trains, shows how much of it is theirs."
    )
    if len(set(map(frozenset, folds.values()))) > 1:
        text += " Seeds left out different folds, so how the folds differ is part of it, too."
    return f"{text}\n\n{markdown_table(['over seeds', *map(kind_text, table['kinds'])], rows)}"


def _range_text(numbers: list[int]) -> str:
    return f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def episodes_text(table: dict) -> str:
    """How many test episodes a kind has, and which ways saw the first of them only."""
    counts = {
        way: [sum(map(len, kinds[kind].values())) for kind in table["kinds"] if kind in kinds]
        for way, kinds in table["accuracy"].items()
    }
    groups = _range_text([len(groups) for groups in table["accuracy"][MC_DI].values()])
    text = f"Test episodes of a kind: {_range_text(counts[MC_DI])} (trained generators: {groups})"
    fewer = defaultdict(list)
    for way in WAYS:
        if way in counts and counts[way] != counts[MC_DI]:
            fewer[_range_text(counts[way])].append(way)
    parts = [f"{many} for {', '.join(ways)}" for many, ways in fewer.items()]
    return f"{text}; fewer of the same: {'; '.join(parts)}." if parts else f"{text}."


def choices_section(table: dict) -> str:
    """What validation chose, folded away."""
    rows = [[name, choice] for name, choice in table["choices"].items()]
    if not rows:
        return "There was nothing to choose on validation tasks."
    return (
        f"<details><summary>What validation chose ({len(rows)} choices)</summary>\n\n"
        f"{markdown_table(['choice', 'chosen'], rows)}\n\n</details>"
    )


def memorisation_section(table: dict) -> str:
    """Distances of adapters, overlap of errors, and what they say."""
    known = {name: [one for one in table["memorisation"][name] if one is not None] for name in MEMORISATION}
    found = {name: bootstrap_interval({name: values}) for name, values in known.items() if values}
    rows = []
    for name in MEMORISATION:
        cell = f"{found[name].mean:.3g} ±{found[name].half_width:.2g}" if name in found else MISSING
        rows.append([name, cell.replace("±inf", "±?"), str(len(known[name]))])
    sentences = [distance_sentence(found[NEW], found[BETWEEN], found[NOISED_COPY])]
    silent = len(table["memorisation"][OVERLAP]) - len(known[OVERLAP])
    if OVERLAP in found:
        sentences.append(
            f"Of the queries that {MC_DI} or the nearest training adapter gets wrong, both get "
            f"{100 * found[OVERLAP].mean:.0f} % wrong (mean over tasks)."
        )
    if silent:
        sentences.append(f"Tasks without errors of either: {silent}.")
    return f"{markdown_table(['memorisation', 'mean', 'values'], rows)}\n\n{' '.join(sentences)}"


def distance_sentence(new: Estimate, between: Estimate, noised: Estimate) -> str:
    """What the distances of weights say about copying; nothing where intervals overlap."""
    ratio = f"{new.mean / between.mean:.2f} times as far" if between.mean > 0 else "at another distance"
    text = f"A generated adapter lies {ratio} from its nearest training adapter as training adapters from each other: "
    if new.low > between.high:
        return f"{text}farther, so it is no copy of one."
    if new.high >= between.low:
        return f"{text}the intervals overlap, so it is as far as another trained adapter would be."
    if new.low > noised.high:
        return f"{text}nearer, but farther than a training adapter with noise, so more than a copy with noise."
    if new.high < noised.low:
        return f"{text}nearer, and nearer than a training adapter with noise, as a copy would be."
    return f"{text}nearer, and as near as a training adapter with noise, so a copy with noise cannot be ruled out."
