"""Controls that know training adapters but no task: noise around them, and samples of the Gaussian fitted to them."""

import torch


def noised(
    tensors: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    relative_scale: float,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Add Gaussian noise to adapters, as wide, key by key, as training adapters lie around their mean.

    The control that asks whether a generator does more than recall a training adapter and blur it (Zeng et al. 2025,
    "Generative Modeling of Weights: Generalization or Memorization?", arXiv 2506.07998).

    Args:
        tensors (`dict[str, torch.Tensor]`): The adapters, key -> `(adapters, *shape)`.
        reference (`dict[str, torch.Tensor]`): The training adapters, key -> `(training adapters, *shape)`.
        relative_scale (`float`): The noise's standard deviation over the training adapters' own, which is one number a
            key: the root mean square, over adapters and elements, of their difference from the mean adapter.
        generator (`torch.Generator`, *optional*): Of the noise.

    Returns:
        Key -> `(adapters, *shape)`.
    """
    result = {}
    for key, value in tensors.items():
        deviation = (reference[key] - reference[key].mean(dim=0)).square().mean().sqrt()
        noise = torch.randn(value.shape, generator=generator).to(value)
        result[key] = value + relative_scale * deviation.to(value) * noise
    return result


def pca_samples(
    adapters: dict[str, torch.Tensor],
    num_samples: int,
    num_components: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Sample adapters from the Gaussian that fits training adapters along their principal components.

    Its mean is theirs; its covariance is their sample covariance, cut to the components of greatest variance.

    Args:
        adapters (`dict[str, torch.Tensor]`): The training adapters, key -> `(training adapters, *shape)`.
        num_samples (`int`): How many to draw.
        num_components (`int`, *optional*): The principal components taken; all of them, one less than there are
            training adapters, without it.
        generator (`torch.Generator`, *optional*): Of the samples.

    Returns:
        Key -> `(num_samples, *shape)`.
    """
    flat = torch.cat([value.flatten(1) for value in adapters.values()], dim=1)
    most = len(flat) - 1
    num_components = most if num_components is None else num_components
    if not 1 <= num_components <= most:
        raise ValueError(
            f"num_components is {num_components}: expected 1 to {most}, one less than the {len(flat)} training adapters."
        )
    mean = flat.mean(dim=0)
    centred = flat - mean
    # With centred = U S V^T, a draw of V S z / sqrt(n - 1) is z U^T centred / sqrt(n - 1): U is had from a product of
    # n rows and n columns, and the long V is never made.
    _, vectors = torch.linalg.eigh(centred @ centred.T)  # least variance first
    draws = torch.randn(num_samples, num_components, generator=generator).to(flat)
    samples = mean + draws @ vectors[:, -num_components:].T @ centred / most**0.5
    parts = samples.split([value[0].numel() for value in adapters.values()], dim=1)
    return {key: part.unflatten(1, value.shape[1:]) for (key, value), part in zip(adapters.items(), parts)}
