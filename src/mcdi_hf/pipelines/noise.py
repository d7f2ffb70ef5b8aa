"""Whose noise is whose: a stream for every task, so that no adapter depends on its neighbours."""

import torch
from diffusers.utils.torch_utils import randn_tensor


def task_generators(
    generator: torch.Generator | list[torch.Generator] | None, num_tasks: int
) -> list[torch.Generator]:
    """A stream of noise for every task, so that none depends on its neighbours or on how tasks are batched.

    Args:
        generator (`torch.Generator` or a list of one a task, *optional*): A list is what is wanted already, and so is
            the generator of one task. For several tasks one generator, or PyTorch's own by default, gives the seeds.
        num_tasks (`int`): The number of tasks.
    """
    if isinstance(generator, list):
        return generator
    if generator is not None and num_tasks == 1:
        return [generator]
    device = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**62, (num_tasks,), generator=generator, device=device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def seed_of(generator: torch.Generator) -> int | None:
    """The seed of a generator that has drawn nothing yet. Another one cannot be made again from its seed."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return generator.initial_seed() if fresh.get_state().equal(generator.get_state()) else None


def draw_noise(
    shape: tuple[int, int, int],
    sizes: list[int],
    generators: list[torch.Generator],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise of a shape `(rows, tokens, token_dim)`, each row drawn at its own number of tokens and zero behind it.

    Rows that share a generator take turns. With one of its own a row's noise is the same in any batch.
    """
    noise = torch.zeros(shape, dtype=dtype, device=device)
    for row, size, generator in zip(noise, sizes, generators):
        row[:size] = randn_tensor((size, shape[2]), generator, device, dtype)
    return noise
