"""Is an adapter new? Its distance from those of training, and whether it errs where they do."""

import torch

from ..adapters.layout import AdapterLayout


MAX_NUMBERS = 2**22  # of the small products that are held at once


def weight_distances(
    layout: AdapterLayout, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> torch.Tensor:
    """How far the updates `scaling * B @ A` of adapters are apart.

    The factors say nothing by themselves: `R A` and `B R^-1` are the same update. The distance is Frobenius's, over all
    modules together: the root of the summed squares. The products are never made, since
    `<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))` takes two products of the size of the rank. It is computed in float64,
    as the squares of two close adapters all but cancel: distances below some 1e-7 of the updates' own norm are noise.

    Args:
        layout (`AdapterLayout`): The adapters' layout.
        first (`dict[str, torch.Tensor]`): Adapters, key -> `(n, *shape)`; their heads, if given, do not count.
        second (`dict[str, torch.Tensor]`): Others, key -> `(m, *shape)`, on the same device.

    Returns:
        `torch.Tensor` of shape `(n, m)`, float64.

    Raises:
        `ValueError`: when a matrix is missing or of another shape.
    """
    first, second = _matrices(layout, first), _matrices(layout, second)
    count, others = (len(own[layout.modules[0].key("lora_A")]) for own in (first, second))
    largest = max(module.rank for module in layout.modules)
    rows = max(1, MAX_NUMBERS // max(1, others * largest**2))
    cross = [
        _products(layout, {key: value[start : start + rows] for key, value in first.items()}, second)
        for start in range(0, count, rows)
    ]
    squares = _squares(layout, first).unsqueeze(1) + _squares(layout, second) - 2 * torch.cat(cross)
    return squares.clamp(min=0).sqrt()


def error_overlap(
    first_right: torch.Tensor, second_right: torch.Tensor, mask: torch.Tensor | None = None
) -> list[float | None]:
    """How far two classifiers err on the same queries: both wrong over either wrong, for each task.

    1 says that they make the same mistakes, 0 that they share none. Where neither errs the ratio says nothing, so it is
    `None` and not a number that a mean would take for an answer.

    Args:
        first_right (`torch.Tensor` of shape `(tasks, queries)`): Which answers of the first are right, `bool`.
        second_right (`torch.Tensor` of shape `(tasks, queries)`): Those of the second.
        mask (`torch.Tensor` of shape `(tasks, queries)`, *optional*): False marks padding; without it there is none.
    """
    mask = torch.ones_like(first_right) if mask is None else mask
    if not first_right.shape == second_right.shape == mask.shape:
        raise ValueError(
            f"The answers have shapes {tuple(first_right.shape)} and {tuple(second_right.shape)}, the mask "
            f"{tuple(mask.shape)}: expected the same (tasks, queries)."
        )
    if wrong := {one.dtype for one in (first_right, second_right, mask)} - {torch.bool}:
        raise ValueError(f"The answers or the mask are of {sorted(map(str, wrong))}: expected torch.bool.")
    both = (~first_right & ~second_right & mask).sum(dim=-1).tolist()
    either = ((~first_right | ~second_right) & mask).sum(dim=-1).tolist()
    return [shared / total if total else None for shared, total in zip(both, either)]


def _matrices(layout: AdapterLayout, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA matrices in float64, checked."""
    for key, shape in layout.lora_shapes.items():
        if key not in tensors:
            raise ValueError(f"The adapters have no {key}: expected {layout.keys}.")
        if tuple(tensors[key].shape[1:]) != shape:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape[1:])} an adapter: expected {shape}.")
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


def _squares(layout: AdapterLayout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The squared norms of the updates: `(n,)`."""
    total = 0
    for module in layout.modules:
        lora_a, lora_b = (tensors[module.key(matrix)] for matrix in ("lora_A", "lora_B"))
        grams = (lora_b.transpose(1, 2) @ lora_b) * (lora_a @ lora_a.transpose(1, 2))
        total = total + module.scaling**2 * grams.sum(dim=(1, 2))
    return total
