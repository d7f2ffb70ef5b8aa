"""What a call of the pipeline refuses before any work is done."""

import math
from typing import Any

import torch

from ..adapters.codec import AdapterCodec
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder


COMBINE = ("first", "mean", "select")
OUTPUT_TYPES = ("peft", "pt", "latent")


def check_components(denoiser: MCDiDenoiser, task_encoder: TaskEncoder, codec: AdapterCodec) -> None:
    """Refuse components that were made for adapters of different ranks, targets or widths, naming what differs."""
    layout = codec.layout
    wanted = MCDiDenoiser.sizes_of(layout) | {"feature_dim": layout.feature_dim, "cond_dim": task_encoder.config.dim}
    found = {key: getattr(denoiser.config, key) for key in ("tokens", "token_dim", "head_width", "cond_dim")}
    found["feature_dim"] = task_encoder.config.feature_dim
    found["tokens"] = [list(token) for token in found["tokens"]]
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        parts = [f"{key}: {_short(found[key])} there, {_short(wanted[key])} in the codec" for key in differing]
        raise ValueError(
            f"The denoiser and the task encoder are for adapters of another layout than the codec ({'; '.join(parts)}): "
            f"expected rank, targets and backbone to be the same. Take all components from one pipeline."
        )


def _short(value: Any) -> str:
    return f"{len(value)} tokens" if isinstance(value, list) else str(value)


def check_counts(supports: list[dict], conditions: list[dict] | None, num_candidates: int, generator: Any) -> None:
    """Refuse conditions with other numbers of classes, less than one candidate, too few or many generators."""
    ways = [len(one) for one in supports]
    if conditions is not None and [len(one) for one in conditions] != ways:
        raise ValueError(
            f"The conditions have {[len(one) for one in conditions]} classes, the support sets {ways}: expected the "
            "same."
        )
    if not isinstance(num_candidates, int) or num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}: expected a whole number from 1 on.")
    if isinstance(generator, list) and len(generator) != len(supports):
        raise ValueError(f"There are {len(generator)} generators for {len(supports)} support sets.")


def check_settings(
    combine: str, temperature: float, strength: float, output_type: str, refine_steps: int, batch_size: int
) -> None:
    """Refuse unknown names, numbers below what they count from, and what no tokens can say."""
    if combine not in COMBINE:
        raise ValueError(f"combine is {combine!r}: expected one of {', '.join(map(repr, COMBINE))}.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: expected 0 or more.")
    if not math.isfinite(strength):
        raise ValueError(f"strength is {strength}: expected a finite number.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}: expected one of {', '.join(map(repr, OUTPUT_TYPES))}.")
    if refine_steps < 0 or batch_size < 1:
        raise ValueError(
            f"refine_steps is {refine_steps} and batch_size {batch_size}: expected 0 or more, and 1 or more."
        )
    if output_type == "latent" and (combine == "select" or refine_steps):
        raise ValueError(
            "output_type='latent' gives tokens, which cannot say the frozen backbone, that combine='select' may choose, "
            "nor a refined adapter: take 'peft' or 'pt'."
        )


def check_latents(latents: torch.Tensor, codec: AdapterCodec, supports: list[dict], num_candidates: int) -> None:
    """Refuse starting noise of another shape than the adapters' tokens."""
    tokens = codec.num_tokens(max(len(one) for one in supports))
    shape = (len(supports) * num_candidates, tokens, codec.layout.token_dim)
    if latents.shape != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}: expected {shape}.")


def check_ready(supports: list[dict], combine: str, imprint_from: str, refine_steps: int) -> None:
    """Refuse ready features where the examples themselves are needed."""
    ready = isinstance(next(iter(supports[0].values())), torch.Tensor)
    if ready and (combine == "select" or imprint_from == "generated" or refine_steps):
        raise ValueError(
            "combine='select', imprint_from='generated' and refine_steps need examples: ready features say nothing of "
            "other adapters than the mean."
        )


def check_finite(tensors: dict[str, torch.Tensor], first: int) -> None:
    """Refuse to hand out adapters that hold NaN or inf, naming their tasks, which are counted from `first` on."""
    finite = torch.stack([torch.isfinite(value).flatten(1).all(dim=1) for value in tensors.values()]).all(dim=0)
    if not finite.all():
        tasks = [first + task for task in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"The adapters of the tasks {tasks} hold NaN or inf. Features of the support that are far larger than the "
            "backbone's make that, and a learning rate that is too high."
        )


def check_callback(names: list[str], known: list[str]) -> None:
    """Refuse names of tensors that a callback cannot have."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}: expected some of {known}.")
