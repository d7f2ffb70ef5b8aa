"""Steps that take noise away, in closed form and against diffusers' own schedulers."""

import pytest
import torch
from closed_forms import BETA_SCHEDULES, PREDICTION_TYPES, convert, every_row, randn
from diffusers import DDIMScheduler, DDPMScheduler

from mcdi_hf import LocalConsistencyScheduler


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


def test_timesteps_of_ones_own_are_those_of_the_spacing_if_they_are_the_same():
    spaced, own = LocalConsistencyScheduler(), LocalConsistencyScheduler()
    spaced.set_timesteps(5)
    own.set_timesteps(timesteps=spaced.timesteps.tolist())
    assert own.timesteps.equal(spaced.timesteps) and own.num_inference_steps == 5
    own.set_timesteps(timesteps=[12, 3, 1])
    theta, x = randn(2, 5), randn(2, 5, seed=1)
    for t in own.timesteps:
        local = own.alphas_cumprod[t]
        x = own.step((x - local.sqrt() * theta) / (1 - local).sqrt(), t, x).prev_sample
    torch.testing.assert_close(x, theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("timesteps", [[], [3, 12], [12, 12], [20, 3], [3, -1]])
def test_timesteps_that_do_not_fall_are_refused(timesteps):
    scheduler = LocalConsistencyScheduler()
    with pytest.raises(ValueError, match="`timesteps` are .*must fall, from 19"):
        scheduler.set_timesteps(timesteps=timesteps)
    assert len(scheduler.timesteps) == 20
    for arguments in ({}, {"num_inference_steps": 3, "timesteps": [2, 1, 0]}):
        with pytest.raises(ValueError, match="one of them"):
            scheduler.set_timesteps(**arguments)


def test_previous_timestep():
    scheduler = LocalConsistencyScheduler()
    assert [scheduler.previous_timestep(t) for t in (19, 7, torch.tensor(1), 0)] == [18, 6, 0, -1]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [19, 15, 11, 7, 3]
    assert [scheduler.previous_timestep(t) for t in (19, 7, 6, 3, 0)] == [15, 3, 3, -1, -1]


def test_step_takes_a_generator_for_every_row():
    scheduler = LocalConsistencyScheduler()
    output, x = randn(2, 5), randn(2, 5, seed=1)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    rows = scheduler.step(output, 9, x, eta=1.0, generator=generators).prev_sample
    alone = scheduler.step(output[1:], 9, x[1:], eta=1.0, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(rows[1:], alone)
