"""Kinds of tasks by name, to validate and to test on."""

import copy
import re

import numpy as np

from .crossed import CrossedSampler
from .tasks import EpisodeSampler, LabelledRows, Task


CROSSED = "crossed"


def tasks_of_kind(
    kind: str,
    rows: LabelledRows,
    query_rows: LabelledRows | None = None,
    queries: int = 5,
    *,
    seed: int,
    count: int,
    identities: np.ndarray | None = None,
) -> list[Task]:
    """Tasks of one kind.

    Args:
        kind (`str`): `WAYSxSHOTS` of any group, `GROUP:WAYSxSHOTS` of one, `SOURCE/*:WAYSxSHOTS` of all groups of a
            source, or `crossed:2xSHOTS`: twins, one behind the other, see [`CrossedSampler`].
        rows, query_rows, queries: Those of [`EpisodeSampler`].
        seed, count (`int`): Which tasks, and how many.
        identities (`np.ndarray` of shape `(rows,)`, *optional*): Which rows are the same example, for twins.

    Raises:
        `ValueError`: when the kind is none of these, or there are no such tasks.
    """
    group, _, size = kind.rpartition(":")
    known = re.fullmatch(r"(\d+)x(\d+)", size)
    ways, shots = map(int, known.groups()) if known else (0, 0)
    if ways < 2 or shots < 1 or group == CROSSED and ways != 2:
        raise ValueError(
            f"The kind of tasks {kind!r} is unknown: expected WAYSxSHOTS, GROUP:WAYSxSHOTS or crossed:2xSHOTS, with 2 "
            "ways or more."
        )
    if group == CROSSED and identities is None:
        raise ValueError(f"There are no tasks of the kind {kind!r} of images: expected texts, which tell equal ones.")
    try:
        if group == CROSSED:
            crossed = CrossedSampler(rows, identities, (shots, shots), queries + queries % 2, seed)
            return [task for number in range((count + 1) // 2) for task in crossed.twins(number)][:count]
        rows, query_rows = (own and _only(own, group, kind) for own in (rows, query_rows))
        sampler = EpisodeSampler(rows, (ways, ways), (shots, shots), queries, seed, query_rows)
    except ValueError as error:
        raise ValueError(f"There are no tasks of the kind {kind!r}: {error}") from error
    return [sampler[number] for number in range(count)]


def _only(rows: LabelledRows, group: str, kind: str) -> LabelledRows:
    """The rows of one group, or of all groups of a source, whatever the others have too few of."""
    if not group:
        return rows
    chosen = [one for one in rows.groups if one == group or group.endswith("/*") and one.startswith(group[:-1])]
    if not chosen:
        raise ValueError(f"There are no tasks {kind!r}: expected one of the groups {list(rows.groups)}.")
    own = copy.copy(rows)
    own.groups = {one: rows.groups[one] for one in chosen}
    return own
