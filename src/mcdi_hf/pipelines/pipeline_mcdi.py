"""The pipeline: from a support set to a PEFT adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..adapters.codec import AdapterCodec
from ..adapters.generated import GeneratedAdapter
from ..adapters.head import class_means, imprint_head
from ..adapters.stacked import StackedLora
from ..backbones import FrozenBackbone
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .support import Support, SupportBatch, as_support_sets


COMBINE = ("mean", "select")
IMPRINT_FROM = ("mean", "generated")


@dataclass
class MCDiPipelineOutput(BaseOutput):
    """
    Args:
        adapters (`list[GeneratedAdapter]` or `torch.Tensor`):
            One a task; a tensor of shape `(tasks, numbers)` for `output_type="pt"` and of shape
            `(tasks, tokens, token_dim)` for `"latent"`.
    """

    adapters: list[GeneratedAdapter] | torch.Tensor


class MCDiPipeline(DiffusionPipeline):
    """Generates LoRA adapters with a classification head for a frozen backbone, from a few labelled examples.

    The backbone is no part of the saved pipeline: it is loaded by its name when texts come in, and refused if its
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
            That takes a second pass over the support.
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
        self.register_modules(denoiser=denoiser, task_encoder=task_encoder, codec=codec, scheduler=scheduler)
        self.register_to_config(
            base_model_name_or_path=base_model_name_or_path,
            num_inference_steps=num_inference_steps,
            strength=strength,
            imprint_from=imprint_from,
        )
        self._backbone: FrozenBackbone | None = None
        self._stacked: StackedLora | None = None

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen backbone, loaded when it is first asked for. Set it to use one that is loaded already."""
        if self._backbone is None:
            base_model = self.codec.config.base_model
            self.backbone = FrozenBackbone.from_pretrained(
                self.config.base_model_name_or_path or base_model["name_or_path"],
                pooling=base_model["pooling"],
                name_or_path=base_model["name_or_path"],
            )
        return self._backbone

    @backbone.setter
    def backbone(self, backbone: FrozenBackbone) -> None:
        self.codec.check_backbone(backbone)
        self._backbone, self._stacked = backbone, None

    @property
    def stacked(self) -> StackedLora:
        """The backbone with room for many adapters, on the pipeline's device."""
        return self._stacked_on(self._execution_device)

    def _stacked_on(self, device: torch.device) -> StackedLora:
        if self._stacked is None or self._stacked.device != device:
            self.backbone.model.to(device)
            self._stacked = StackedLora(self.backbone, self.codec.layout)
        return self._stacked

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
                One task or many. A `dict` maps a label to its examples: texts, or ready features of shape
                `(shots, feature_dim)` as [`MCDiPipeline.embed`] makes them. A `Dataset` has one `ClassLabel` column
                and one column of texts.
            condition (like `support`, *optional*):
                What the generator sees in place of `support`, with as many classes: for the control that asks whether
                the condition matters. The imprinted head still comes from `support`.
            num_candidates (`int`, *optional*, defaults to 1):
                How many adapters to draw for each task, in one batch.
            combine (`str`, *optional*, defaults to `"mean"`):
                How candidates become one adapter: `"mean"` averages them, `"select"` keeps the one with the lowest
                loss on the support set, which needs texts.
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
        width = self.codec.layout.feature_dim
        supports = as_support_sets(support, width)
        conditions = None if condition is None else as_support_sets(condition, width)
        self._check_inputs(
            supports,
            conditions,
            num_candidates,
            combine,
            temperature,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )

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
        latents, losses = self._combine(latents.unflatten(0, (len(supports), -1)), batch, combine)
        if output_type == "latent":
            adapters = latents
        else:
            tensors = self._complete(latents, batch)
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

    @torch.no_grad()
    def embed(self, support: Support) -> dict[str, torch.Tensor]:
        """The features of a support set, to be kept and handed in again in its place.

        Args:
            support (`dict` or `datasets.Dataset`): One task, see [`MCDiPipeline.__call__`].

        Returns:
            Label -> `torch.Tensor` of shape `(shots, feature_dim)`.
        """
        (support,) = as_support_sets(support, self.codec.layout.feature_dim)
        features = self._embed_batch([support], self._execution_device).features[0]
        return dict(zip(support, features.split([len(examples) for examples in support.values()])))

    def baseline(self, support: Support) -> GeneratedAdapter:
        """What is free: the mean adapter of the training tasks with a head imprinted from the support set.

        Args:
            support (`dict` or `datasets.Dataset`): One task, see [`MCDiPipeline.__call__`].
        """
        (support,) = as_support_sets(support, self.codec.layout.feature_dim)
        batch = self._embed_batch([support], self._execution_device)
        count = self.codec.num_lora_tokens + len(support)
        tokens = self.codec.mean.new_zeros(1, count, self.codec.layout.token_dim)
        return self._as_adapters(self._complete(tokens, batch), [support], 0, 0, None)[0]

    def _check_inputs(
        self,
        supports,
        conditions,
        num_candidates,
        combine,
        temperature,
        generator,
        latents,
        output_type,
        callback_tensor_inputs,
    ) -> None:
        ways = [len(one) for one in supports]
        if conditions is not None and [len(one) for one in conditions] != ways:
            raise ValueError(
                f"The conditions have {[len(one) for one in conditions]} classes, the support sets {ways}: expected "
                "the same."
            )
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}: expected at least 1.")
        if combine not in COMBINE:
            raise ValueError(f"combine is {combine!r}: expected one of {', '.join(map(repr, COMBINE))}.")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: expected 0 or more.")
        layout = self.codec.layout
        shape = (len(supports) * num_candidates, self.codec.num_lora_tokens + max(ways), layout.token_dim)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: expected {shape}.")
        if output_type not in ("peft", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: expected 'peft', 'pt' or 'latent'.")
        if isinstance(generator, list) and len(generator) != len(supports):
            raise ValueError(f"There are {len(generator)} generators for {len(supports)} support sets.")
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}: expected some of {self._callback_tensor_inputs}."
            )
        ready = isinstance(next(iter(supports[0].values())), torch.Tensor)
        if ready and (combine == "select" or self.config.imprint_from == "generated"):
            raise ValueError(
                "combine='select' and imprint_from='generated' need examples: ready features say nothing of other "
                "adapters than the mean."
            )

    def _embed_batch(self, supports: list[dict], device: torch.device) -> SupportBatch:
        groups = [examples for support in supports for examples in support.values()]
        if isinstance(groups[0], torch.Tensor):
            return SupportBatch.pad(supports, torch.cat(groups).to(device))
        stacked = self._stacked_on(device)
        examples = stacked.encode([text for group in groups for text in group])
        features = stacked.features_of_all(self.codec.mean_adapter(), examples)
        return SupportBatch.pad(supports, features, examples)

    def complete(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        inputs: dict[str, torch.Tensor] | None,
        labels: torch.Tensor,
        class_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Read adapters from sampled tokens, with the free part of their heads imprinted as the config says.

        Args:
            tokens (`torch.Tensor` of shape `(rows, tokens, token_dim)`):
                As [`MCDiPipeline.sample`] makes them.
            features, labels, class_mask:
                As in [`MCDiPipeline.sample`].
            inputs (`dict[str, torch.Tensor]`, *optional*):
                The upper layers' inputs for the `rows * examples` support examples, padding included; needed to
                imprint from the generated adapter.

        Returns:
            Key on disk -> `torch.Tensor` of shape `(rows, *shape)`.
        """
        scale = self.codec.config.imprint_scale
        if self.config.imprint_from == "mean":
            means = class_means(features, labels, class_mask.shape[1]).to(self.codec.mean.dtype)
            head = imprint_head(means, scale, class_mask)
        else:
            head = self.stacked.imprint(self.codec.decode_matrices(tokens), inputs, labels, class_mask, scale)
        return self.codec.decode(tokens, head)

    def _complete(self, tokens: torch.Tensor, batch: SupportBatch) -> dict[str, torch.Tensor]:
        inputs = None if self.config.imprint_from == "mean" else batch.examples[batch.rows.flatten()]
        return self.complete(tokens, batch.features, inputs, batch.labels, batch.class_mask)

    def _draw_noise(self, class_mask, generator, dtype, device) -> torch.Tensor:
        """Noise of shape `(rows, tokens, token_dim)`, each row at its own task's size."""
        generators = generator if isinstance(generator, list) else [generator] * len(class_mask)
        sizes = [self.codec.num_lora_tokens + ways for ways in class_mask.sum(dim=1).tolist()]
        width = self.codec.layout.token_dim
        draws = [randn_tensor((size, width), own, device, dtype) for size, own in zip(sizes, generators)]
        return torch.nn.utils.rnn.pad_sequence(draws, batch_first=True)

    def _combine(self, latents, batch, combine) -> tuple[torch.Tensor, list[float] | None]:
        """`(tasks, candidates, tokens, token_dim)` -> one candidate a task, and its support loss if it was chosen."""
        if combine == "mean":
            return latents.mean(dim=1), None
        chosen, losses = [], []
        for task, own in enumerate(latents):
            part = batch.repeat(task, len(own))
            logits = self.stacked.logits(
                self._complete(own, part), part.examples[part.rows.flatten()], part.class_mask
            )
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
