"""Factors of one update have one canonical form, and a trajectory in it moves as little as the updates do."""

import math

import pytest
import torch
from tiny import random_adapters, tiny_backbone, tiny_lora_config

from mcdi_hf import AdapterCodec, AdapterLayout, StackedLora
from mcdi_hf.adapters import gauge
from mcdi_hf.adapters.gauge import align_factors, canonical_factors, canonical_trajectory


Factors = tuple[torch.Tensor, torch.Tensor]
IN_FEATURES, OUT_FEATURES = 24, 17
# How far a double can be off after a few factorisations, and the tolerance for a float of the same numbers.
ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-6}


def random_factors(rank: int, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    lora_a = torch.randn(*batch, rank, IN_FEATURES, dtype=torch.float64, generator=generator)
    lora_b = torch.randn(*batch, OUT_FEATURES, rank, dtype=torch.float64, generator=generator)
    return lora_a.to(dtype), lora_b.to(dtype)


def random_rotations(batch: tuple[int, ...], size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(*batch, size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(gaussian).Q * gaussian.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def changed(factors: Factors, condition: float, seed: int = 1) -> Factors:
    """The same updates in another random basis G: (G^-1 A, B G), computed in the factors' dtype."""
    lora_a, lora_b = factors
    rank, batch = lora_a.shape[-2], lora_a.shape[:-2]
    spectrum = -3 * torch.logspace(0, math.log10(condition), rank, dtype=torch.float64)
    left, right = random_rotations(batch, rank, seed), random_rotations(batch, rank, seed + 1)
    basis, inverse = left * spectrum @ right, right.mT / spectrum @ left.mT
    return inverse.to(lora_a.dtype) @ lora_a, lora_b @ basis.to(lora_b.dtype)


def factors_of(spectrum: list[float], seed: int = 0) -> Factors:
    """Factors of an update with given singular values; their singular vectors are random."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    right = random_rotations((), IN_FEATURES, seed)[: len(values)]
    left = random_rotations((), OUT_FEATURES, seed + 1)[:, : len(values)]
    return values.unsqueeze(-1) * right, left


def stacked(factors: Factors) -> torch.Tensor:
    lora_a, lora_b = factors
    return torch.cat([lora_b, lora_a.mT], dim=-2).double()


def squared_norm(matrices: torch.Tensor) -> torch.Tensor:
    return matrices.square().sum(dim=(-2, -1))


def assert_same(found: Factors, expected: Factors, tolerance: float) -> None:
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_within_the_bound(lora_a: torch.Tensor, lora_b: torch.Tensor, original: torch.Tensor) -> None:
    """Every snapshot is as close to the last as the theorem in `align_factors` says, for the updates `original`."""
    rank = lora_a.shape[-2]
    distances = stacked((lora_a, lora_b)) - stacked((lora_a, lora_b))[..., -1:, :, :]
    weakest = torch.linalg.svdvals(original)[..., -1:, rank - 1]
    assert (weakest > 0).all()
    bound = squared_norm(original - original[..., -1:, :, :]) / ((math.sqrt(2) - 1) * weakest)
    assert (squared_norm(distances) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("batch", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_canonical_factors_are_balanced_and_give_the_update(
    rank: int, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    lora_a, lora_b = random_factors(rank, batch, dtype)
    found_a, found_b = canonical_factors(lora_a, lora_b)
    assert (found_a.dtype, found_b.dtype) == (dtype, dtype)
    assert (found_a.shape, found_b.shape) == (lora_a.shape, lora_b.shape)
    update, tolerance = lora_b.double() @ lora_a.double(), 30 * ROUNDING[dtype]
    torch.testing.assert_close(found_b.double() @ found_a.double(), update, rtol=tolerance, atol=tolerance)
    expected = torch.diag_embed(torch.linalg.svdvals(update)[..., :rank])
    for gram in (found_a @ found_a.mT, found_b.mT @ found_b):
        torch.testing.assert_close(gram.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    "dtype,condition", [(torch.float64, 3.0), (torch.float64, 1e4), (torch.float32, 3.0), (torch.float32, 100.0)]
)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_change_of_basis_changes_nothing(
    rank: int, dtype: torch.dtype, condition: float, batch: tuple[int, ...]
) -> None:
    factors = random_factors(rank, batch, dtype)
    tolerance = condition * 30 * torch.finfo(dtype).eps / relative_gap(factors)
    assert_same(canonical_factors(*changed(factors, condition)), canonical_factors(*factors), tolerance)


def relative_gap(factors: Factors) -> float:
    """The smallest gap in the spectra: what the rounding of an update is magnified by in its singular vectors."""
    values = torch.linalg.svdvals(factors[1].double() @ factors[0].double())[..., : factors[0].shape[-2] + 1]
    return ((values[..., :-1] - values[..., 1:]) / values[..., :1]).min().item()


def test_an_exact_change_of_basis_leaves_float32_factors_the_same_to_the_last_digits() -> None:
    lora_a, lora_b = random_factors(8, (3,), torch.float32)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    powers = torch.tensor([4.0, -1.0, 0.5, 32.0, -16.0, 2.0, 1.0, -0.25])
    other = canonical_factors(lora_a[:, order] / powers.unsqueeze(-1), lora_b[..., order] * powers)
    assert_same(other, canonical_factors(lora_a, lora_b), torch.finfo(torch.float32).eps)


def test_a_canonical_pair_is_its_own_canonical_form() -> None:
    factors = canonical_factors(*random_factors(8, (3,)))
    assert_same(canonical_factors(*factors), factors, ROUNDING[torch.float64])


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_tokens_do_not_depend_on_the_basis(rank: int) -> None:
    codec = AdapterCodec.from_backbone(tiny_backbone(), tiny_lora_config(r=rank), token_dim=20)
    tensors = random_adapters(codec.layout, 5)
    others = dict(tensors)
    for seed, module in enumerate(codec.layout.modules):
        keys = module.key("lora_A"), module.key("lora_B")
        others |= zip(keys, changed((tensors[keys[0]], tensors[keys[1]]), condition=3.0, seed=seed))
    head = torch.zeros(5, 3, codec.layout.feature_dim), torch.zeros(5, 3)
    plain, tokens = [], []
    for adapters in (tensors, others):
        plain.append(codec.encode(adapters, head))
        canonical = canonical_trajectory({key: value.unsqueeze(1) for key, value in adapters.items()}, codec.layout)
        tokens.append(codec.encode({key: value.squeeze(1) for key, value in canonical.items()}, head))
    torch.testing.assert_close(tokens[0], tokens[1], rtol=1e-3, atol=1e-3)
    assert (plain[0] - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "spectrum", [[2.0, 2.0, 2.0, 2.0], [3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.25], [1.0] * 8, [2.0, 1.0, 1.0, 0.0]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_singular_values_leave_no_freedom(
    spectrum: list[float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_a, lora_b = factors_of(spectrum)
    factors = lora_a.to(dtype), lora_b.to(dtype)
    others = changed(factors, condition=10.0)
    expected = canonical_factors(*factors)
    assert_same(canonical_factors(*others), expected, 300 * ROUNDING[dtype])
    torch.testing.assert_close(expected[1] @ expected[0], factors[1] @ factors[0], rtol=1e-5, atol=1e-5)
    gram = torch.diag(torch.tensor(spectrum, dtype=dtype))
    torch.testing.assert_close(expected[0] @ expected[0].mT, gram, rtol=1e-5, atol=1e-5)

    # with the signs fixed, but not the rotation among equals, another basis gives other factors
    monkeypatch.setattr(gauge, "RESOLUTION", 0.0)
    without, other = canonical_factors(*factors), canonical_factors(*others)
    assert (without[0] - other[0]).abs().max() > 0.05


def test_members_of_a_batch_do_not_depend_on_each_other() -> None:
    plain, tied, zero = random_factors(4), factors_of([2.0, 2.0, 1.0, 1.0]), factors_of([0.0] * 4)
    batch = canonical_factors(*(torch.stack(matrices) for matrices in zip(plain, tied, zero)))
    for index, factors in enumerate((plain, tied, zero)):
        assert_same((batch[0][index], batch[1][index]), canonical_factors(*factors), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_an_update_of_zero_has_factors_of_zero(rank: int, dtype: torch.dtype) -> None:
    lora_a, lora_b = random_factors(rank, (2,), dtype)
    for matrix in canonical_factors(lora_a, torch.zeros_like(lora_b)):
        assert torch.equal(matrix, torch.zeros_like(matrix))
    for matrix in align_factors(lora_a, torch.zeros_like(lora_b), *canonical_factors(lora_a, lora_b)):
        assert torch.equal(matrix, torch.zeros_like(matrix))
    zeros = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    assert_same(align_factors(lora_a, lora_b, *zeros), canonical_factors(lora_a, lora_b), ROUNDING[dtype])


@pytest.mark.parametrize("dtype,weakest", [(torch.float32, 0.5), (torch.float64, 0.5), (torch.float64, 3e-5)])
def test_zero_singular_values_have_rows_and_columns_of_zero(dtype: torch.dtype, weakest: float) -> None:
    """Also where the weakest one is tied with zero, as close to it as may be."""
    lora_a, lora_b = (matrix.to(dtype) for matrix in changed(factors_of([2.0, 1.0, weakest, 0.0, 0.0, 0.0]), 30.0))
    found_a, found_b = canonical_factors(lora_a, lora_b)
    assert found_a[2].any() and torch.equal(found_a[3:], torch.zeros_like(found_a[3:]))
    assert torch.equal(found_b[:, 3:], torch.zeros_like(found_b[:, 3:]))
    assert_same(canonical_factors(*changed((lora_a, lora_b), 3.0)), (found_a, found_b), 300 * ROUNDING[dtype])
    torch.testing.assert_close(found_b @ found_a, lora_b @ lora_a, rtol=1e-5, atol=1e-5)


def test_a_rank_above_the_width_of_the_module_is_filled_with_zeros() -> None:
    lora_a, lora_b = random_factors(8)
    found_a, found_b = canonical_factors(lora_a, lora_b[:3])
    assert (found_a.shape, found_b.shape) == (lora_a.shape, (3, 8))
    torch.testing.assert_close(found_b @ found_a, lora_b[:3] @ lora_a)
    assert not found_a[3:].any() and not found_b[:, 3:].any()


def test_a_factor_that_is_not_finite_is_refused() -> None:
    lora_a, lora_b = random_factors(4, (2,))
    lora_a[1, 0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        canonical_factors(lora_a, lora_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_alignment_undoes_a_planted_change_of_basis(rank: int, dtype: torch.dtype) -> None:
    reference = canonical_factors(*random_factors(rank, (3,), dtype))
    rotation = random_rotations((3,), rank).to(dtype)
    planted = rotation.mT @ reference[0], reference[1] @ rotation
    assert_same(align_factors(*planted, *reference), reference, 10 * ROUNDING[dtype])
    assert_same(align_factors(*changed(planted, 10.0), *reference), reference, 100 * ROUNDING[dtype])
    # the reference may be any pair: its own rotation is what is recovered
    assert_same(align_factors(*reference, *planted), planted, 10 * ROUNDING[dtype])


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_no_rotation_is_closer_than_the_alignment(rank: int) -> None:
    lora_a, lora_b = random_factors(rank)
    reference = canonical_factors(lora_a.roll(1, dims=0) + 0.3, lora_b - 0.2)
    found_a, found_b = align_factors(lora_a, lora_b, *reference)
    torch.testing.assert_close(found_b @ found_a, lora_b @ lora_a)
    torch.testing.assert_close(found_b.mT @ found_b, found_a @ found_a.mT)
    best = squared_norm(stacked((found_a, found_b)) - stacked(reference))
    small = torch.linalg.matrix_exp(0.05 * (random_rotations((100,), rank, 3) - random_rotations((100,), rank, 3).mT))
    for rotations in (random_rotations((200,), rank, seed=2), small):
        others = stacked((rotations.mT @ found_a, found_b @ rotations))
        assert (squared_norm(others - stacked(reference)) >= best - 1e-9).all()


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_smooth_trajectories_stay_within_the_bound(rank: int) -> None:
    """Factors that drift, in a basis of their own at every snapshot: what is left of the basis is nothing."""
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config(r=rank, task_type=None))
    start, end = random_adapters(layout, 4, seed=1), random_adapters(layout, 4, seed=2)
    times = torch.linspace(0, 1, 6, dtype=torch.float64).view(-1, 1, 1)
    smooth = {key: start[key].unsqueeze(1) * (1 - times) + end[key].unsqueeze(1) * times for key in layout.keys}
    rough = dict(smooth)
    for seed, module in enumerate(layout.modules):
        keys = module.key("lora_A"), module.key("lora_B")
        rough |= zip(keys, changed((smooth[keys[0]], smooth[keys[1]]), condition=30.0, seed=seed))
    found, other = canonical_trajectory(smooth, layout), canonical_trajectory(rough, layout)
    for module in layout.modules:
        keys = module.key("lora_A"), module.key("lora_B")
        updates = smooth[keys[1]] @ smooth[keys[0]]
        torch.testing.assert_close(found[keys[1]] @ found[keys[0]], updates)
        assert_within_the_bound(found[keys[0]], found[keys[1]], updates)
        assert_same((other[keys[0]], other[keys[1]]), (found[keys[0]], found[keys[1]]), 1e-7)


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-1])
def test_trained_trajectories_stay_within_the_bound(learning_rate: float) -> None:
    """Adam from PEFT's start, B = 0, for three tasks on the tiny backbone."""
    backbone = tiny_backbone()
    layout = AdapterLayout.from_model(backbone.model, tiny_lora_config())
    stack = StackedLora(backbone, layout)
    tensors = random_adapters(layout, 3)
    for key, value in tensors.items():
        value.mul_(0 if key.endswith(".lora_B.weight") else 1).requires_grad_()
    optimizer = torch.optim.Adam(tensors.values(), lr=learning_rate)
    examples = stack.encode(["a b c", "x y", "q", "m n o p", "z", "a a a", "b c d e f", "k l", "t u v"])
    snapshots = [{key: value.detach().clone() for key, value in tensors.items()}]
    for _ in range(6):
        logits = stack.logits(tensors, examples[torch.arange(9)])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(9) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        snapshots.append({key: value.detach().clone() for key, value in tensors.items()})
    trained = {key: torch.stack([tensors[key] for tensors in snapshots], dim=1) for key in layout.keys}
    found = canonical_trajectory(trained, layout)
    for module in layout.modules:
        lora_a, lora_b = found[module.key("lora_A")], found[module.key("lora_B")]
        assert lora_a.dtype == lora_b.dtype == torch.float32
        updates = trained[module.key("lora_B")].double() @ trained[module.key("lora_A")].double()
        tolerance = ROUNDING[torch.float32] * updates.abs().max().item()
        torch.testing.assert_close(lora_b.double() @ lora_a.double(), updates, rtol=0, atol=tolerance)
        assert not lora_a[:, 0].any() and not lora_b[:, 0].any()
        assert_within_the_bound(lora_a, lora_b, updates)
    for key in layout.head_keys:
        assert torch.equal(found[key], trained[key])


def test_snapshots_in_canonical_forms_of_their_own_would_jump() -> None:
    """Two singular values change places: the order alone tears the factors apart, and alignment does not."""
    times = torch.linspace(-0.05, 0.05, 6, dtype=torch.float64)
    lora_a, lora_b = factors_of([1.0, 1.0])
    lora_a = torch.stack([1 + times, 1 - times], dim=-1).unsqueeze(-1) * lora_a
    lora_b = lora_b.expand(len(times), -1, -1)
    updates = lora_b @ lora_a
    alone_a, alone_b = canonical_factors(lora_a, lora_b)
    with pytest.raises(AssertionError):
        assert_within_the_bound(alone_a, alone_b, updates)
    aligned = align_factors(lora_a, lora_b, alone_a[-1:], alone_b[-1:])
    assert_within_the_bound(*aligned, updates)
    steps = stacked(aligned).diff(dim=0)
    assert squared_norm(steps).max() < 1e-3 < 1 < squared_norm(stacked((alone_a, alone_b)).diff(dim=0)).max()


def test_a_trajectory_ends_in_the_canonical_form_and_leaves_its_input_alone() -> None:
    layout = AdapterLayout.from_model(tiny_backbone().model, tiny_lora_config())
    tensors = random_adapters(layout, 4)
    before = {key: value.clone() for key, value in tensors.items()}
    found = canonical_trajectory(tensors, layout)
    assert list(found) == list(tensors)
    for key, value in before.items():
        assert torch.equal(tensors[key], value) and found[key].shape == value.shape
    for module in layout.modules:
        keys = module.key("lora_A"), module.key("lora_B")
        last = canonical_factors(before[keys[0]][-1], before[keys[1]][-1])
        assert torch.equal(found[keys[0]][-1], last[0]) and torch.equal(found[keys[1]][-1], last[1])
    del tensors[layout.modules[0].key("lora_B")]
    with pytest.raises(KeyError, match="lora_B"):
        canonical_trajectory(tensors, layout)
