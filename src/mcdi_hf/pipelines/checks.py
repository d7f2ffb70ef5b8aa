"""What a call of the pipeline refuses before any work is done."""

import inspect
import math
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..adapters.codec import AdapterCodec
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from .pipeline_output import MCDiPipelineOutput


OUTPUT_TYPES = ("peft", "pt", "latent")
STRENGTHS = 2  # what is generated, gone on as far again, is no adapter


def check_components(denoiser: MCDiDenoiser, task_encoder: TaskEncoder, codec: AdapterCodec) -> None:
    """Refuse components that were made for adapters of different ranks, targets or widths, naming what differs."""
    layout, pooling = codec.layout, codec.config.base_model["pooling"]
    if not layout.head_keys and pooling != "last_token":
        raise ValueError(
            f"The codec's adapters have no head: expected a causal language model, whose pooling is 'last_token'; got "
            f"{pooling!r}."
        )
    wanted = MCDiDenoiser.sizes_of(layout) | {"cond_dim": task_encoder.config.dim}
    found = {key: getattr(denoiser.config, key) for key in ("tokens", "token_dim", "cond_dim")}
    for name, size in (("num_tokens", len(layout.modules)), ("token_dim", layout.token_dim)):
        wanted[f"{name} of the task encoder"] = size
        found[f"{name} of the task encoder"] = task_encoder.config[name]
    found["tokens"] = [list(token) for token in found["tokens"]]
    if differing := [key for key in wanted if wanted[key] != found[key]]:
        parts = [f"{key}: {_short(found[key])} there, {_short(wanted[key])} in the codec" for key in differing]
        raise ValueError(
            f"The denoiser and the task encoder are for adapters of another layout than the codec ({'; '.join(parts)}): "
            f"expected rank, targets and backbone to be the same. Take all components from one pipeline."
        )


def _short(value: Any) -> str:
    return f"{len(value)} tokens" if isinstance(value, list) else str(value)


def check_settings(
    num_candidates: int,
    num_inference_steps: int,
    strength: float,
    temperature: float,
    eta: float,
    batch_size: int,
    output_type: str,
) -> None:
    """Refuse unknown names and numbers below what they count from."""
    counts = {"num_candidates": num_candidates, "num_inference_steps": num_inference_steps, "batch_size": batch_size}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} is {count}: expected a whole number from 1 on.")
    if not 0 <= strength < STRENGTHS:
        raise ValueError(
            f"strength is {strength}: expected 0, the shared adapter, to below {STRENGTHS}; 1 is as generated."
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: expected 0 or more.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: expected 0 to 1.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}: expected one of {', '.join(map(repr, OUTPUT_TYPES))}.")


def check_generators(
    generator: torch.Generator | list[torch.Generator] | None,
    scheduler: SchedulerMixin,
    num_tasks: int,
    temperature: float,
) -> None:
    """Refuse what is no generator or one for other tasks, and a temperature for a scheduler that draws its own noise."""
    given = generator if isinstance(generator, list) else [generator] * (generator is not None)
    if wrong := [one for one in given if not isinstance(one, torch.Generator)]:
        raise ValueError(f"generator is {wrong[0]!r}: expected a torch.Generator, such as torch.manual_seed(0).")
    if isinstance(generator, list) and len(generator) != num_tasks:
        raise ValueError(f"There are {len(generator)} generators for {num_tasks} support sets.")
    if temperature != 1 and not takes_noise(scheduler):
        raise ValueError(
            f"temperature is {temperature}: {type(scheduler).__name__} draws its own noise, so expected 1."
        )


def takes_noise(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler's `step` takes `eta` and noise that is drawn already, as ours and DDIM's do and DDPM's does not."""
    return {"eta", "variance_noise"} <= set(inspect.signature(scheduler.step).parameters)


def check_finite(tensors: dict[str, torch.Tensor], first: int) -> None:
    """Refuse to hand out adapters that hold NaN or inf, naming their tasks, which are counted from `first` on."""
    finite = torch.stack([torch.isfinite(value).flatten(1).all(dim=1) for value in tensors.values()]).all(dim=0)
    if not finite.all():
        tasks = [first + task for task in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"The adapters of the tasks {tasks} hold NaN or inf. Features of the support that are far larger than the "
            "backbone's make that, and a learning rate that is too high."
        )


def check_continues(output: MCDiPipelineOutput, name: str) -> None:
    """Refuse to go on from what was returned without adapters."""
    if isinstance(output.adapters, torch.Tensor):
        raise ValueError(f"{name} needs adapters: call the pipeline with output_type='peft'.")
