"""Whose noise is whose: a stream for every task, so that no adapter depends on its neighbours."""

import torch
from diffusers.utils.torch_utils import randn_tensor


def task_generators(
    generator: torch.Generator | list[torch.Generator] | None, num_tasks: int
) -> list[torch.Generator]:
    """A stream of noise for every task, so that none depends on its neighbours or on how tasks are batched. A list
    holds one per task. A single one seeds them, unless it is fresh and there is one task, which it serves; without it
    PyTorch's own does. So the seed of every task is known."""
    if isinstance(generator, list):
        return generator
    if generator is not None and num_tasks == 1 and seed_of(generator) is not None:
        return [generator]
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (num_tasks,), generator=generator, device=device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def seed_of(generator: torch.Generator) -> int | None:
    """The seed of a generator that has drawn nothing yet. Another one cannot be made again from its seed."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if fresh.get_state().equal(generator.get_state()) else None


def draw_noise(dtype: torch.dtype, filled: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Standard noise for the tokens of adapters, `(rows, num_tokens, token_dim)`, each row from its task's generator.
    Rows that share a generator take turns. `filled` is the codec's."""
    return torch.stack([randn_tensor(filled.shape, generator, filled.device, dtype) for generator in generators])
