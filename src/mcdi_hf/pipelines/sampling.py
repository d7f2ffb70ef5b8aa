"""The part of the pipeline that samples: noise, the scheduler's steps, and whose noise is whose."""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor


class SamplingMixin:
    """Samples the tokens of adapters, for a pipeline with a `denoiser`, a `task_encoder`, a `codec` and a `scheduler`."""

    @torch.no_grad()
    def sample(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        class_mask: torch.Tensor,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> torch.Tensor:
        """Sample the tokens of adapters, one for each row of a condition.

        Args:
            features (`torch.Tensor` of shape `(rows, examples, feature_dim)`):
                The support as the head reads it under the mean adapter.
            labels (`torch.Tensor` of shape `(rows, examples)`):
                Its classes from 0; -1 marks padding.
            class_mask (`torch.Tensor` of shape `(rows, classes)`):
                False marks padding.
            num_inference_steps, temperature, eta, callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`MCDiPipeline.__call__`].
            generator (`torch.Generator` or a list of one a row, *optional*):
                Makes the result reproducible. A row's noise has the size of its own task, so with a generator of its
                own it is the same in any batch.
            latents (`torch.Tensor` of shape `(rows, tokens, token_dim)`, *optional*):
                The starting noise, instead of drawing it.

        Returns:
            `torch.Tensor` of shape `(rows, tokens, token_dim)`.
        """
        dtype, device = self.denoiser.dtype, features.device  # to ask diffusers for it takes a millisecond
        task = self.task_encoder(features.to(dtype), labels, class_mask)
        if latents is None:
            latents = self._draw_noise(class_mask, generator, dtype, device)
        latents = latents.to(device, dtype) * (self.scheduler.init_noise_sigma * temperature)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        noise = torch.zeros_like(latents)
        for i, t in enumerate(self.scheduler.timesteps):
            output = self.denoiser(latents, t, task.class_tokens, task.task_token, class_mask).sample
            if eta > 0 and temperature > 0:
                noise = temperature * self._draw_noise(class_mask, generator, dtype, device)
            latents = self.scheduler.step(output, t, latents, eta=eta, variance_noise=noise).prev_sample
            if callback_on_step_end is not None:
                tensors = {}
                for name in callback_on_step_end_tensor_inputs:
                    tensors[name] = locals()[name]
                latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)
        return latents

    def _draw_noise(self, class_mask, generator, dtype, device) -> torch.Tensor:
        """Noise of shape `(rows, tokens, token_dim)`, each row at its own task's size and zero behind it."""
        generators = generator if isinstance(generator, list) else [generator] * len(class_mask)
        tokens, width = self.codec.num_tokens(class_mask.shape[1]), self.codec.layout.token_dim
        noise = torch.zeros(len(class_mask), tokens, width, dtype=dtype, device=device)
        sizes = [self.codec.num_tokens(ways) for ways in class_mask.sum(dim=1).tolist()]
        for row, size, own in zip(noise, sizes, generators):
            row[:size] = randn_tensor((size, width), own, device, dtype)
        return noise


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
