"""Diagnostics of a generator in training: what it gets wrong, segment by segment and layer by layer."""

import torch

from ..pipelines.pipeline_mcdi import MCDiPipeline
from .objective import ConditionalDenoiser, TrainingBatch, local_consistency_losses


@torch.no_grad()
def diagnose(pipe: MCDiPipeline, batches: list[TrainingBatch], seed: int = 0) -> dict[str, float]:
    """Measure a generator on some draws of training tasks; the same draws and seed give comparable numbers.

    `loss, segment I` is the local consistency loss of each segment. `norm, layer I` are the norms of the generated
    tokens over those of the true ones: 1 is right, 0 says that nothing is generated. `not finite` is the share of
    generated numbers that are NaN or infinite.
    """
    model = ConditionalDenoiser(pipe.task_encoder, pipe.denoiser)
    found, segments, true, made, broken = [], [], [], [], []
    layers = torch.tensor([token.layer for token in pipe.codec.layout.tokens])
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(seed + number)
        losses, chosen = local_consistency_losses(model, pipe.scheduler, batch, generator)
        found.append(losses)
        segments.append(chosen)
        settings = {"strength": 1.0, "batch_size": len(batch.support), "output_type": "latent"}
        tokens = pipe(batch.support, generator=generator, **settings).adapters
        broken.append((~torch.isfinite(tokens)).float().mean())
        true.append(_squares(batch.targets[:, -1], layers))
        made.append(_squares(tokens * batch.filled, layers))
    found, segments = torch.cat(found), torch.cat(segments)
    result = {f"loss, segment {i}": found[segments == i].mean().item() for i in segments.unique().tolist()}
    ratios = (torch.stack(made).sum(dim=0) / torch.stack(true).sum(dim=0)).sqrt().tolist()
    result |= {f"norm, layer {layer}": ratio for layer, ratio in zip(layers.unique().tolist(), ratios)}
    return result | {"not finite": torch.stack(broken).mean().item()}


def _squares(tokens: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each layer's tokens: `(layers,)`."""
    squares = tokens.square().sum(dim=(0, 2))
    return torch.stack([squares[layers.to(squares.device) == layer].sum() for layer in layers.unique()])
