"""Is an adapter new? Its distance from those of training, and whether it errs where they do."""

import math

import torch
from fold import Fold
from intervals import bootstrap_interval, paired_difference
from methods import MAIN
from methods.controls import noised
from methods.nearest import nearest_coefficients
from splits import Split

from mcdi_hf import AdapterLayout, Task


MAX_NUMBERS = 2**22  # of the small products that are held at once
NEW, BETWEEN = "generated to nearest training adapter", "training adapter to nearest other"
NOISED_COPY, OVERLAP = "noised nearest to nearest training adapter", "overlap of errors with the nearest"


@torch.no_grad()
def memorised(split: Split, fold: Fold, tasks: list[Task], seed: int, noise_scale: float) -> dict[str, list]:
    """How far generated adapters are from training adapters, how far these are from each other, and shared errors.

    Args:
        split (`Split`), fold (`Fold`), tasks (`list[Task]`), seed (`int`): As in [`Method.accuracies`], of one stack.
        noise_scale (`float`): Of the nearest training adapter with noise, as it was chosen for these tasks.

    Returns:
        For JSON: a distance a task, or a training task, and [`error_overlap`].
    """
    layout, known, pipe = fold.stacked.layout, fold.training.coefficients, fold.pipeline(MAIN.objective, seed)
    support, query, nearest = split.support(tasks), split.query(tasks), nearest_coefficients(split, fold, tasks)
    made = MAIN.adapters(pipe, support, support, torch.Generator().manual_seed(seed))
    copies = fold.codec.matrices(noised(nearest, known, noise_scale, torch.Generator().manual_seed(seed)))
    own = fold.codec.complete(fold.codec.matrices(nearest), support, fold.stacked)
    right = [fold.stacked.logits(one, query).argmax(dim=-1) == query.labels for one in (made, own)]
    training = fold.codec.matrices(known)
    between = fold.once("between", lambda: weight_distances(layout, training, training).fill_diagonal_(torch.inf))
    distances = {
        NEW: weight_distances(layout, made, training),
        NOISED_COPY: weight_distances(layout, copies, training),
    }
    found = {name: own.amin(dim=1).tolist() for name, own in (distances | {BETWEEN: between}).items()}
    found = {name: [round(one, 4) for one in own] for name, own in found.items()}
    overlap = error_overlap(*right, query.labels >= 0)
    return found | {OVERLAP: [None if one is None else round(one, 4) for one in overlap]}


def weight_distances(
    layout: AdapterLayout, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> torch.Tensor:
    """How far the updates `scaling * B @ A` of adapters are apart.

    The factors say nothing by themselves: `R A` and `B R^-1` are the same update. The distance is Frobenius's, over
    all modules together. The products are never made, since `<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))` takes two
    products of the size of the rank. It is computed in float64, as the squares of two close adapters all but cancel:
    distances below some 1e-7 of the updates' own norm are noise.

    Args:
        layout (`AdapterLayout`): The adapters' layout.
        first (`dict[str, torch.Tensor]`): Adapters, key -> `(n, *shape)`; their heads, if given, do not count.
        second (`dict[str, torch.Tensor]`): Others, key -> `(m, *shape)`.

    Returns:
        `torch.Tensor` of shape `(n, m)`, float64.
    """
    first, second = _matrices(layout, first), _matrices(layout, second)
    count, others = (len(own[layout.modules[0].key("lora_A")]) for own in (first, second))
    largest = max(module.rank for module in layout.modules)
    rows = max(1, MAX_NUMBERS // max(1, others * largest**2))
    cross = [
        _products(layout, {key: value[start : start + rows] for key, value in first.items()}, second)
        for start in range(0, count, rows)
    ]
    squares = _norms(layout, first).unsqueeze(1) + _norms(layout, second) - 2 * torch.cat(cross)
    return squares.clamp(min=0).sqrt()


def error_overlap(first_right: torch.Tensor, second_right: torch.Tensor, mask: torch.Tensor) -> list[float | None]:
    """How far two classifiers err on the same queries: both wrong over either wrong, for each task.

    1 says that they make the same mistakes, 0 that they share none. Where neither errs the ratio says nothing, so it
    is `None` and not a number that a mean would take for an answer.

    Args:
        first_right, second_right (`bool` tensors of shape `(tasks, queries)`): Which answers are right.
        mask (`bool` tensor of shape `(tasks, queries)`): False marks padding.
    """
    both = (~first_right & ~second_right & mask).sum(dim=-1).tolist()
    either = ((~first_right | ~second_right) & mask).sum(dim=-1).tolist()
    return [shared / total if total else None for shared, total in zip(both, either)]


def memorisation_text(results: dict) -> str:
    """What distances of weights and shared errors of an experiment say about copying, as a sentence."""
    known = results["memorisation"]
    if NEW not in known:
        return ""
    new, between = bootstrap_interval(known[NEW]), bootstrap_interval(known[BETWEEN])
    ratio = new.mean / between.mean if between.mean else math.inf
    text = (
        f"A generated adapter lies {ratio:.2f} times as far from its nearest training adapter as training adapters lie "
        f"from each other"
    )
    if new.low > between.high:
        text += ", so it is no copy"
    elif new.high >= between.low:
        text += ": as far as a newly trained one would"
    elif paired_difference(known[NEW], known[NOISED_COPY]).verdict == "above":  # of the same tasks
        text += ", but farther than a training adapter with noise"
    else:
        text += ", no farther than a training adapter with noise, as a copy would"
    shared = {name: [one for one in own if one is not None] for name, own in known[OVERLAP].items()}
    if shared := {name: own for name, own in shared.items() if own}:
        text += f"; they share {100 * bootstrap_interval(shared).mean:.0f} % of their errors"
    return f"{text}."


def _matrices(layout: AdapterLayout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA matrices in float64, checked."""
    for key, shape in layout.lora_shapes.items():
        if key not in tensors or tuple(tensors[key].shape[1:]) != shape:
            found = tuple(tensors[key].shape[1:]) if key in tensors else "missing"
            raise ValueError(f"{key} is {found}: expected the shape {shape} an adapter.")
    return {key: tensors[key].double() for key in layout.lora_shapes}


def _products(layout: AdapterLayout, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> torch.Tensor:
    """The inner products of the updates of every pair, summed over modules: `(n, m)`."""
    total = 0
    for module in layout.modules:
        key_a, key_b = module.key("lora_A"), module.key("lora_B")
        outer = torch.einsum("nor,mos->nmrs", first[key_b], second[key_b])
        inner = torch.einsum("nri,msi->nmrs", first[key_a], second[key_a])
        total = total + module.scaling**2 * (outer * inner).sum(dim=(2, 3))
    return total


def _norms(layout: AdapterLayout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The squared norms of the updates: `(n,)`."""
    total = 0
    for module in layout.modules:
        lora_a, lora_b = (tensors[module.key(matrix)] for matrix in ("lora_A", "lora_B"))
        grams = (lora_b.transpose(1, 2) @ lora_b) * (lora_a @ lora_a.transpose(1, 2))
        total = total + module.scaling**2 * grams.sum(dim=(1, 2))
    return total
