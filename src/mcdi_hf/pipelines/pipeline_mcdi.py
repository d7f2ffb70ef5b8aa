"""The pipeline: from a support set to a PEFT adapter."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..adapters.codec import AdapterCodec
from ..adapters.completion import complete_adapters
from ..adapters.generated import GeneratedAdapter
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .backbone import BackboneMixin
from .inputs import check_callback, check_counts, check_latents, check_ready, check_settings
from .loading import CheckedLoadingMixin
from .pipeline_output import MCDiPipelineOutput
from .support import Support, SupportBatch


IMPRINT_FROM = ("mean", "generated")


class MCDiPipeline(CheckedLoadingMixin, BackboneMixin, DiffusionPipeline):
    """Generates LoRA adapters with a classification head for a frozen backbone, from a few labelled examples.

    A causal language model's adapters are LoRA alone: it classifies by the word for a label that it would say next.

    The backbone is no part of the saved pipeline: it is loaded by its name when examples come in, and refused if its
    weights are not those that the generator was trained for.

    Args:
        denoiser ([`MCDiDenoiser`]): Predicts the tokens.
        task_encoder ([`TaskEncoder`]): Encodes the support set.
        codec ([`AdapterCodec`]): Turns tokens into adapters.
        scheduler ([`LocalConsistencyScheduler`]): Takes the noise away.
        base_model_name_or_path (`str`, *optional*):
            Where to load the backbone from, if not by the name in the codec's config: a local copy, for instance.
        num_inference_steps (`int`, *optional*, defaults to 20):
            The number of steps that a call takes unless told otherwise.
        strength (`float`, *optional*, defaults to 1.0):
            The strength of a call unless told otherwise.
        imprint_from (`str`, *optional*, defaults to `"mean"`):
            Through which adapter the support is seen when the free part of the head is imprinted: `"mean"`, the mean
            adapter of the training tasks, or `"generated"`, the one that was generated, so that the head follows it.
            That takes a second pass over the support. Adapters without a head have nothing to imprint: `"mean"`.
    """

    model_cpu_offload_seq = "task_encoder->denoiser->codec"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: MCDiDenoiser,
        task_encoder: TaskEncoder,
        codec: AdapterCodec,
        scheduler: LocalConsistencyScheduler,
        base_model_name_or_path: str | None = None,
        num_inference_steps: int = 20,
        strength: float = 1.0,
        imprint_from: str = "mean",
    ) -> None:
        super().__init__()
        if imprint_from not in IMPRINT_FROM:
            raise ValueError(
                f"imprint_from is {imprint_from!r}: expected one of {', '.join(map(repr, IMPRINT_FROM))}."
            )
        if not codec.layout.head_keys and (
            imprint_from != "mean" or codec.config.base_model["pooling"] != "last_token"
        ):
            raise ValueError(
                f"The codec's adapters have no head: expected a causal language model, whose pooling is 'last_token', and "
                f"imprint_from='mean'; got pooling {codec.config.base_model['pooling']!r} and {imprint_from!r}."
            )
        self.register_modules(denoiser=denoiser, task_encoder=task_encoder, codec=codec, scheduler=scheduler)
        self.register_to_config(
            base_model_name_or_path=base_model_name_or_path,
            num_inference_steps=num_inference_steps,
            strength=strength,
            imprint_from=imprint_from,
        )

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        support: Support | list[Support],
        condition: Support | list[Support] | None = None,
        num_candidates: int = 1,
        combine: str = "mean",
        num_inference_steps: int | None = None,
        strength: float | None = None,
        temperature: float = 1.0,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "peft",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> MCDiPipelineOutput | tuple:
        """Generate one adapter for each support set.

        Args:
            support (`dict`, `datasets.Dataset`, or a list of these):
                One task or many. A `dict` maps a label to its examples, see [`as_support_sets`]: texts, pairs of texts
                or PIL images, as the backbone reads them, or ready features of shape `(shots, feature_dim)` as
                [`MCDiPipeline.embed`] makes them. A `Dataset` has one `ClassLabel` column and one of texts or images.
            condition (like `support`, *optional*):
                What the generator sees in place of `support`, with as many classes: for the control that asks whether
                the condition matters. The imprinted head still comes from `support`.
            num_candidates (`int`, *optional*, defaults to 1):
                How many adapters to draw for each task, in one batch.
            combine (`str`, *optional*, defaults to `"mean"`):
                How candidates become one adapter: `"mean"` averages them, `"select"` keeps the one with the lowest
                loss on the support set, which needs examples.
            num_inference_steps (`int`, *optional*):
                Steps of the scheduler; by default what the pipeline's config says.
            strength (`float`, *optional*):
                How far to go from what is free (0: the mean adapter and the imprinted head, exactly) to what is
                generated (1); by default what the pipeline's config says.
            temperature (`float`, *optional*, defaults to 1.0):
                Scale of the starting noise and of the noise of each step; with 0 nothing is random.
            eta (`float`, *optional*, defaults to 1.0):
                1 samples as DDPM does, 0 as DDIM, whose steps add no noise.
            generator (`torch.Generator` or a list of one a task, *optional*):
                Makes the result reproducible; with a list, a task's result does not depend on its neighbours.
            latents (`torch.Tensor` of shape `(tasks * num_candidates, tokens, token_dim)`, *optional*):
                The starting noise, instead of drawing it.
            output_type (`str`, *optional*, defaults to `"peft"`):
                `"peft"` for [`GeneratedAdapter`], `"pt"` for flat weights, `"latent"` for tokens.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`MCDiPipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; returns a dict that may replace
                `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                The tensors handed to the callback.

        Returns:
            [`MCDiPipelineOutput`], or a tuple whose first element is its `adapters`.
        """
        # 1. Check everything before any work is done
        check_settings(combine, temperature, output_type)
        supports = self._support_sets(support)
        conditions = None if condition is None else self._support_sets(condition)
        check_counts(supports, conditions, num_candidates, generator)
        if latents is not None:
            check_latents(latents, self.codec, supports, num_candidates)
        check_ready(supports, combine, self.config.imprint_from)
        check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        # 2. See the support sets as features, and these as the condition
        device = self._execution_device
        batch = self._embed_batch(supports, device)
        seen = batch if conditions is None else self._embed_batch(conditions, device)
        rows = torch.arange(len(supports), device=device).repeat_interleave(num_candidates)

        # 3. Draw the starting noise and take it away
        generators = generator if isinstance(generator, list) else [generator] * len(supports)
        latents = self.sample(
            seen.features[rows],
            seen.labels[rows],
            batch.class_mask[rows],
            num_inference_steps,
            temperature,
            eta,
            [one for one in generators for _ in range(num_candidates)],
            latents,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )

        # 4. Make one adapter of a task's candidates, and give it the form asked for
        latents = latents * (self.config.strength if strength is None else strength)
        latents, losses = self._combine(latents.unflatten(0, (len(supports), -1)), supports, batch, combine)
        if output_type == "latent":
            adapters = latents
        else:
            tensors = self.complete(latents, batch)
            if output_type == "pt":
                adapters = torch.cat([value.flatten(1) for value in tensors.values()], dim=1)
            else:
                adapters = self._as_adapters(tensors, supports, self._num_timesteps, num_candidates, losses)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (adapters,)
        return MCDiPipelineOutput(adapters=adapters)

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
        dtype, device = self.denoiser.dtype, self._execution_device
        task = self.task_encoder(features.to(dtype), labels, class_mask)
        if latents is None:
            latents = self._draw_noise(class_mask, generator, dtype, device)
        latents = latents.to(device, dtype) * (self.scheduler.init_noise_sigma * temperature)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        noise = torch.zeros_like(latents)
        with self.progress_bar(total=self._num_timesteps) as progress:
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
                progress.update()
        return latents

    def baseline(self, support: Support) -> GeneratedAdapter:
        """What is free: the mean adapter of the training tasks, with a head imprinted from the support set or words.

        Args:
            support (`dict` or `datasets.Dataset`): One task, see [`MCDiPipeline.__call__`].
        """
        (support,) = self._support_sets(support)
        batch = self._embed_batch([support], self._execution_device)
        tokens = self.codec.mean.new_zeros(1, self.codec.num_tokens(len(support)), self.codec.layout.token_dim)
        return self._as_adapters(self.complete(tokens, batch), [support], 0, 0, None)[0]

    def complete(self, tokens: torch.Tensor, batch: SupportBatch) -> dict[str, torch.Tensor]:
        """Read adapters from sampled tokens, with the free part of their heads, if any, imprinted as the config says.

        Args:
            tokens (`torch.Tensor` of shape `(tasks, tokens, token_dim)`):
                As [`MCDiPipeline.sample`] makes them.
            batch (`SupportBatch`):
                The support sets; their examples are needed to imprint from the generated adapters.

        Returns:
            Key on disk -> `torch.Tensor` of shape `(tasks, *shape)`.
        """
        stacked = self.stacked if self.config.imprint_from == "generated" else None
        return complete_adapters(
            self.codec, tokens, batch.features, batch.labels, batch.class_mask, stacked, batch.examples, batch.rows
        )

    def _draw_noise(self, class_mask, generator, dtype, device) -> torch.Tensor:
        """Noise of shape `(rows, tokens, token_dim)`, each row at its own task's size."""
        generators = generator if isinstance(generator, list) else [generator] * len(class_mask)
        sizes = [self.codec.num_tokens(ways) for ways in class_mask.sum(dim=1).tolist()]
        width = self.codec.layout.token_dim
        draws = [randn_tensor((size, width), own, device, dtype) for size, own in zip(sizes, generators)]
        return torch.nn.utils.rnn.pad_sequence(draws, batch_first=True)

    def _combine(self, latents, supports, batch, combine) -> tuple[torch.Tensor, list[float] | None]:
        """`(tasks, candidates, tokens, token_dim)` -> one candidate a task, and its support loss if it was chosen."""
        if combine == "mean":
            return latents.mean(dim=1), None
        chosen, losses = [], []
        words = self.stacked.word_heads([tuple(support) for support in supports])
        for task, own in enumerate(latents):
            part = batch.repeat(task, len(own))
            head = words and tuple(values[task].expand(len(own), *values.shape[1:]) for values in words)
            tensors, inputs = self.complete(own, part), part.examples[part.rows.flatten()]
            logits = self.stacked.logits(tensors, inputs, part.class_mask, head)
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), part.labels, ignore_index=-1, reduction="none"
            ).sum(dim=1)
            chosen.append(own[loss.argmin()])
            losses.append(loss.min().item() / (part.labels[0] >= 0).sum().item())
        return torch.stack(chosen), losses

    def _as_adapters(self, tensors, supports, num_inference_steps, num_candidates, losses) -> list[GeneratedAdapter]:
        name = self.name_or_path
        if name is not None and Path(name).is_dir():
            name = Path(name).resolve().name  # a card should not tell where a folder lies
        adapters = []
        for task, support in enumerate(supports):
            own = {key: value[task] for key, value in tensors.items()}
            for key in self.codec.layout.head_keys:
                own[key] = own[key][: len(support)]
            adapters.append(
                GeneratedAdapter(
                    tensors={key: value.contiguous().cpu() for key, value in own.items()},
                    lora_config=self.codec.config.lora_config,
                    base_model=self.codec.config.base_model,
                    labels=list(support),
                    details={
                        "generator": name,
                        "shots": [len(examples) for examples in support.values()],
                        "num_inference_steps": num_inference_steps,
                        "num_candidates": num_candidates,
                        "support_loss": None if losses is None else losses[task],
                    },
                )
            )
        return adapters
