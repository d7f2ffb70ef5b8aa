"""Whether a file of benchmark results is whole, before a report is made of it."""

import math

from benchmark_tables import MEMORISATION
from benchmark_ways import MC_DI, SETFIT, WAYS


NEEDED = ("family", "command", "machine", "versions", "seal", "seconds", "tables", "missing")
NEEDED_OF_TABLE = ("name", "title", "note", "kinds", "accuracy", "seconds", "time_kind", "choices", "memorisation")
MAY_BE_MISSING = (SETFIT,)  # it reads texts only, and not many of them


def check_results(results: dict) -> None:
    """Refuse results that lack a way or a kind, or hold what no report can be made of.

    Args:
        results (`dict`): What `benchmark.py` writes as `docs/results/FAMILY.json`.

    Raises:
        `ValueError`: naming the family, the table and what was expected.
    """
    if missing := [key for key in NEEDED if key not in results]:
        raise ValueError(f"The results of {results.get('family', 'a family')!r} have no {missing}: expected {NEEDED}.")
    if not results["tables"]:
        raise ValueError(f"The results of {results['family']!r} have no tables: expected one at least.")
    for table in results["tables"]:
        place = f"The table {table.get('name', 'without a name')!r} of {results['family']!r}"
        if missing := [key for key in NEEDED_OF_TABLE if key not in table]:
            raise ValueError(f"{place} has no {missing}: expected {NEEDED_OF_TABLE}.")
        if table["time_kind"] not in table["kinds"]:
            raise ValueError(
                f"{place} was timed on {table['time_kind']!r}: expected one of its kinds {table['kinds']}."
            )
        if missing := [name for name in MEMORISATION if not table["memorisation"].get(name)]:
            raise ValueError(f"{place} has no values of {missing} in its memorisation.")
        _check_ways(place, table)


def _check_ways(place: str, table: dict) -> None:
    accuracy, kinds = table["accuracy"], table["kinds"]
    if unknown := [way for way in accuracy if way not in WAYS]:
        raise ValueError(f"{place} has the ways {unknown}: expected some of {WAYS}.")
    if missing := [way for way in WAYS if way not in accuracy and way not in MAY_BE_MISSING]:
        raise ValueError(f"{place} lacks the ways {missing}: every way but {', '.join(MAY_BE_MISSING)} is expected.")
    for way, own in accuracy.items():
        if unknown := [kind for kind in own if kind not in kinds]:
            raise ValueError(f"{place} has the kinds {unknown} of {way!r}: expected some of {kinds}.")
        if way not in MAY_BE_MISSING and (missing := [kind for kind in kinds if kind not in own]):
            raise ValueError(f"{place} lacks the kinds {missing} of {way!r}: expected all of {kinds}.")
        for kind, groups in own.items():
            _check_groups(f"{place}, {way!r}, {kind}", groups, accuracy[MC_DI][kind])


def _check_groups(place: str, groups: dict[str, list[float]], of_mc_di: dict[str, list[float]]) -> None:
    """Every episode of a way is one of Mc-Di's, and an accuracy."""
    if not groups:
        raise ValueError(f"{place} has no groups: expected some of {list(of_mc_di)}.")
    for name, values in groups.items():
        longest = len(of_mc_di.get(name, []))
        if not 1 <= len(values) <= longest:
            raise ValueError(
                f"{place}: the group {name!r} has {len(values)} episodes: expected 1 to {longest}, as {MC_DI} has."
            )
        if wrong := [one for one in values if not (math.isfinite(one) and 0 <= one <= 1)]:
            raise ValueError(f"{place}: the group {name!r} has the accuracies {wrong}: expected shares in 0..1.")
