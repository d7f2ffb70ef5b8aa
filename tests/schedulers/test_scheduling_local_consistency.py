"""Closed-form tests of the scheduler; the formulas are those of the local consistency paper (arXiv 2502.01117)."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from mcdi_hf.schedulers.scheduling_local_consistency import LocalConsistencyScheduler


PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def every_row(scheduler: LocalConsistencyScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of a segment and one of its timesteps: `(timesteps, segments)`."""
    pairs = [
        (t, i)
        for i, start in enumerate(scheduler.segment_boundaries.tolist(), start=1)
        for t in range(start, len(scheduler))
    ]
    timesteps, segments = torch.tensor(pairs).unbind(1)
    return timesteps, segments


def convert(scheduler: LocalConsistencyScheduler, epsilon: torch.Tensor, x: torch.Tensor, t: torch.Tensor):
    """What a network of the scheduler's prediction type answers if it believes in the noise `epsilon`, in float64."""
    level = scheduler.alphas_cumprod.double()[t].reshape(-1, *[1] * (x.ndim - 1))
    original = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
    velocity = level.sqrt() * epsilon - (1 - level).sqrt() * original
    return {"epsilon": epsilon, "sample": original, "v_prediction": velocity}[scheduler.config.prediction_type]


@pytest.mark.parametrize(
    ("steps", "segments", "expected"),
    [
        (20, 3, [13, 7, 0]),
        (20, 1, [0]),
        (10, 3, [7, 3, 0]),
        (7, 3, [5, 2, 0]),
        (3, 3, [2, 1, 0]),
        (20, 8, [18, 15, 12, 10, 8, 5, 2, 0]),
        (1000, 3, [667, 333, 0]),
    ],
)
def test_segment_boundaries(steps, segments, expected):
    scheduler = LocalConsistencyScheduler(num_train_timesteps=steps, num_segments=segments)
    assert scheduler.segment_boundaries.tolist() == expected
    assert scheduler.segment_boundaries.dtype == torch.long
    tw = LocalConsistencyScheduler(num_train_timesteps=steps, num_segments=segments, segment_starts="global")
    assert tw.segment_boundaries.tolist() == [0] * segments


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_local_level_is_the_product_of_the_segments_alphas(schedule):
    scheduler = LocalConsistencyScheduler(beta_schedule=schedule)
    timesteps, segments = every_row(scheduler)
    assert len(timesteps) == 7 + 13 + 20
    boundaries = [13, 7, 0]
    expected = [
        scheduler.alphas[boundaries[i - 1] : t + 1].double().prod() for t, i in zip(timesteps, segments, strict=True)
    ]
    levels = scheduler.local_alphas_cumprod(timesteps, segments)
    torch.testing.assert_close(levels, torch.stack(expected).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(levels[segments == 3], scheduler.alphas_cumprod, rtol=1e-6, atol=0)

    theta, noise = randn(len(timesteps), 5), randn(len(timesteps), 5, seed=1)
    expected = levels[:, None].sqrt() * theta + (1 - levels[:, None]).sqrt() * noise
    torch.testing.assert_close(scheduler.add_noise(theta, noise, timesteps, segments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_are_diffusers_betas(schedule):
    scheduler = LocalConsistencyScheduler(beta_schedule=schedule)
    reference = DDIMScheduler(num_train_timesteps=20, beta_start=0.01, beta_end=0.45, beta_schedule=schedule)
    torch.testing.assert_close(scheduler.betas, reference.betas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scheduler.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4, atol=1e-8)


def test_default_chain_ends_in_noise():
    assert 0.002 < LocalConsistencyScheduler().alphas_cumprod[-1] < 0.01


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_weighted_error_is_the_local_consistency_loss(schedule, prediction_type):
    scheduler = LocalConsistencyScheduler(beta_schedule=schedule, prediction_type=prediction_type)
    timesteps, segments = every_row(scheduler)
    theta, noise, predicted = (randn(len(timesteps), 6, seed=seed).double() for seed in range(3))
    local = scheduler.local_alphas_cumprod(timesteps, segments).double()[:, None]
    level = scheduler.alphas_cumprod.double()[timesteps][:, None]
    expected = ((1 - local).sqrt() * predicted - (1 - level).sqrt() * noise).square().sum(1)

    output = convert(scheduler, predicted, scheduler.add_noise(theta, noise, timesteps, segments), timesteps)
    error = output - scheduler.get_target(theta, noise, timesteps, segments)
    loss = scheduler.get_loss_weight(timesteps, segments) * error.square().sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)

    unit = LocalConsistencyScheduler.from_config(scheduler.config, loss_weighting="unit")
    target = unit.get_target(theta, noise, timesteps, segments)
    torch.testing.assert_close(target, scheduler.get_target(theta, noise, timesteps, segments))
    # theta and noise are independent: the target's variance is the sum of the squared factors
    ones, zeros = torch.ones_like(theta), torch.zeros_like(theta)
    factors = (unit.get_target(*pair, timesteps, segments)[:, 0] for pair in ((ones, zeros), (zeros, ones)))
    variance = sum(factor.square() for factor in factors)
    torch.testing.assert_close(unit.get_loss_weight(timesteps, segments).double(), 1 / variance, rtol=1e-5, atol=0)
    assert torch.allclose(unit.get_loss_weight(timesteps[segments == 3]), torch.ones(1))


@pytest.mark.parametrize("settings", [{"num_segments": 1}, {"segment_starts": "global"}])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_mv_and_tw_are_ordinary_diffusion(prediction_type, settings):
    scheduler = LocalConsistencyScheduler(prediction_type=prediction_type, **settings)
    ddpm = DDPMScheduler(trained_betas=scheduler.betas.tolist(), num_train_timesteps=20)
    timesteps, segments = every_row(scheduler)
    theta, noise = randn(len(timesteps), 2, 3), randn(len(timesteps), 2, 3, seed=1)
    noised = scheduler.add_noise(theta, noise, timesteps, segments)
    torch.testing.assert_close(noised, ddpm.add_noise(theta, noise, timesteps), rtol=1e-5, atol=1e-5)
    velocity = ddpm.get_velocity(theta, noise, timesteps)
    target = {"epsilon": noise, "sample": theta, "v_prediction": velocity}[prediction_type]
    torch.testing.assert_close(scheduler.get_target(theta, noise, timesteps, segments), target, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scheduler.get_velocity(theta, noise, timesteps), velocity, rtol=1e-5, atol=1e-5)
    if prediction_type == "epsilon":
        weight = scheduler.get_loss_weight(timesteps, segments)
        torch.testing.assert_close(weight, 1 - ddpm.alphas_cumprod[timesteps], rtol=1e-4, atol=1e-6)


def test_tiny_variances_keep_their_digits():
    scheduler = LocalConsistencyScheduler(trained_betas=np.full(1000, 1e-9), num_segments=3)
    rows = scheduler.get_loss_weight(torch.tensor([667, 668, 333, 0]), torch.tensor([1, 1, 2, 3]))
    torch.testing.assert_close(rows, torch.tensor([1e-9, 2e-9, 1e-9, 1e-9]), rtol=1e-6, atol=0)
    target = scheduler.get_target(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([333]), torch.tensor([2]))
    assert target.item() == pytest.approx(334**0.5, rel=1e-6)


def oracle_chain(scheduler: LocalConsistencyScheduler, theta: torch.Tensor, segment: int, eta: float) -> torch.Tensor:
    """Samples with a network that has no loss on one segment, from T - 1 until it has left the segment's boundary."""
    x, segments = randn(*theta.shape, seed=7), torch.tensor([segment])
    for t in range(len(scheduler) - 1, int(scheduler.segment_boundaries[segment - 1]) - 1, -1):
        timesteps = torch.tensor([t])
        local = scheduler.local_alphas_cumprod(timesteps, segments)
        noise = (x - local.sqrt() * theta) / (1 - local).sqrt()
        output = scheduler.get_target(theta, noise, timesteps, segments)
        x = scheduler.step(output, t, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_mean_steps_of_an_oracle_land_on_every_target(count, schedule, prediction_type):
    scheduler = LocalConsistencyScheduler(num_segments=count, beta_schedule=schedule, prediction_type=prediction_type)
    for segment in range(1, count + 1):
        theta = randn(4, 9, seed=segment)
        torch.testing.assert_close(oracle_chain(scheduler, theta, segment, eta=1.0), theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_steps_of_an_oracle_land_on_the_last_target_only(prediction_type):
    scheduler = LocalConsistencyScheduler(prediction_type=prediction_type)
    theta = randn(4, 9)
    torch.testing.assert_close(oracle_chain(scheduler, theta, 3, eta=0.0), theta, rtol=0, atol=1e-5)
    # Leaving tau_i, DDIM keeps sqrt(1 - A) sqrt(alpha (1 - A)) (sqrt(1 - abar) - sqrt(alpha (1 - A))) / sqrt(alpha
    # (1 - alpha)) of the noise, with A = abar[tau_i - 1]: nothing only where A is 1.
    noise, t, segments = randn(4, 9, seed=1), torch.tensor([7]), torch.tensor([2])
    x = scheduler.add_noise(theta, noise, t, segments)
    prev_sample = scheduler.step(scheduler.get_target(theta, noise, t, segments), 7, x).prev_sample
    alpha, before, level = scheduler.alphas[7], scheduler.alphas_cumprod[6], scheduler.alphas_cumprod[7]
    kept = (1 - before).sqrt() * ((1 - level).sqrt() - (alpha * (1 - before)).sqrt()) / (1 - alpha).sqrt()
    assert kept > 0.1
    torch.testing.assert_close(prev_sample, theta + kept * noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_mean_step_identity(schedule):
    scheduler = LocalConsistencyScheduler(beta_schedule=schedule)
    x, noise = randn(4, 9), randn(4, 9, seed=1)
    timesteps, segments = every_row(scheduler)
    for t, segment in zip(timesteps, segments, strict=True):
        alpha, level = 1 - scheduler.betas.double()[t], scheduler.alphas_cumprod.double()[t]
        local = scheduler.local_alphas_cumprod(t, segment).double()
        output = scheduler.get_target(x, noise, t, segment)
        step = scheduler.step(output, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        global_mean = (x - (1 - alpha) / (1 - level).sqrt() * output) / alpha.sqrt()
        local_mean = (x - (1 - alpha) / (1 - local).sqrt() * noise) / alpha.sqrt()
        torch.testing.assert_close(step, global_mean.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step, local_mean.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [20, 6])
def test_prediction_types_sample_the_same_chain(steps, eta):
    results = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = LocalConsistencyScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(steps)
        x, generator = randn(2, 9).double(), torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:
            output = convert(scheduler, torch.sin(3 * x) + 0.01 * t, x, t[None])
            x = scheduler.step(output, t, x, eta=eta, generator=generator).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_eta_one_is_ddpm(prediction_type, clip_sample):
    scheduler = LocalConsistencyScheduler(prediction_type=prediction_type, clip_sample=clip_sample)
    shared = {"num_train_timesteps": 20, "prediction_type": prediction_type, "clip_sample": clip_sample}
    ddpm = DDPMScheduler(trained_betas=scheduler.betas.tolist(), timestep_spacing="trailing", **shared)
    x, output = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    for t in range(19, -1, -1):
        step = scheduler.step(output, t, x, eta=1.0, generator=torch.Generator().manual_seed(t))
        expected = ddpm.step(output, t, x, generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(step.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        with_noise, mean = (
            scheduler.step(output, t, x, eta=1.0, variance_noise=torch.full_like(x, value)).prev_sample
            for value in (1.0, 0.0)
        )
        expected = ddpm._get_variance(t).sqrt().expand_as(x) if t > 0 else torch.zeros_like(x)
        torch.testing.assert_close(with_noise - mean, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 20), ("leading", 10), ("leading", 5), ("trailing", 20), ("trailing", 10), ("trailing", 4)]
    + [("linspace", 20)],
)
def test_ddim_over_the_same_betas(spacing, steps, prediction_type, eta):
    scheduler = LocalConsistencyScheduler(prediction_type=prediction_type, timestep_spacing=spacing)
    shared = {"num_train_timesteps": 20, "prediction_type": prediction_type, "timestep_spacing": spacing}
    ddim = DDIMScheduler(trained_betas=scheduler.betas.tolist(), set_alpha_to_one=True, clip_sample=False, **shared)
    scheduler.set_timesteps(steps)
    ddim.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == ddim.timesteps.tolist()
    x, output = randn(2, 5), randn(2, 5, seed=1)
    for t in scheduler.timesteps:
        step = scheduler.step(output, t, x, eta=eta, generator=torch.Generator().manual_seed(int(t)))
        expected = ddim.step(output, t, x, eta=eta, generator=torch.Generator().manual_seed(int(t)))
        if t == scheduler.timesteps[-1]:  # DDIM's variance there is zero up to rounding
            torch.testing.assert_close(step.prev_sample, step.pred_original_sample, rtol=0, atol=0)
        torch.testing.assert_close(step.prev_sample, expected.prev_sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 13, 20])
def test_any_number_of_steps_ends_on_the_clean_sample(steps, spacing):
    scheduler = LocalConsistencyScheduler(timestep_spacing=spacing, prediction_type="sample")
    reference = DDIMScheduler(num_train_timesteps=20, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    reference.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == reference.timesteps.tolist()
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps
    theta, x = randn(2, 5), randn(2, 5, seed=1)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        state = generator.get_state()
        x = scheduler.step(theta, t, x, eta=1.0, generator=generator).prev_sample
    torch.testing.assert_close(x, theta, rtol=0, atol=1e-6)
    assert generator.get_state().equal(state)  # the last step draws nothing


def test_previous_timestep():
    scheduler = LocalConsistencyScheduler()
    assert [scheduler.previous_timestep(t) for t in (19, 7, torch.tensor(1), 0)] == [18, 6, 0, -1]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [19, 15, 11, 7, 3]
    assert [scheduler.previous_timestep(t) for t in (19, 7, 6, 3, 0)] == [15, 3, 3, -1, -1]


def test_trained_betas_and_save_load(tmp_path):
    betas = np.array([0.1, 0.3, 0.2])
    settings = {"num_segments": 2, "prediction_type": "v_prediction", "loss_weighting": "unit"}
    scheduler = LocalConsistencyScheduler(trained_betas=betas, num_train_timesteps=1000, **settings)
    assert len(scheduler) == scheduler.config.num_train_timesteps == 3
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor([0.9, 0.63, 0.504]))
    scheduler.save_pretrained(tmp_path)
    loaded = LocalConsistencyScheduler.from_pretrained(tmp_path)
    assert loaded.betas.equal(scheduler.betas)
    assert {name: loaded.config[name] for name in settings} == settings
    x, output = randn(2, 5), randn(2, 5, seed=1)
    assert loaded.step(output, 2, x).prev_sample.equal(scheduler.step(output, 2, x).prev_sample)


def test_compatibles():
    mcdi_hf = pytest.importorskip("mcdi_hf", exc_type=ImportError)
    scheduler = mcdi_hf.LocalConsistencyScheduler(
        num_train_timesteps=50, num_segments=5, beta_start=0.01, beta_end=0.2, timestep_spacing="leading"
    )
    assert {cls.__name__ for cls in scheduler.compatibles} == {
        "DDIMScheduler",
        "DDPMScheduler",
        "LocalConsistencyScheduler",
    }
    for cls in scheduler.compatibles:
        other = cls.from_config(scheduler.config)
        torch.testing.assert_close(other.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
        back = LocalConsistencyScheduler.from_config(other.config)
        names = [name for name in scheduler.config if not name.startswith("_")]
        assert [back.config[name] for name in names] == [scheduler.config[name] for name in names]


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_tuple_output(shape, dtype):
    scheduler = LocalConsistencyScheduler()
    theta, noise = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
    segments = torch.tensor([1, 2, 3, 3])
    for function in (scheduler.add_noise, scheduler.get_target):
        rows = function(theta, noise, torch.full((4,), 15), segments)
        assert rows.dtype == dtype and rows.shape == shape
        assert function(theta, noise, torch.tensor([15]), segments).equal(rows)
        ordinary = function(theta, noise, torch.tensor([15]))
        assert ordinary.equal(function(theta, noise, torch.tensor([15]), torch.full((4,), 3)))
    assert scheduler.get_velocity(theta, noise, torch.tensor([15])).dtype == dtype
    assert scheduler.scale_model_input(theta, 0.0) is theta

    for eta in (0.0, 1.0):
        output = scheduler.step(noise, 15, theta, eta=eta, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        values = scheduler.step(noise, 15, theta, eta=eta, generator=generator, return_dict=False)
        assert output.prev_sample.dtype == dtype and output.prev_sample.shape == shape
        assert values[0].equal(output.prev_sample) and values[1].equal(output.pred_original_sample)


def test_step_takes_a_generator_for_every_row():
    scheduler = LocalConsistencyScheduler()
    output, x = randn(2, 5), randn(2, 5, seed=1)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    rows = scheduler.step(output, 9, x, eta=1.0, generator=generators).prev_sample
    alone = scheduler.step(output[1:], 9, x[1:], eta=1.0, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(rows[1:], alone)


def test_sample_timesteps_is_uniform_on_each_segment():
    scheduler = LocalConsistencyScheduler()
    segments = torch.arange(1, 4).repeat(4000)
    timesteps = scheduler.sample_timesteps(segments, generator=torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.long
    assert timesteps.equal(scheduler.sample_timesteps(segments, generator=torch.Generator().manual_seed(0)))
    for segment, start in zip((1, 2, 3), (13, 7, 0), strict=True):
        counts = timesteps[segments == segment].bincount(minlength=20)
        assert counts[:start].sum() == 0
        expected = 4000 / (20 - start)
        assert ((counts[start:] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_segments": 0}, "num_segments"),
        ({"num_segments": 21}, "num_segments"),
        ({"beta_start": -0.1}, "beta_start"),
        ({"beta_end": 1.0}, "beta_end"),
        ({"trained_betas": [0.1, 1.0, 0.2]}, "betas"),
        ({"trained_betas": []}, "num_train_timesteps"),
        ({"trained_betas": [[0.1, 0.2]] * 3}, "betas"),
        ({"beta_schedule": "cosine"}, "beta_schedule.*squaredcos_cap_v2"),
        ({"prediction_type": "noise"}, "prediction_type.*epsilon"),
        ({"timestep_spacing": "even"}, "timestep_spacing.*trailing"),
        ({"loss_weighting": "snr"}, "loss_weighting.*unit"),
        ({"segment_starts": "zero"}, "segment_starts.*global"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        LocalConsistencyScheduler(**settings)


def test_bad_arguments_are_refused():
    scheduler = LocalConsistencyScheduler()
    x = randn(2, 5)
    rows = {"timesteps": torch.tensor([13, 6]), "segments": torch.tensor([1, 2])}
    for call in (
        lambda: scheduler.add_noise(x, x, **rows),
        lambda: scheduler.get_target(x, x, **rows),
        lambda: scheduler.get_loss_weight(**rows),
        lambda: scheduler.local_alphas_cumprod(**rows),
        lambda: scheduler.add_noise(x, x, torch.tensor([20])),
        lambda: scheduler.add_noise(x, x, torch.tensor([-1])),
    ):
        with pytest.raises(ValueError, match="timesteps"):
            call()
    for segments in ([0, 1], [1, 4]):
        with pytest.raises(ValueError, match="segments"):
            scheduler.sample_timesteps(torch.tensor(segments))
    for steps in (0, 21):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)
    for timestep in (-1, 20):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(x, timestep, x)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta"):
            scheduler.step(x, 3, x, eta=eta)
    with pytest.raises(ValueError, match="variance_noise"):
        scheduler.step(x, 3, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
