"""The pipeline: from a support set to a PEFT adapter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Self

import torch
from diffusers import DiffusionPipeline

from ..adapters.codec import AdapterCodec
from ..adapters.condition import see_support
from ..adapters.generated import GenerationDetails
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from ..data.episodes import SupportBatch
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .checks import (
    check_components,
    check_finite,
    check_generators,
    check_settings,
    takes_noise,
)
from .loading import backbone_place, download_checked, load_checked, save_whole
from .noise import draw_noise, seed_of, task_generators
from .pipeline_output import Draws, MCDiPipelineOutput, described_adapters
from .support import Support, SupportSet, as_support_sets, check_readable, encode_examples
from .use import AdapterUseMixin


MAX_VIEWS = 64  # of a support example: a forged pipeline could ask for more than there is memory


class MCDiPipeline(AdapterUseMixin, DiffusionPipeline):
    """Generates LoRA adapters with a classification head for a frozen backbone, from a few labelled examples.

    A causal language model's adapters are LoRA alone: it classifies by the label that it would say next.
    The backbone is no part of the saved pipeline: it is loaded by its name when examples come in, and refused if its
    weights are not those that the generator was trained for.

    Args:
        denoiser ([`MCDiDenoiser`]): Predicts the tokens.
        task_encoder ([`TaskEncoder`]): Encodes the support set.
        codec ([`AdapterCodec`]): Turns tokens into adapters.
        scheduler ([`LocalConsistencyScheduler`]): Takes the noise away.
        base_model_name_or_path (`str`, *optional*): Where to load the backbone from, if not by the name in the codec's
            config: a local copy, for instance. What begins with `./` lies in the pipeline's own folder or repository.
        num_inference_steps (`int`, *optional*, defaults to 20): Steps of a call unless told otherwise.
        strength (`float`, *optional*, defaults to 1.0): Strength of a call unless told otherwise.
        support_views (`int`, *optional*, defaults to 1): How many views of a support example heads are made of: with
            more than 1, images moved a little, texts short of a word, see [`augmented_views`].
        trained_ways, trained_shots (`list[int]`, *optional*): The least and the greatest number of classes, and of
            examples of a class, in training. A record: others are served, too.

    Attributes:
        revision (`str`, *optional*): The commit of the Hub that the pipeline was loaded from.

    Example: `MCDiPipeline.from_pretrained("model_cards/mcdi-minilm-text")({"yes": ["sure"], "no":
    ["never"]}).adapters[0]`
    """

    revision: str | None = None
    model_cpu_offload_seq = "task_encoder->denoiser"
    _exclude_from_cpu_offload = ["codec"]  # it has no forward pass
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: MCDiDenoiser,
        task_encoder: TaskEncoder,
        codec: AdapterCodec,
        scheduler: LocalConsistencyScheduler,
        base_model_name_or_path: Optional[str] = None,  # diffusers 0.36 cannot read the type `str | None`
        num_inference_steps: int = 20,
        strength: float = 1.0,
        support_views: int = 1,
        trained_ways: Optional[list] = None,
        trained_shots: Optional[list] = None,
    ) -> None:
        super().__init__()
        check_components(denoiser, task_encoder, codec)
        if not 1 <= support_views <= MAX_VIEWS:
            raise ValueError(f"support_views is {support_views}: expected 1 to {MAX_VIEWS}.")
        self.register_modules(denoiser=denoiser, task_encoder=task_encoder, codec=codec, scheduler=scheduler)
        self.register_to_config(
            base_model_name_or_path=base_model_name_or_path,
            num_inference_steps=num_inference_steps,
            strength=strength,
            support_views=support_views,
            trained_ways=trained_ways,
            trained_shots=trained_shots,
        )
        self._backbone: FrozenBackbone | None = None
        self._stacked: StackedLora | None = None

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen backbone, loaded when it is first asked for. Set it to use one that is loaded already."""
        if self._backbone is None:
            self.backbone = FrozenBackbone.of(self.codec.config.base_model, backbone_place(self))
        return self._backbone

    @backbone.setter
    def backbone(self, backbone: FrozenBackbone) -> None:
        self.codec.check_backbone(backbone)
        self._backbone, self._stacked = backbone, None

    @property
    def stacked(self) -> StackedLora:
        """The backbone with room for many adapters, on the pipeline's device."""
        device = self._execution_device
        if self._stacked is None or self._stacked.device != device:
            self.backbone.model.to(device)
            self._stacked = StackedLora(self.backbone, self.codec.layout)
        return self._stacked

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave the denoising loop, as in diffusers' own pipelines: what is
        returned then is half denoised."""
        return self._interrupt

    @property
    def _public_name(self) -> str | None:
        """The Hub id or the folder's last name: a card should not tell where a folder lies."""
        name = self.name_or_path
        return Path(name).resolve().name if name is not None and Path(name).is_dir() else name

    @torch.no_grad()
    def __call__(
        self,
        support: Support | list[Support] | SupportBatch,
        num_candidates: int = 1,
        num_inference_steps: int | None = None,
        strength: float | None = None,
        temperature: float = 1.0,
        eta: float = 1.0,
        batch_size: int = 64,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "peft",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> MCDiPipelineOutput | tuple:
        """Generate one adapter for each support set.

        Args:
            support (`dict`, `datasets.Dataset`, a list of these, or [`SupportBatch`]): One task or many. A `dict` maps
                a label to its examples, see [`as_support_sets`]: texts, pairs of texts or PIL images, as the backbone
                reads them. A `Dataset` has one `ClassLabel` column and one of texts or images. A [`SupportBatch`] is
                what [`MCDiPipeline.encode_support`] made of some tasks.
            num_candidates (`int`, *optional*, defaults to 1): How many adapters to draw for each task, in one batch. A
                task's adapter is their mean, in the basis of the shared start, which all of them are written in.
                [`MCDiPipeline.select`] chooses among them.
            num_inference_steps (`int`, *optional*): Steps of the scheduler; by default what the pipeline's config
                says.
            strength (`float`, *optional*): How far to go from the shared adapter (0, exactly) to what is generated (1);
                by default what the pipeline's config says.
            temperature (`float`, *optional*, defaults to 1.0): Scale of the starting noise and of the noise of each
                step; with 0 nothing is random.
            eta (`float`, *optional*, defaults to 1.0): 1 samples as DDPM does, 0 as DDIM, whose steps add no noise.
            batch_size (`int`, *optional*, defaults to 64): How many tasks are worked on at once. Results do not depend
                on it. What `select` and `refine` go on from is kept for all tasks.
            generator (`torch.Generator` or a list of one a task, *optional*): Makes the result reproducible. Every
                task has a stream of noise of its own, so that its result does not depend on its neighbours: its
                generator in a list, or one that is seeded from the one generator given.
            latents (`torch.Tensor` of shape `(tasks * num_candidates, num_tokens, token_dim)`, *optional*): The starting
                noise, instead of drawing it.
            output_type (`str`, *optional*, defaults to `"peft"`): `"peft"` for [`GeneratedAdapter`], `"pt"` for flat
                weights, `"latent"` for tokens.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return a [`MCDiPipelineOutput`] or a
                tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; returns a dict that may replace `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`): The tensors handed
                to the callback.

        Returns:
            [`MCDiPipelineOutput`], or a tuple whose first element is its `adapters`.

        Example:
            >>> pipe(support, num_candidates=8).adapters[0].save_pretrained("my-adapter")
        """
        # 1. Check the inputs before any work is done
        strength = self.config.strength if strength is None else strength
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        check_settings(num_candidates, steps, strength, temperature, eta, batch_size, output_type)
        if unknown := sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}: expected ['latents'].")
        supports, ways = self.check_inputs(support, num_candidates, generator, latents, temperature, output_type)

        # 2. Settle what is the same for all tasks; at strength 0 there is nothing to generate
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps if strength else []
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        owns_noise = takes_noise(self.scheduler)
        generators = task_generators(generator, len(supports))
        seeds = [seed_of(one) if latents is None else None for one in generators]
        settings = {"num_candidates": num_candidates, "num_inference_steps": steps, "strength": strength}
        settings |= {"temperature": temperature, "eta": eta, "batch_size": batch_size}
        draws = Draws(settings, [one.clone_state() for one in generators], latents)
        details = GenerationDetails(
            shots=[],
            generator=self._public_name,
            generator_revision=self.revision,
            num_inference_steps=len(timesteps),
            num_candidates=num_candidates,
        )

        adapters = []
        with self.progress_bar(total=len(supports)) as progress_bar:
            for first in range(0, len(supports), batch_size):
                part = slice(first, first + batch_size)

                # 3. Encode the support; every candidate is a row
                batch = self.encode_support(supports[part], ways)
                seen = batch.features.to(self.denoiser.dtype), batch.gradients.to(self.denoiser.dtype)
                task = self.task_encoder(*seen, batch.labels, batch.class_mask)
                rows = torch.arange(len(batch), device=batch.labels.device).repeat_interleave(num_candidates)
                known = task.class_tokens, task.task_token, task.proposal, batch.class_mask
                condition = [tokens[rows] for tokens in known]

                # 4. Prepare latents
                streams = [one for one in generators[part] for _ in range(num_candidates)]
                given = None if latents is None else latents[first * num_candidates :][: len(rows)]
                sample = self.prepare_latents(streams, temperature, given)

                # 5. Denoise
                noise = torch.zeros_like(sample)
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    output = self.denoiser(self.scheduler.scale_model_input(sample, t), t, *condition).sample
                    if eta > 0 and temperature > 0 and owns_noise:
                        noise = temperature * draw_noise(self.denoiser.dtype, self.codec.filled, streams)
                    drawn = {"eta": eta, "variance_noise": noise} if owns_noise else {"generator": streams}
                    sample = self.scheduler.step(output, t, sample, **drawn).prev_sample
                    if callback_on_step_end is not None:
                        tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                        sample = callback_on_step_end(self, i, t, tensors).pop("latents", sample)

                # 6. Decode the mean of the candidates
                draws.candidates.append(strength * sample.unflatten(0, (-1, num_candidates)))
                tokens = draws.candidates[-1].mean(dim=1)
                if output_type == "latent":
                    adapters += tokens
                else:
                    tensors = self.decode_adapters(tokens, batch)
                    check_finite(tensors, first)
                    if output_type == "pt":
                        adapters += torch.cat([value.flatten(1) for value in tensors.values()], dim=1)
                    else:
                        draws.batches.append(batch)  # for `select` and `refine`
                        adapters += described_adapters(
                            tensors, batch, supports[part], self.codec, details, seeds[part]
                        )
                progress_bar.update(len(batch))
        self.maybe_free_model_hooks()

        if output_type != "peft":
            adapters = torch.stack(adapters)
        if not return_dict:
            return (adapters,)
        return MCDiPipelineOutput(adapters=adapters, draws=draws)

    def check_inputs(
        self,
        support: Support | list[Support] | SupportBatch,
        num_candidates: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        temperature: float,
        output_type: str,
    ) -> tuple[list[SupportSet] | SupportBatch, int]:
        """Refuse support sets, generators and latents that do not fit.

        Returns:
            The support sets in one form, and the greatest number of classes.
        """
        if isinstance(support, SupportBatch):
            supports, ways = support, support.class_mask.shape[1]
            if support.examples is None or output_type == "peft" and support.classes is None:
                raise ValueError(
                    "The SupportBatch has no examples or no classes: expected what encode_support returns."
                )
            if support.features is not None and support.features.shape[2] != self.task_encoder.config.feature_dim:
                raise ValueError(f"The SupportBatch has features {tuple(support.features.shape)} of another pipeline.")
        else:
            supports = self._support_sets(support)
            ways = max(map(len, supports))
        check_generators(generator, self.scheduler, len(supports), temperature)
        shape = (len(supports) * num_candidates, *self.codec.filled.shape)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: expected {shape}.")
        return supports, ways

    def _support_sets(self, support: Support | list[Support]) -> list[SupportSet]:
        """Support sets in one form, which the backbone can read."""
        supports = as_support_sets(support)
        check_readable(supports, self.backbone)
        return supports

    @torch.no_grad()
    def encode_support(self, support: Support | list[Support] | SupportBatch, ways: int | None = None) -> SupportBatch:
        """See one support set or many through the shared adapter, there and back, see [`see_support`]. What it returns can
        be handed in again in their place.

        It is a [`SupportBatch`] of `ways` classes, by default the most that a task has. A [`SupportBatch`] that was seen
        already is only moved.
        """
        if isinstance(support, SupportBatch):
            batch = support.to(self._execution_device)
        else:
            batch = encode_examples(self._support_sets(support), self.stacked, self.config.support_views, ways)
        if batch.features is not None:
            return batch
        return see_support(self.stacked, self.codec.shared_adapter(), self.codec.head, batch)

    def prepare_latents(
        self, generators: list[torch.Generator], temperature: float = 1.0, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The noise that sampling starts from, `(rows, num_tokens, token_dim)`: given, or drawn for each row from its own
        generator, so that it is the same in any batch. It is scaled by `temperature`.
        """
        device, dtype = self._execution_device, self.denoiser.dtype
        if latents is None:
            latents = draw_noise(dtype, self.codec.filled, generators)
        return latents.to(device, dtype) * (self.scheduler.init_noise_sigma * temperature)

    def decode_adapters(self, tokens: torch.Tensor, support: SupportBatch) -> dict[str, torch.Tensor]:
        """Read whole adapters, key on disk -> `(tasks, *shape)`, from denoised tokens `(tasks, num_tokens, token_dim)`,
        with heads in closed form of what each adapter makes of its support."""
        return self.codec.decode(tokens, support, self.stacked)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the codec and the backbone are used outside of a forward pass. Raises `NotImplementedError`."""
        raise NotImplementedError("MCDiPipeline has no sequential offloading: call enable_model_cpu_offload().")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline, with everything that diffusers' own method takes.

        Only JSON and safetensors are read. Nothing that a folder or a repository holds is run, whatever
        `trust_remote_code` says: a component of another class is handed in by its name, `denoiser=mine`. A file
        that is damaged, does not fit the others, or asks for something that is not read is a `ValueError` that
        names it; one that is missing is an `OSError`.
        """
        return load_checked(cls, super().from_pretrained, pretrained_model_name_or_path, kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download a pipeline from the Hub, which `from_pretrained` does by itself. Refuses what it refuses."""
        return download_checked(cls, super().download, pretrained_model_name, kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the pipeline, with everything that diffusers' own method takes.

        All files are made beside the folder and moved in when they are on the disk, `model_index.json` last: without it
        no loader takes the folder for a pipeline. Saved again after loading it is the same files.
        """
        save_whole(self, super().save_pretrained, Path(save_directory), kwargs)
