"""The scheduler of local consistency diffusion (Guan et al., arXiv 2502.01117)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "loss_weighting": ("local", "unit"),
    "segment_starts": ("local", "global"),
}


@dataclass
class LocalConsistencySchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.Tensor` of the sample's shape): The sample at the previous, less noisy timestep.
        pred_original_sample (`torch.Tensor` of the sample's shape): The clean sample that the model output implies.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class LocalConsistencyScheduler(SchedulerMixin, ConfigMixin):
    """
    Noise, targets and loss weights of local consistency diffusion (Mc-Di), and an ordinary DDPM/DDIM sampler.

    An optimiser's trajectory is cut into k = `num_segments` segments. Segment i = 1..k ends on the target theta_i, the
    last one on what the optimiser found. Segment i owns the timesteps from its boundary tau_i = T - round(i T / k)
    to T - 1, and sees its target through the noise level abar_i[t] = abar[t] / abar[tau_i - 1], with abar[-1] = 1:

        x_t  = sqrt(abar_i[t]) theta_i + sqrt(1 - abar_i[t]) eps                            [`add_noise`]
        loss = || sqrt(1 - abar_i[t]) f(x_t, t) - sqrt(1 - abar[t]) eps ||^2                (local consistency loss)
             = weight * || output - target ||^2                             [`get_loss_weight`], [`get_target`]

    A network without loss makes DDPM's mean step (`eta=1` with zero `variance_noise`) pass theta_i when it leaves
    tau_i. `num_segments=1` is ordinary diffusion (Mv-Di) and `segment_starts="global"` noises every target as if it
    were the last (Tw-Di). Sampling knows nothing of segments: any scheduler with the same betas can do it.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 20): Diffusion steps T; with `trained_betas` their number.
        num_segments (`int`, *optional*, defaults to 3): Number of local targets k, from 1 to T.
        beta_start (`float`, *optional*, defaults to 0.01): First beta of the linear schedules.
        beta_end (`float`, *optional*, defaults to 0.45): Last beta of the linear schedules. The default suits T = 20
            (abar[T - 1] = 0.0039); a longer chain needs a smaller one, such as 0.02 at T = 1000.
        beta_schedule (`str`, *optional*, defaults to `"linear"`): `"linear"`, `"scaled_linear"` (linear in sqrt(beta))
            or `"squaredcos_cap_v2"` (Nichol & Dhariwal 2021, eq. 17, betas at most 0.999).
        trained_betas (`np.ndarray` or `list[float]`, *optional*): Betas of shape `(T,)` in place of a schedule. Fewer
            than `num_segments` lower that, with a warning.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        timestep_spacing (`str`, *optional*, defaults to `"trailing"`): `"leading"`, `"trailing"` or `"linspace"`, see
            table 2 of https://huggingface.co/papers/2305.08891. A few `"leading"` steps leave out the noisiest one.
        clip_sample (`bool`, *optional*, defaults to `False`): Whether `step` clips the predicted clean sample.
        clip_sample_range (`float`, *optional*, defaults to 1.0): Largest magnitude after clipping.
        loss_weighting (`str`, *optional*, defaults to `"local"`): `"local"` is the paper's loss under every prediction
            type; `"unit"` weighs every target to unit variance, see [`get_loss_weight`].
        segment_starts (`str`, *optional*, defaults to `"local"`): `"global"` puts all boundaries at 0, not at tau_i.

    Example: `scheduler.add_noise(targets, noise, timesteps, segments)`, and at use `scheduler.set_timesteps(4)`
    """

    _compatibles = ["DDPMScheduler", "DDIMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 20,
        num_segments: int = 3,
        beta_start: float = 0.01,
        beta_end: float = 0.45,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "trailing",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        loss_weighting: str = "local",
        segment_starts: str = "local",
    ) -> None:
        if trained_betas is not None:
            num_train_timesteps = len(trained_betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps)
            if num_segments > num_train_timesteps > 0:
                logger.warning(
                    f"`num_segments` is {num_segments}, but `trained_betas` are {num_train_timesteps}: a segment has one "
                    f"timestep at least, so there are {num_train_timesteps} segments."
                )
                num_segments = num_train_timesteps
                self.register_to_config(num_segments=num_segments)
        fits = {name: (self.config[name] in allowed, f"one of {allowed}") for name, allowed in CHOICES.items()}
        fits |= {
            "num_train_timesteps": (num_train_timesteps >= 1, "at least 1"),
            "num_segments": (1 <= num_segments <= num_train_timesteps, f"from 1 to {num_train_timesteps}"),
            "beta_start": (0 < beta_start < 1, "in (0, 1)"),
            "beta_end": (0 < beta_end < 1, "in (0, 1)"),
            "clip_sample_range": (clip_sample_range > 0, "positive"),
        }
        for name, (fit, expected) in fits.items():
            if not fit:
                raise ValueError(f"`{name}` is {self.config[name]!r}; it must be {expected}.")

        betas = self._make_betas()
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"The betas are {betas.tolist()}; they must be one row of numbers in (0, 1).")
        # Log levels in float64 from abar[-1] = 1 on: differences of them give abar_i, and expm1 of those 1 - abar_i,
        # without losing digits where it is tiny. They stay on the CPU (not every device has float64).
        self._log_levels = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = self._log_levels[1:].exp().float()
        self.init_noise_sigma = 1.0  # standard deviation of the noise that sampling starts from
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def _make_betas(self) -> torch.Tensor:
        config, steps = self.config, self.config.num_train_timesteps
        if config.trained_betas is not None:
            return torch.from_numpy(np.array(config.trained_betas, dtype=np.float64))
        if config.beta_schedule == "linear":
            return torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
        if config.beta_schedule == "scaled_linear":
            return torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float64) ** 2
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        level = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)

    @property
    def segment_boundaries(self) -> torch.Tensor:
        """The last timestep tau_i of every segment, a `torch.LongTensor` of shape `(num_segments,)` on the CPU."""
        count, steps = self.config.num_segments, self.config.num_train_timesteps
        if self.config.segment_starts == "global":
            return torch.zeros(count, dtype=torch.long)
        return torch.tensor([steps - round(i * steps / count) for i in range(1, count + 1)])

    def _starts(self, segments: torch.Tensor | None) -> torch.Tensor:
        """Boundaries of the rows' segments on the CPU, shape `(rows,)`; `(1,)` when `segments` is None."""
        if segments is None:
            return self.segment_boundaries[-1:]
        segments = segments.flatten().cpu()
        if ((segments < 1) | (segments > self.config.num_segments)).any():
            raise ValueError(f"`segments` are {segments.tolist()}; they must be from 1 to {self.config.num_segments}.")
        return self.segment_boundaries[segments - 1]

    def _row_levels(self, timesteps: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The logarithms of abar_i[t], abar[t] and abar[tau_i - 1], each float64 on the CPU and of shape `(rows,)`."""
        starts, timesteps = torch.broadcast_tensors(self._starts(segments), timesteps.flatten().cpu())
        if ((timesteps < starts) | (timesteps >= self.config.num_train_timesteps)).any():
            expected = f"at least their segments' boundaries {starts.tolist()} and below {len(self)}"
            raise ValueError(f"`timesteps` are {timesteps.tolist()}; they must be {expected}.")
        level, start = self._log_levels[timesteps + 1], self._log_levels[starts]
        return level - start, level, start

    @staticmethod
    def _combine(sample: torch.Tensor, noise: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The weighted sum by rows, in `sample`'s dtype but computed in float32."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        shape = (-1,) + (1,) * (sample.ndim - 1)
        first, second = (weight.to(sample.device, dtype).reshape(shape) for weight in weights)
        return (first * sample.to(dtype) + second * noise.to(dtype)).to(sample.dtype)

    def local_alphas_cumprod(self, timesteps: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        """The levels abar_i[t] for arguments of [`add_noise`], `(rows,)` in float32 on the device of `timesteps`."""
        return self._row_levels(timesteps, segments)[0].exp().to(timesteps.device, torch.float32)

    def sample_timesteps(self, segments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws for every row a timestep of its segment, uniformly from tau_i to T - 1. The result is like `segments`.

        Args:
            segments (`torch.LongTensor` of shape `(rows,)`): Segments from 1 to `num_segments`.
            generator (`torch.Generator`, *optional*): Makes the draw reproducible; it may live on any device.
        """
        starts = self._starts(segments)
        uniform = torch.rand(starts.shape, generator=generator, device=generator and generator.device).cpu()
        return (starts + (uniform * (self.config.num_train_timesteps - starts)).long()).to(segments.device)

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noises each local target along its own chain, sqrt(abar_i[t]) theta_i + sqrt(1 - abar_i[t]) eps.

        Args:
            original_samples (`torch.Tensor` of shape `(rows, ...)`): The local targets.
            noise (`torch.Tensor` of shape `(rows, ...)`): Standard normal noise.
            timesteps (`torch.LongTensor` of shape `(rows,)` or `(1,)`): At least the segments' boundaries.
            segments (`torch.LongTensor` of shape `(rows,)`, *optional*): From 1 to `num_segments`, the default.

        Returns:
            `torch.Tensor` of the shape and dtype of `original_samples`.
        """
        local = self._row_levels(timesteps, segments)[0]
        return self._combine(original_samples, noise, ((local / 2).exp(), (-local.expm1()).sqrt()))

    def get_target(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        segments: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the network has to answer to [`add_noise`] of the same arguments; the result has the same shape, too.

        Under `"epsilon"` that is the effective noise e = sqrt((1 - abar[t]) / (1 - abar_i[t])) eps, the zero of the
        local consistency loss. Under `"sample"` and `"v_prediction"` it is the clean sample and the velocity that the
        sampler would derive from x_t and e, written without differences of nearly equal numbers.
        """
        return self._combine(original_samples, noise, self._target_weights(timesteps, segments))

    def get_loss_weight(self, timesteps: torch.Tensor, segments: torch.Tensor | None = None) -> torch.Tensor:
        """The weight of a row's squared error between model output and `get_target`, for arguments of [`add_noise`].

        With `loss_weighting="local"` the weighted error is the local consistency loss, whatever is predicted: the
        factor (1 - abar_i[t]), times what an error of the output makes in the implied noise. With `"unit"` it is one
        over the target's variance for a sample of unit variance, so that the first steps of an early segment, whose
        targets are several times larger, count as much as others. `(rows,)`, float32, on the device of `timesteps`.
        """
        local, level, _ = self._row_levels(timesteps, segments)
        weight = -local.expm1()
        if self.config.loss_weighting == "unit":
            weight = 1 / sum(factor.square() for factor in self._target_weights(timesteps, segments))
        elif self.config.prediction_type == "sample":
            weight = weight * level.exp() / -level.expm1()
        elif self.config.prediction_type == "v_prediction":
            weight = weight * level.exp()
        return weight.to(timesteps.device, torch.float32)

    def _target_weights(self, timesteps: torch.Tensor, segments: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """The factors of sample and noise in `get_target`, `(rows,)` each."""
        local, level, start = self._row_levels(timesteps, segments)
        variance, local_variance = -level.expm1(), -local.expm1()
        if self.config.prediction_type == "epsilon":
            return torch.zeros_like(level), (variance / local_variance).sqrt()
        if self.config.prediction_type == "sample":
            return (-start / 2).exp(), start.expm1() * ((local - start).exp() / local_variance).sqrt()
        return -variance.sqrt() * (-start / 2).exp(), (variance * (local - start).exp() / local_variance).sqrt()

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The ordinary velocity sqrt(abar[t]) eps - sqrt(1 - abar[t]) x_0, in the shapes of [`add_noise`]."""
        level = self._row_levels(timesteps, None)[1]
        return self._combine(sample, noise, (-(-level.expm1()).sqrt(), (level / 2).exp()))

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` unchanged whatever the timestep; other schedulers scale it here."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Chooses `timesteps` of a sampling run, on `device`: `num_inference_steps` of them, at most T, by the spacing of
        the config, or those that are given, from T - 1 or less down to 0 or more.

        A `ValueError` says that both are given or none, or what is wrong with them.
        """
        total = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give `num_inference_steps` or `timesteps`: one of them, not both.")
        if timesteps is not None:
            falling = all(before > after for before, after in zip([total, *timesteps], [*timesteps, -1]))
            if not timesteps or not falling:
                raise ValueError(
                    f"`timesteps` are {timesteps}; they must fall, from {total - 1} at most to 0 at least."
                )
            self.num_inference_steps = len(timesteps)
            self.timesteps = torch.tensor(timesteps, device=device)
            return
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}; it must be from 1 to {total}.")
        steps = torch.arange(num_inference_steps, dtype=torch.float64)
        if self.config.timestep_spacing == "trailing":
            timesteps = (total - steps * total / num_inference_steps).round() - 1
        elif self.config.timestep_spacing == "leading":
            timesteps = steps.flip(0) * (total // num_inference_steps)
        else:
            timesteps = torch.linspace(0, total - 1, num_inference_steps, dtype=torch.float64).round().flip(0)
        self.num_inference_steps = num_inference_steps
        self.timesteps = timesteps.long().to(device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The run's next timestep below `timestep`, which need not be one of `timesteps`; -1 (no noise) if none is."""
        return max((t for t in self.timesteps.tolist() if t < int(timestep)), default=-1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> LocalConsistencySchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of DDIM (https://huggingface.co/papers/2010.02502, eq. 12 and 16), of DDPM when `eta` is 1.

        Only a step without noise left at its end (the run's last) adds none. With `eta=1` and zero `variance_noise`
        this is DDPM's mean step, (x_t - (1 - alpha_t) / sqrt(1 - abar[t]) f) / sqrt(alpha_t), for which the local
        consistency loss is made; DDIM (`eta=0`) keeps more noise and meets only the last target exactly.

        Args:
            model_output (`torch.Tensor` of the shape of `sample`): What `prediction_type` names.
            timestep (`int` or `torch.Tensor` with one element): The sample's timestep.
            sample (`torch.Tensor` of any shape): The noisy sample x_t.
            eta (`float`, *optional*, defaults to 0.0): Share of the ancestral noise, from 0 to 1.
            generator (`torch.Generator` or a list of them, *optional*): Makes the noise reproducible.
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*): Noise to use in place of drawing it.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return no plain tuple.

        Returns:
            [`LocalConsistencySchedulerOutput`] or its two values, of the shape and dtype of `sample`.
        """
        t = int(timestep)
        if not 0 <= t < self.config.num_train_timesteps:
            raise ValueError(f"`timestep` is {t}; it must be from 0 to {self.config.num_train_timesteps - 1}.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta}; it must be from 0 to 1.")
        if generator is not None and variance_noise is not None:
            raise ValueError("`generator` and `variance_noise` are both given; pass one of them.")
        previous = self.previous_timestep(t)
        log_level, log_previous = self._log_levels[[t + 1, previous + 1]].tolist()
        signal = math.exp(log_level / 2)
        variance, previous_variance = -math.expm1(log_level), -math.expm1(log_previous)
        # Python floats neither move between devices nor lose digits to the sample's dtype.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noisy, output = sample.to(dtype), model_output.to(dtype)

        # 1. The clean sample that the output implies.
        if self.config.prediction_type == "epsilon":
            original = (noisy - variance**0.5 * output) / signal
        elif self.config.prediction_type == "sample":
            original = output
        else:
            original = signal * noisy - variance**0.5 * output
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        # 2. Towards it. The noise that stays is that of x_t, (x_t - signal * original) / std. Written in x_t and the
        # clean sample, the step keeps its digits where std is small, and clipping changes the noise as in DDPM.
        ancestral = -math.expm1(log_level - log_previous) / variance  # (1 - alpha_t) / (1 - abar[t])
        kept = math.sqrt(previous_variance * (1 - eta**2 * ancestral) / variance)
        prev_sample = (math.exp(log_previous / 2) - kept * signal) * original + kept * noisy

        # 3. Fresh noise.
        if eta > 0 and previous >= 0:
            if variance_noise is None:
                variance_noise = randn_tensor(output.shape, generator, output.device, model_output.dtype)
            prev_sample = prev_sample + eta * math.sqrt(previous_variance * ancestral) * variance_noise

        values = prev_sample.to(sample.dtype), original.to(sample.dtype)
        return LocalConsistencySchedulerOutput(*values) if return_dict else values

    def __len__(self) -> int:
        return self.config.num_train_timesteps
