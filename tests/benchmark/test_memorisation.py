"""Distances between updates against the dense formula, and shared errors counted by hand."""

from dataclasses import replace

import memorisation
import pytest
import torch
from memorisation import error_overlap, memorised, weight_distances
from tiny import LORA_SETTINGS, random_adapters, seeded, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterLayout


def layout_of(settings: dict) -> AdapterLayout:
    return AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(**settings))


def dense(layout: AdapterLayout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every update as one long row: what the backbone's weights change by."""
    parts = [
        module.scaling * (tensors[module.key("lora_B")].double() @ tensors[module.key("lora_A")].double()).flatten(1)
        for module in layout.modules
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("settings", LORA_SETTINGS)
@pytest.mark.parametrize("max_numbers", [1, memorisation.MAX_NUMBERS])
def test_distances_are_those_of_the_products(
    settings: dict, max_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "MAX_NUMBERS", max_numbers)  # 1: row by row
    layout = layout_of(settings)
    first, second = random_adapters(layout, 3), random_adapters(layout, 4, ways=5, seed=1)
    found = weight_distances(layout, first, second)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, torch.cdist(dense(layout, first), dense(layout, second)))


def test_the_same_adapter_is_at_no_distance_whatever_its_basis() -> None:
    layout = layout_of({"r": 4, "lora_alpha": 1})
    tensors = random_adapters(layout, 3)
    turned = {}
    for module in layout.modules:
        basis = torch.linalg.qr(torch.randn(4, 4, generator=seeded(), dtype=torch.float64)).Q
        basis = basis * torch.tensor([0.5, 1.0, 2.0, 4.0])  # no rotation: its inverse is not its transpose
        turned[module.key("lora_A")] = basis @ tensors[module.key("lora_A")].double()
        turned[module.key("lora_B")] = tensors[module.key("lora_B")].double() @ basis.inverse()
    size = dense(layout, tensors).norm(dim=1).max().item()
    for other in (tensors, turned):
        found = weight_distances(layout, tensors, other)
        assert found.diagonal().max() < 1e-6 * size
        assert found[0, 1] > 0.1 * size
    torch.testing.assert_close(found, weight_distances(layout, tensors, tensors), rtol=1e-6, atol=1e-6 * size)


def test_heads_do_not_count_and_zero_updates_leave_the_norm() -> None:
    layout = layout_of({})
    tensors = random_adapters(layout, 2)
    lora = {key: tensors[key] for key in layout.lora_shapes}
    nothing = {key: torch.zeros_like(value[:1]) for key, value in lora.items()}
    found = weight_distances(layout, tensors, nothing)
    torch.testing.assert_close(found[:, 0], dense(layout, tensors).norm(dim=1))


def test_adapters_of_another_layout_are_refused() -> None:
    layout = layout_of({})
    key = layout.modules[0].key("lora_B")
    tensors = random_adapters(layout, 2)
    missing = {name: value for name, value in tensors.items() if name != key}
    with pytest.raises(ValueError, match=rf"{key} is missing"):
        weight_distances(layout, tensors, missing)
    with pytest.raises(ValueError, match=r"is \(16, 3\): expected the shape \(16, 2\)"):
        weight_distances(layout, tensors | {key: torch.zeros(2, 16, 3)}, tensors)


def test_shared_errors_over_all_errors() -> None:
    wrong = [[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
    other = [[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool).expand(4, -1)
    first, second = ~torch.tensor(wrong).bool(), ~torch.tensor(other).bool()
    assert error_overlap(first, second, mask) == [1 / 3, None, 0.0, 1.0]


def test_what_is_memorised_is_found(fold) -> None:
    """A generator that gives a training adapter back is at no distance, and noise of no width is none."""
    split = fold.split("validation")
    tasks = split.tasks("2x2", 0, 3)
    found = memorised(split, fold, tasks, 0, noise_scale=0.0)
    assert max(found[memorisation.NOISED_COPY]) < 1e-3 < min(found[memorisation.NEW])
    assert len(found[memorisation.BETWEEN]) == 6 and len(found[memorisation.OVERLAP]) == 3
    known = fold.training.coefficients
    fold._made["training"] = replace(fold.training, coefficients=torch.cat([known, torch.ones_like(known[:1])]))
    fold._made.pop("between")
    fold._made.pop("places", None)
    fold.pipeline("Mc-Di", 0).register_to_config(strength=0.0)  # its adapters are the shared adapter
    assert max(memorised(split, fold, tasks, 0, 0.0)[memorisation.NEW]) < 1e-3
