"""One representative of all factor pairs of a LoRA update, and a trajectory of updates that moves smoothly in it."""

import torch

from .layout import MATRICES, AdapterLayout


# Singular values this close, relative to the largest, count as equal, and as zero if they are this close to it. Factors
# in float32 know the update to about 1e-7 of it times the condition of their basis: below 1e-5 a gap is rounding, and
# directions told apart by it would be, too. Moving 1e-5 of the update's largest singular value changes no prediction.
RESOLUTION = 1e-5


@torch.no_grad()
def canonical_factors(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The one pair of factors that stands for a LoRA update, whatever basis it was trained in.

    `lora_b @ lora_a` is the same for (B G, G^-1 A) with any invertible G. Of these the balanced pair is taken, B =
    U sqrt(S) and A = sqrt(S) V^T with the update's singular value decomposition U S V^T, largest singular value first.
    That leaves a rotation among equal singular values, which for a single one is its sign. It is chosen so that in
    A W, with W a fixed random projection, the block of every group of equal singular values is upper triangular with a
    positive diagonal.

    Args:
        lora_a (`torch.Tensor` of shape `(..., rank, in_features)`): The factors that read.
        lora_b (`torch.Tensor` of shape `(..., out_features, rank)`): The factors that write.

    Returns:
        The pair `(lora_a, lora_b)` in the shapes and dtypes given, computed in float64. Their product is the update up
        to `RESOLUTION` times its largest singular value. Where a singular value is zero, so are its row of `lora_a`
        and its column of `lora_b`: an adapter that starts with B = 0 has the pair (0, 0).

    Raises:
        `torch.linalg.LinAlgError`: when a factor holds NaN or infinity.
    """
    rank, in_features = lora_a.shape[-2:]
    basis_b, upper_b = torch.linalg.qr(lora_b.double())
    basis_a, upper_a = torch.linalg.qr(lora_a.double().mT)
    left, values, right = torch.linalg.svd(upper_b @ upper_a.mT, full_matrices=False)

    margin = RESOLUTION * values[..., :1]
    scale = torch.where(values > margin, values, 0).sqrt()
    factor_a, factor_b = scale.unsqueeze(-1) * (right @ basis_a.mT), (basis_b @ left) * scale.unsqueeze(-2)

    # The QR of a block-diagonal matrix is block-diagonal: one call rotates every group, and a group of one by a sign.
    starts = values[..., :-1] - values[..., 1:] > margin
    group = torch.nn.functional.pad(starts.cumsum(dim=-1), (1, 0))
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(in_features, rank, dtype=torch.float64, generator=generator).to(lora_a.device)
    seen = factor_a @ projection[:, : values.shape[-1]] * (group.unsqueeze(-1) == group.unsqueeze(-2))
    rotation, upper = torch.linalg.qr(seen)
    rotation = torch.where(upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0, -rotation, rotation)
    factor_a, factor_b = rotation.mT @ factor_a, factor_b @ rotation

    # a rank above the width of the module: the update has fewer singular values than the factors have rows
    spare = rank - values.shape[-1]
    factor_a = torch.nn.functional.pad(factor_a, (0, 0, 0, spare))
    factor_b = torch.nn.functional.pad(factor_b, (0, spare))
    return factor_a.to(lora_a.dtype), factor_b.to(lora_b.dtype)


@torch.no_grad()
def align_factors(
    lora_a: torch.Tensor, lora_b: torch.Tensor, reference_a: torch.Tensor, reference_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The balanced factors of an update that lie closest to those of another one.

    Balanced factors are unique up to a rotation R. It is chosen to minimise `|[B R; (R^T A)^T] - [B*; A*^T]|_F`, the
    orthogonal Procrustes problem (Schoenemann 1966): R = U V^T with the singular value decomposition U S V^T of
    `B^T B* + A A*^T`. It is unique unless that matrix is singular.

    With X = B A and X* = B* A*, and the reference balanced and of full rank r, the distance left obeys

        `distance^2 <= |X - X*|_F^2 / ((sqrt(2) - 1) sigma_r(X*))`,

    so that updates which are close have factors which are close. It is Lemma 5.4 of Tu et al. 2016 ("Low-rank Solutions
    of Linear Matrix Equations via Procrustes Flow"), `2 (sqrt(2) - 1) sigma_r(Z*)^2 distance^2 <= |Z Z^T - Z* Z*^T|_F^2`
    for any Z, at Z = [B; A^T]: for balanced factors `sigma_r(Z*)^2 = 2 sigma_r(X*)` and
    `|Z Z^T - Z* Z*^T|_F^2 <= 4 |X - X*|_F^2`.

    Args:
        lora_a (`torch.Tensor` of shape `(..., rank, in_features)`): The update's factors A, in any basis.
        lora_b (`torch.Tensor` of shape `(..., out_features, rank)`): The update's factors B.
        reference_a, reference_b (`torch.Tensor`): The factors A* and B* to come close to, of shapes that broadcast;
            see [`canonical_factors`].

    Returns:
        The pair `(lora_a, lora_b)` in the dtypes given, with the product that [`canonical_factors`] leaves.

    Raises:
        `torch.linalg.LinAlgError`: when a factor holds NaN or infinity.
    """
    balanced_a, balanced_b = canonical_factors(lora_a.double(), lora_b.double())
    cross = balanced_b.mT @ reference_b.double() + balanced_a @ reference_a.double().mT
    left, _, right = torch.linalg.svd(cross)
    rotation = left @ right
    return (rotation.mT @ balanced_a).to(lora_a.dtype), (balanced_b @ rotation).to(lora_b.dtype)


def canonical_trajectory(tensors: dict[str, torch.Tensor], layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Bring the end of every trajectory into its canonical form and the snapshots before it as close as they come.

    A generator that learns weights then sees one representative of each task's update, and a trajectory that moves
    only as far as the update does, see [`align_factors`]. Snapshots in canonical forms of their own would jump wherever
    two singular values change places. A snapshot of lower rank than the layout's is no exception: at the common start
    with B = 0 both factors are zero. Training cannot go on from there: the A of that start is no part of the update.

    Args:
        tensors (`dict[str, torch.Tensor]`): Key on disk -> `(..., snapshots, *shape)`, in the order of training.
        layout (`AdapterLayout`): The layout of the adapters.

    Returns:
        `dict[str, torch.Tensor]`: New LoRA matrices in the same shapes and dtypes; other tensors, as the head's, are
        passed on as they are.

    Raises:
        `KeyError`: when a LoRA matrix of the layout is missing.
        `torch.linalg.LinAlgError`: when a LoRA matrix holds NaN or infinity.
    """
    tensors = dict(tensors)
    for module in layout.modules:
        keys = [module.key(matrix) for matrix in MATRICES]
        # a LoRA matrix has two dimensions, so the snapshots are the third from the right
        earlier_a, earlier_b = (tensors[key][..., :-1, :, :] for key in keys)
        last = canonical_factors(*(tensors[key][..., -1:, :, :] for key in keys))
        earlier = align_factors(earlier_a, earlier_b, *last)
        tensors |= {key: torch.cat(pair, dim=-3) for key, pair in zip(keys, zip(earlier, last))}
    return tensors
