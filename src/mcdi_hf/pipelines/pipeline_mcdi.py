"""The pipeline: from a support set to a PEFT adapter."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..adapters.codec import AdapterCodec
from ..adapters.completion import complete_adapters
from ..adapters.generated import GeneratedAdapter
from ..models.denoiser import MCDiDenoiser
from ..models.task_encoder import TaskEncoder
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .backbone import BackboneMixin
from .inputs import (
    check_callback,
    check_components,
    check_counts,
    check_finite,
    check_latents,
    check_ready,
    check_settings,
)
from .loading import CheckedLoadingMixin
from .pipeline_output import MCDiPipelineOutput
from .refinement import refine
from .sampling import SamplingMixin, seed_of, task_generators
from .selection import Choice, Folds, choose, frozen_adapters
from .support import Support, SupportBatch, is_text


IMPRINT_FROM = ("mean", "generated")


class MCDiPipeline(CheckedLoadingMixin, BackboneMixin, SamplingMixin, DiffusionPipeline):
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
        support_views (`int`, *optional*, defaults to 1):
            How many views of a support example its features are the mean of: with more than 1, images moved a little,
            texts short of a word, see [`augmented_views`].
        trained_ways, trained_shots (`list[int]`, *optional*):
            The least and the greatest number of classes, and of examples of a class, in training. A record: others are
            served, too.
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
        support_views: int = 1,
        trained_ways: list | None = None,
        trained_shots: list | None = None,
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
        check_components(denoiser, task_encoder, codec)
        self.register_modules(denoiser=denoiser, task_encoder=task_encoder, codec=codec, scheduler=scheduler)
        self.register_to_config(
            base_model_name_or_path=base_model_name_or_path,
            num_inference_steps=num_inference_steps,
            strength=strength,
            imprint_from=imprint_from,
            support_views=support_views,
            trained_ways=trained_ways,
            trained_shots=trained_shots,
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
        refine_steps: int = 0,
        refine_learning_rate: float = 1e-3,
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
                How candidates become one adapter: `"first"` takes the first, `"mean"` averages them in the basis of the
                shared start, which all of them are written in, `"select"` chooses among them, their mean, and what is
                free (the mean adapter, and the frozen backbone, both with imprinted heads) by the cross-validated loss
                on the support set, which needs examples. For a fold the adapters are generated anew without it, from
                the same noise. With one example of a class there are no folds: the loss is that on the support itself.
            num_inference_steps (`int`, *optional*):
                Steps of the scheduler; by default what the pipeline's config says.
            strength (`float`, *optional*):
                How far to go from what is free (0: the mean adapter and the imprinted head, exactly) to what is
                generated (1); by default what the pipeline's config says.
            temperature (`float`, *optional*, defaults to 1.0):
                Scale of the starting noise and of the noise of each step; with 0 nothing is random.
            eta (`float`, *optional*, defaults to 1.0):
                1 samples as DDPM does, 0 as DDIM, whose steps add no noise.
            refine_steps (`int`, *optional*, defaults to 0):
                Steps of Adam on the support set, from the adapter that was generated. They need examples.
            refine_learning_rate (`float`, *optional*, defaults to 1e-3):
                Adam's, with a linear decay to zero.
            batch_size (`int`, *optional*, defaults to 64):
                How many tasks are worked on at once: the memory grows with it and with `num_candidates` (and, to
                select, with the folds), and not with the number of tasks. Results do not depend on it.
            generator (`torch.Generator` or a list of one a task, *optional*):
                Makes the result reproducible. Every task has a stream of noise of its own, so that its result does not
                depend on its neighbours: its generator in a list, or one that is seeded from the one generator given.
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
        strength = self.config.strength if strength is None else strength
        check_settings(combine, temperature, strength, output_type, refine_steps, batch_size)
        supports = self._support_sets(support)
        conditions = None if condition is None else self._support_sets(condition)
        check_counts(supports, conditions, num_candidates, generator)
        if latents is not None:
            check_latents(latents, self.codec, supports, num_candidates)
            latents = latents.unflatten(0, (len(supports), num_candidates))
        check_ready(supports, combine, self.config.imprint_from, refine_steps)
        check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        # 2. Settle what is the same for all tasks
        ways = max(len(one) for one in supports)
        generators = task_generators(generator, len(supports))
        seeds = [seed_of(one) if latents is None else None for one in generators]
        sample = partial(
            self.sample,
            num_inference_steps=num_inference_steps,
            temperature=temperature,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Work on some tasks at a time
        adapters = []
        with self.progress_bar(total=len(supports)) as progress:
            for first in range(0, len(supports), batch_size):
                part = slice(first, first + batch_size)
                own = supports[part]
                batch = self._embed_batch(own, ways)
                seen = batch if conditions is None else self._embed_batch(conditions[part], ways)
                noise = None if latents is None else latents[part]
                tokens, choices = self._candidates(
                    sample, own, batch, seen, generators[part], noise, num_candidates, strength, combine
                )
                progress.update(len(own))
                if output_type == "latent":
                    adapters.append(tokens)
                    continue
                tensors = self._finish(tokens, own, batch, choices, refine_steps, refine_learning_rate)
                check_finite(tensors, first)
                if output_type == "pt":
                    adapters.append(torch.cat([value.flatten(1) for value in tensors.values()], dim=1))
                else:
                    details = {"num_inference_steps": self._num_timesteps, "num_candidates": num_candidates}
                    details |= {"combine": combine, "refine_steps": refine_steps}
                    adapters += self._as_adapters(tensors, own, details, seeds[part], choices)
        if output_type != "peft":
            adapters = torch.cat(adapters)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (adapters,)
        return MCDiPipelineOutput(adapters=adapters)

    @torch.no_grad()
    def baseline(self, support: Support) -> GeneratedAdapter:
        """What is free: the mean adapter of the training tasks, with a head imprinted from the support set or words.

        Args:
            support (`dict` or `datasets.Dataset`): One task, see [`MCDiPipeline.__call__`].
        """
        supports = self._support_sets(support)
        batch = self._embed_batch(supports, len(supports[0]))
        tokens = self.codec.mean.new_zeros(1, self.codec.num_tokens(len(supports[0])), self.codec.layout.token_dim)
        details = {"num_inference_steps": 0, "num_candidates": 0, "combine": "free", "refine_steps": 0}
        return self._as_adapters(self.complete(tokens, batch), supports, details, [None])[0]

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

    def _candidates(self, sample, supports, batch, seen, generators, latents, number, strength, combine):
        """Sample the candidates of some tasks and make them one: its tokens, and how each was chosen, if it was."""
        count, device = len(supports), batch.labels.device
        tasks, labels = torch.arange(count, device=device), seen.labels
        folds = Folds.of(batch.labels) if combine == "select" else None
        if folds is not None:
            tasks = torch.cat([tasks, folds.tasks])
            generators = [*generators, *(generators[task].clone_state() for task in folds.tasks.tolist())]
            labels = torch.cat([labels, folds.kept if seen is batch else labels[folds.tasks]])
        rows = tasks.repeat_interleave(number)
        tokens = sample(
            seen.features[rows],
            labels.repeat_interleave(number, dim=0),
            batch.class_mask[rows],
            generator=[own for own in generators for _ in range(number)],
            latents=None if latents is None else latents[tasks.cpu()].flatten(0, 1),
        )
        tokens = strength * tokens.unflatten(0, (-1, number))
        if combine == "first":
            return tokens[:, 0], None
        if combine == "mean":
            return tokens.mean(dim=1), None
        choices = choose(self, tokens[:count], tokens[count:], folds, batch, [tuple(one) for one in supports])
        free = torch.zeros_like(tokens[0, 0])
        return torch.stack([free if one.tokens is None else one.tokens for one in choices]), choices

    def _finish(self, tokens, supports, batch, choices, refine_steps, refine_learning_rate) -> dict[str, torch.Tensor]:
        """Read the adapters from their tokens, put those in that no tokens say, and refine them."""
        tensors = self.complete(tokens, batch)
        frozen_tasks = [task for task, choice in enumerate(choices or []) if choice.tokens is None]
        if not frozen_tasks and not refine_steps:
            return tensors
        words = self.stacked.word_heads([tuple(support) for support in supports])
        if frozen_tasks:
            frozen = frozen_adapters(self, batch, batch.labels, words)
            for key, value in tensors.items():
                value[frozen_tasks] = frozen[key][frozen_tasks]
        if refine_steps:
            tensors = refine(self.stacked, tensors, batch, refine_steps, refine_learning_rate, words)
        return tensors

    def _as_adapters(
        self, tensors, supports, details, seeds, choices: list[Choice] | None = None
    ) -> list[GeneratedAdapter]:
        name = self.name_or_path
        if name is not None and Path(name).is_dir():
            name = Path(name).resolve().name  # a card should not tell where a folder lies
        details = {"generator": name, "generator_revision": self.revision} | details
        tensors = {key: value.cpu() for key, value in tensors.items()}
        adapters = []
        for task, support in enumerate(supports):
            own = {key: value[task] for key, value in tensors.items()}
            for key in self.codec.layout.head_keys:
                own[key] = own[key][: len(support)]
            scores = {"chosen": None, "support_loss": None, "support_losses": None, "folds": None}
            if choices is not None:
                one = choices[task]
                scores = {"chosen": one.option, "support_loss": one.scores[one.option]}
                scores |= {"support_losses": one.scores, "folds": one.num_folds}
            shots = [len(examples) for examples in support.values()]
            adapters.append(
                GeneratedAdapter(
                    tensors={key: value.clone(memory_format=torch.contiguous_format) for key, value in own.items()},
                    lora_config=self.codec.config.lora_config,
                    base_model=self.codec.config.base_model,
                    labels=list(support),
                    details=details | {"shots": shots, "seed": seeds[task]} | scores,
                    support=support if is_text(support) else None,
                )
            )
        return adapters
