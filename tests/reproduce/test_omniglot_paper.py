"""The paper's regime in small: its trajectories, noise and rivals against closed forms and PyTorch's own."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mcdi_hf import LocalConsistencyScheduler


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "reproduce"))

from omniglot_paper import block_settings, settings  # noqa: E402
from paper import block_runs, rivals, runs  # noqa: E402
from paper.block_runs import prepare_blocks, run_blocks  # noqa: E402
from paper.blocks import CHANNELS, BlockEpisodes, block_logits, filled  # noqa: E402
from paper.conv4 import Conv4  # noqa: E402
from paper.generator import Setting, betas, local_variance_ratio, scheduler_of  # noqa: E402
from paper.heads import Adam, Episodes, logits, loss_and_gradient, optimise, sharpness  # noqa: E402
from paper.report import PAGE, page, read_results  # noqa: E402
from paper.rivals import Reptile, adapt, gradient_heads, nearest_shot, run_reptile, untrained  # noqa: E402
from paper.summary import difference, estimate  # noqa: E402


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_with_the_local_variance_an_oracle_keeps_the_marginal_of_every_segment(count: int) -> None:
    scheduler = LocalConsistencyScheduler(num_segments=count)
    theta, boundaries = torch.full((1, 1), 0.7), [*scheduler.segment_boundaries.tolist()]
    left = {"local": [], "global": []}
    for segment, last in enumerate(boundaries, start=1):
        where, first = torch.tensor([segment]), (len(scheduler), *boundaries)[segment - 1] - 1
        level = scheduler.local_alphas_cumprod(torch.tensor([first]), where)
        spreads = dict.fromkeys(left, (1 - level).sqrt().item())
        mean = level.sqrt() * theta  # the marginal that the segment was trained on
        for t in range(first, last - 1, -1):
            timestep = torch.tensor([t])
            level = scheduler.local_alphas_cumprod(timestep, where)

            def moved(sample: torch.Tensor, noise: float) -> torch.Tensor:
                implied = (sample - level.sqrt() * theta) / (1 - level).sqrt()
                output = scheduler.get_target(theta, implied, timestep, where)
                return scheduler.step(output, t, sample, eta=1.0, variance_noise=torch.full((1, 1), noise)).prev_sample

            following = moved(mean, 0.0)
            kept = (moved(mean + 1, 0.0) - following).item()
            fresh = (moved(mean, 1.0) - following).item()
            ratio = local_variance_ratio(scheduler, t, t - 1)
            for name, share in {"local": ratio, "global": 1.0}.items():
                spreads[name] = ((kept * spreads[name]) ** 2 + share * fresh**2) ** 0.5
            mean = following
            ends = t == last
            after = torch.ones(1) if ends else scheduler.local_alphas_cumprod(timestep - 1, where)
            torch.testing.assert_close(mean, after.sqrt() * theta, rtol=0, atol=1e-5)
            assert spreads["local"] == pytest.approx((1 - after).sqrt().item(), abs=1e-3)
        for name, spread in spreads.items():
            left[name].append(spread)
    # The step of the whole chain leaves every target but the last with noise that no segment was trained to see.
    assert max(left["local"]) < 1e-3
    assert all(spread > 0.1 for spread in left["global"][:-1]) and left["global"][-1] < 1e-3


def test_a_step_over_a_boundary_adds_no_local_noise_and_one_chain_has_its_own() -> None:
    scheduler = LocalConsistencyScheduler()
    assert local_variance_ratio(scheduler, 13, 12) == local_variance_ratio(scheduler, 15, 11) == 0
    assert 0 < local_variance_ratio(scheduler, 15, 14) < 1
    whole = LocalConsistencyScheduler(num_segments=1)
    assert all(local_variance_ratio(whole, t, t - 1) == pytest.approx(1) for t in range(1, 20))


def test_schedules_of_any_length_go_down_to_the_same_level() -> None:
    usual = LocalConsistencyScheduler()
    assert betas(20) == pytest.approx(usual.betas.tolist(), rel=1e-5)
    for count in (5, 10, 50):
        scheduler = LocalConsistencyScheduler(trained_betas=betas(count))
        assert scheduler.alphas_cumprod[-1].item() == pytest.approx(usual.alphas_cumprod[-1].item(), rel=1e-4)


def test_the_control_draws_the_timesteps_of_local_targets() -> None:
    segments = torch.ones(40_000, dtype=torch.long)
    drawn = scheduler_of(Setting("mv_times")).sample_timesteps(segments, torch.Generator().manual_seed(0))
    share = (drawn < 7).float().mean().item()  # segments 1 and 2 have none of these, segment 3 has 7 of 20
    assert share == pytest.approx(7 / 60, abs=0.01)
    plain = scheduler_of(Setting("mv")).sample_timesteps(segments, torch.Generator().manual_seed(0))
    assert (plain < 7).float().mean().item() == pytest.approx(7 / 20, abs=0.01)


def test_coupled_noise_is_the_start() -> None:
    scheduler, target, start = scheduler_of(Setting(coupled=True)), randn(2, 5, 65), randn(2, 5, 65, seed=1)
    where = torch.tensor([15, 15]), torch.tensor([2, 3])
    expected = scheduler.add_noise(target, start, *where), scheduler.get_target(target, start, *where)
    scheduler.starts = start
    noise = randn(2, 5, 65, seed=2)
    for found, wanted in zip((scheduler.add_noise, scheduler.get_target), expected):
        torch.testing.assert_close(found(target, noise, *where), wanted)


def test_gradients_and_adam_are_those_of_pytorch() -> None:
    features, labels = randn(3, 10, 64), torch.arange(5).repeat(2)
    heads = randn(3, 5, 65, seed=1).requires_grad_()
    losses = nn.functional.cross_entropy(
        logits(heads, features).transpose(1, 2), labels.expand(3, -1), reduction="none"
    )
    loss, gradient = loss_and_gradient(heads.detach(), features, labels)
    torch.testing.assert_close(loss, losses.mean(dim=1))
    torch.testing.assert_close(gradient, torch.autograd.grad(losses.mean(dim=1).sum(), heads)[0])
    optimizer, adam, moved = torch.optim.Adam([heads], lr=0.1), Adam(0.1), heads.detach().clone()
    for seed in range(4):
        heads.grad = randn(3, 5, 65, seed=seed)
        moved = moved - adam.step(heads.grad)
        optimizer.step()
    torch.testing.assert_close(moved, heads.detach(), rtol=1e-4, atol=1e-5)


def test_trajectories_share_batches_and_sam_flattens_what_they_find() -> None:
    features = 2 * randn(12, 20, 2, 64) + randn(12, 1, 1, 64, seed=1)
    first, second = (optimise(features, 6, 0.2, 0.0, keep=3, start_seed=seed) for seed in (0, 1))
    assert first.classes.equal(second.classes) and not first.start.equal(second.start)
    assert first.targets.shape == (6, 3, 5, 65) and first.start.std().item() == pytest.approx(1, abs=0.1)
    rows, labels = features[first.classes][:, :, :15, 0].flatten(1, 2), torch.arange(5).repeat_interleave(15)
    assert (logits(first.targets[:, -1], rows).argmax(dim=-1) == labels).float().mean() > 0.95
    flat = optimise(features, 6, 0.2, 1.0, keep=3)
    rise, less = (sharpness(one.targets[:, -1], rows, labels, 0.5).mean() for one in (first, flat))
    assert 0 < less < rise


def test_a_block_is_the_last_block_of_the_network() -> None:
    weights, maps = randn(1, 69, 576) * filled(), randn(1, 7, 576, seed=1)
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    head = nn.Linear(CHANNELS, 5)
    with torch.no_grad():
        convolution.weight.copy_(weights[0, :CHANNELS].view(CHANNELS, CHANNELS, 3, 3))
        head.weight.copy_(weights[0, CHANNELS:, :CHANNELS])
        head.bias.copy_(weights[0, CHANNELS:, CHANNELS])
    norm = nn.BatchNorm2d(CHANNELS, affine=False)
    block = nn.Sequential(nn.Unflatten(1, (CHANNELS, 3, 3)), convolution, norm, nn.ReLU(), nn.MaxPool2d(2))
    expected = head(block(maps[0]).flatten(1))
    torch.testing.assert_close(block_logits(weights, maps, maps)[0], expected, rtol=1e-2, atol=2e-2)


def test_the_nearest_shot_is_a_head_and_the_gradient_fits_its_shots() -> None:
    episodes = Episodes.draw(randn(9, 20, 1, 64), 4, seed=0)
    nearest = torch.cdist(episodes.query, episodes.support).argmin(dim=-1)
    assert logits(nearest_shot(episodes), episodes.query).argmax(dim=-1).equal(nearest)
    fitted = logits(gradient_heads(episodes, torch.zeros(4, 5, 65), 0.2, 20), episodes.support)
    assert fitted.argmax(dim=-1).equal(torch.arange(5).expand(4, -1))
    assert episodes.query.shape == (4, 95, 64)


@pytest.mark.parametrize(("part", "shape"), [("head", (64,)), ("block", (576,)), ("whole", (1, 28, 28))])
def test_adapting_fits_the_shots_with_their_own_statistics(part: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, shots = untrained(part), randn(5, *shape)
    adapted = adapt(network, shots, 0.1, 30)
    assert adapted(shots).argmax(dim=-1).tolist() == [0, 1, 2, 3, 4] and not adapted.training
    before = [one.clone() for one in network.parameters()]
    assert all(one.equal(other) for one, other in zip(before, network.parameters()))


def test_estimates_are_paired_over_episodes() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 400)) * 0.1
    found = difference(0.5 + noise.repeat(3, axis=0), 0.4 + noise.repeat(3, axis=0))
    assert found["mean"] == pytest.approx(10) and found["half"] < 1e-6 and (found["above"], found["count"]) == (3, 3)
    wide = estimate(0.5 + noise)
    assert wide["half"] == pytest.approx(100 * 1.96 * noise.std(ddof=1) / 20)


def test_every_training_has_a_name_of_its_own() -> None:
    names = [setting.name() for setting in settings()]
    names += [f"{shared}-{setting.name()}" for setting, shared in block_settings()]
    assert len(names) == len(set(names)) and not [name for name in names if "/" in name]


def test_a_run_measures_and_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, sizes in {
        runs: {"TASKS": 12, "EPISODES": 6, "VALIDATION_EPISODES": 4, "PATHS": 3},
        block_runs: {"TASKS": 4, "EPISODES": 3, "ROWS": 4},
        rivals: {"EPISODES": 3, "VALIDATION_EPISODES": 2},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    parts = {"train": (12, 20, 2), "validation": (8, 20, 1), "test": (9, 20, 1)}
    for file, width in {"features": 64, "maps": 576}.items():
        tensors = {part: randn(*shape, width) for part, shape in parts.items()}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    setting = Setting("mc", "bi", steps=5)
    runs.run(setting, tmp_path)
    path = tmp_path / "runs" / f"{setting.name()}.json"
    found = json.loads(path.read_text())
    assert {len(values) for values in found["accuracy"].values()} == {6} and len(found["curve"]) == 5
    assert [len(found["boundaries"][name]) for name in ("start", "second trajectory", "sampled", "mean")] == [3] * 4
    written = path.stat().st_mtime_ns
    runs.run(setting, tmp_path)
    assert path.stat().st_mtime_ns == written
    prepare_blocks(tmp_path, True)
    run_blocks(replace(setting, level="single"), True, tmp_path)
    run_reptile(Reptile("head", 0.1, 2), "", tmp_path)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 3
    episodes = BlockEpisodes(randn(2, 5, 576), randn(2, 10, 576), torch.arange(5).repeat(2))
    assert episodes.accuracies_of_features(randn(2, 69, 576) * filled()).shape == (2,)


def test_the_network_is_four_blocks_of_64_channels() -> None:
    assert Conv4()(randn(2, 1, 28, 28)).shape == (2, 64)
    assert sum(one.numel() for one in Conv4().parameters() if one.ndim > 1) == 9 * 64 + 3 * 64 * 64 * 9


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == page(read_results())
