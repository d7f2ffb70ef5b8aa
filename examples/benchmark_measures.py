"""What is measured of a contest: accuracies on test tasks, and what pictures and memorisation need."""

import itertools
from functools import partial

import torch
from benchmark_chain import accuracy_by_steps, generation_chain, rich_task
from benchmark_contest import CANDIDATES, Contest
from benchmark_fold import asked_once, seconds_of, settings_of, shots_of
from benchmark_seal import Sealed
from benchmark_tables import BETWEEN, NEW, NOISED_COPY, OVERLAP
from benchmark_ways import GRADIENT, NOISED, SETFIT
from tqdm.auto import tqdm

from mcdi_hf import Task
from mcdi_hf.data.episodes import Episodes
from mcdi_hf.training.validation import generated_tensors
from mcdi_hf.evaluation.memorisation import error_overlap, weight_distances


TEST_SEED = 1000  # of the episodes, plus the training seed


def shown(contest: Contest) -> dict:
    """What pictures show of one fold, on validation tasks: seconds to one adapter, accuracy by steps, the chain."""
    fold, sizes = contest.fold, contest.sizes
    family, kind = fold.family, fold.family.values["validation_kinds"][0]
    seed, shots = fold.generator.seeds[0], shots_of(kind)
    tasks = family.tasks("validation", kind, 100, 2 * sizes.validation_episodes)
    gradient = settings_of(contest.chosen(GRADIENT, shots))
    rich = rich_task(family, kind, sizes.chain_examples, 10)
    return {
        "kind": kind,
        "seconds": seconds_by_way(contest, seed, shots, tasks[0]),
        "steps": accuracy_by_steps(
            family,
            fold.table["name"],
            kind,
            tasks,
            sizes.inference_steps,
            gradient,
            (1, 3, *sizes.gradient_steps),
            fold.frozen_scale,
        ),
        "chain": generation_chain(family, fold.table["name"], rich, shots, size=sizes.grid),
    }


def measure(contest: Contest, sealed: Sealed) -> None:
    """Draw the test tasks of every seed and kind of a fold, once, and let everything compete on them."""
    fold, sizes = contest.fold, contest.sizes
    plans = list(itertools.product(fold.generator.seeds, fold.table["kinds"]))
    for seed, kind in tqdm(plans, desc=f"{fold.family.name}: test"):
        draw = partial(fold.family.tasks, "test", kind, TEST_SEED + seed, sizes.episodes)
        sealed.measure({"fold": fold.name, "seed": seed, "kind": kind}, draw, partial(judged, contest, seed))


def judged(contest: Contest, seed: int, tasks: list[Task]) -> dict:
    """The accuracies of every way; slow ways get the first tasks only."""
    sizes, task = contest.sizes, tasks[0]
    shots = len(task.support[0])
    examples = shots * len(task.classes)
    found = {name: way(tasks) for name, way in contest.fast(seed, shots).items()}
    few = tasks[: max(min(4, sizes.slow_episodes), min(sizes.slow_episodes, 200 // examples))]
    found |= {name: way(few) for name, way in contest.slow(seed, shots).items()}
    if contest.setfit is not None and examples <= sizes.setfit_examples:
        found[SETFIT] = contest.setfit_accuracies(tasks[: sizes.setfit_episodes])
    rounded = {name: [round(one, 4) for one in own] for name, own in found.items()}
    return {"accuracy": rounded, "memorisation": memorised(contest, seed, tasks[:16])}


def seconds_by_way(contest: Contest, seed: int, shots: int, task: Task) -> dict[str, float]:
    """Seconds from examples to an adapter for every way, one task at a time; one query a class is judged besides.

    Every way but SetFit begins with the support's pass through the frozen layers, so that is added to each.
    """
    fold, stacked, task = contest.fold, contest.stacked, asked_once(task)
    inputs = fold.inputs(contest.split, [row for members in task.support for row in members])
    mean, repeats = fold.codec.mean_adapter(), contest.sizes.timings
    base = seconds_of(lambda: stacked.features_of_all(mean, stacked.encode(inputs)), repeats)
    ways = contest.fast(seed, shots) | contest.slow(seed, shots)
    found = {name: base + seconds_of(partial(way, [task]), repeats) for name, way in ways.items()}
    if contest.setfit is not None:
        found[SETFIT] = seconds_of(partial(contest.setfit_accuracies, [task]), 1)
    return found


@torch.no_grad()
def memorised(contest: Contest, seed: int, tasks: list[Task]) -> dict[str, list]:
    """How far generated adapters are from training adapters, and how far these are from each other."""
    fold, stacked, layout = contest.fold, contest.stacked, contest.stacked.layout
    training, pipe = fold.adapters, fold.pipeline("Mc-Di", seed)
    noise = torch.Generator().manual_seed(seed)
    made = generated_tensors(
        pipe, contest.examples, contest.features, tasks, num_candidates=CANDIDATES, generator=noise
    )
    between = weight_distances(layout, training, training).fill_diagonal_(torch.inf)
    noised = contest.noised(tasks, contest.chosen(NOISED), seed)
    episodes, nearest = Episodes.of(tasks, stacked.device), contest.nearest(tasks)
    support = contest.examples[episodes.support.flatten()]
    head = stacked.imprint(nearest, support, episodes.labels, episodes.class_mask, contest.scale)
    nearest |= dict(zip(layout.head_keys, head))
    queries = contest.examples[episodes.query.flatten()]
    right = [
        stacked.logits(own, queries, episodes.class_mask).argmax(dim=-1) == episodes.query_labels
        for own in (made, nearest)
    ]
    overlap = error_overlap(*right, episodes.query_labels >= 0)
    return {
        NEW: rounded(weight_distances(layout, made, training).amin(dim=1)),
        BETWEEN: rounded(between.amin(dim=1)),
        NOISED_COPY: rounded(weight_distances(layout, noised, training).amin(dim=1)),
        OVERLAP: [None if one is None else round(one, 4) for one in overlap],
    }


def rounded(values: torch.Tensor) -> list[float]:
    return [round(one, 4) for one in values.tolist()]
