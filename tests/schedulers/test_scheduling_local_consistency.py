"""Noise levels, targets and losses in closed form; the formulas are those of arXiv 2502.01117."""

import numpy as np
import pytest
import torch
from closed_forms import BETA_SCHEDULES, PREDICTION_TYPES, convert, every_row, randn
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import logging

from mcdi_hf import LocalConsistencyScheduler


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


def test_few_trained_betas_lower_the_segments_and_say_so(caplog):
    logging.enable_propagation()
    try:
        scheduler = LocalConsistencyScheduler(num_segments=3, trained_betas=[0.1, 0.4])
    finally:
        logging.disable_propagation()
    assert "there are 2 segments" in caplog.text
    assert scheduler.config.num_segments == 2 and scheduler.segment_boundaries.tolist() == [1, 0]
    with pytest.raises(ValueError, match="num_segments"):
        LocalConsistencyScheduler(num_train_timesteps=2, num_segments=3)


def test_compatibles():
    scheduler = LocalConsistencyScheduler(
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
