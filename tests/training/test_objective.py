import pytest
import torch
from random_trajectories import codec_of

from mcdi_hf import AdapterCodec, LocalConsistencyScheduler, MCDiDenoiser, TaskEncoder
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.objective import (
    OBJECTIVES,
    ConditionalDenoiser,
    TrainingBatch,
    local_consistency_loss,
    local_consistency_losses,
)


TARGETS, STEPS, WAYS, DIM, FEATURE_DIM = 3, 20, 3, 16, 7


@pytest.fixture(scope="module")
def codec() -> AdapterCodec:
    return codec_of(r=3, rank_pattern={"value": 1})


@pytest.fixture
def model(codec: AdapterCodec) -> ConditionalDenoiser:
    return make_model(codec)


def make_model(codec: AdapterCodec) -> ConditionalDenoiser:
    """A real network; the zeros that it starts from would hide most of it."""
    torch.manual_seed(0)
    denoiser = MCDiDenoiser.from_layout(codec.layout, cond_dim=DIM, dim=DIM, num_layers=2, num_heads=2)
    encoder = TaskEncoder(FEATURE_DIM, *codec.filled.shape, DIM, num_directions=8, num_prototypes=3)
    model = ConditionalDenoiser(encoder, denoiser)
    for parameter in (*denoiser.parameters(), *encoder.propose.parameters(), encoder.prototypes):
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_batch(codec: AdapterCodec, rows: int = 48, ways: tuple[int, ...] = (WAYS,)) -> TrainingBatch:
    """Random targets and support sets; the rows take the numbers of classes in turn, padded to the greatest."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor(ways).repeat(rows)[:rows]
    class_mask = torch.arange(max(ways)) < counts[:, None]
    labels = torch.arange(max(ways)).repeat(rows, 2)
    targets = torch.randn(rows, TARGETS, *codec.filled.shape, generator=generator) * codec.filled
    features = torch.randn(rows, labels.shape[1], FEATURE_DIM, generator=generator)
    gradients = torch.randn(rows, *codec.filled.shape, generator=generator) * codec.filled
    labels = labels.where(labels < counts[:, None], -1)
    support = SupportBatch(labels, class_mask, features=features, gradients=gradients)
    return TrainingBatch(targets, codec.filled, support)


def make_scheduler(objective: str, **options) -> LocalConsistencyScheduler:
    return LocalConsistencyScheduler(STEPS, **({"num_segments": TARGETS} | OBJECTIVES[objective] | options))


def loss_of(model: torch.nn.Module, scheduler: LocalConsistencyScheduler, batch: TrainingBatch) -> torch.Tensor:
    return local_consistency_loss(model, scheduler, batch, torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize(
    ("objective", "boundaries", "first"), [("mc", (13, 7, 0), 0), ("mv", (0,), 2), ("tw", (0, 0, 0), 0)]
)
def test_the_loss_is_the_formula_of_the_paper(
    codec: AdapterCodec, model: ConditionalDenoiser, objective: str, boundaries: tuple[int, ...], first: int
) -> None:
    """mc owns tau_i = T - round(i T / k); mv has the last target only, and DDPM's loss weighted by 1 - abar; tw noises
    every target along the whole chain."""
    batch = make_batch(codec)
    rows = len(batch.targets)
    generator = torch.Generator().manual_seed(5)
    segment = torch.randint(1, len(boundaries) + 1, (rows,), generator=generator)
    tau = torch.tensor(boundaries)[segment - 1]
    t = tau + (torch.rand(rows, generator=generator) * (STEPS - tau)).long()
    eps = torch.randn(batch.targets[:, 0].shape, generator=generator)
    assert set(segment.tolist()) == set(range(1, len(boundaries) + 1))

    abar = torch.cat([torch.ones(1), (1 - torch.linspace(0.01, 0.45, STEPS)).cumprod(0)])  # abar[-1] = 1 comes first
    level = abar[t + 1].view(-1, 1, 1)
    local = level / abar[tau].view(-1, 1, 1)
    theta = batch.targets[torch.arange(rows), first + segment - 1]
    x_t = local.sqrt() * theta + (1 - local).sqrt() * eps
    error = (1 - local).sqrt() * model(x_t, t, batch.support) - (1 - level).sqrt() * eps
    expected = error[:, batch.filled].square().mean()
    torch.testing.assert_close(loss_of(model, make_scheduler(objective), batch), expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_only_mv_ignores_the_earlier_targets(codec: AdapterCodec, model: ConditionalDenoiser) -> None:
    batch, changed = make_batch(codec), make_batch(codec)
    changed.targets[:, :-1] += 1
    same = {
        name: loss_of(model, make_scheduler(name), batch) == loss_of(model, make_scheduler(name), changed)
        for name in OBJECTIVES
    }
    assert same == {"mc": False, "mv": True, "tw": False}


@torch.no_grad()
def test_padding_does_not_count(codec: AdapterCodec, model: ConditionalDenoiser) -> None:
    batch, changed = (make_batch(codec, ways=(2, WAYS)) for _ in range(2))
    padding = ~batch.filled.expand_as(batch.targets)
    changed.targets[padding] = 50.0
    changed.support.features[batch.support.labels < 0] = 50.0
    scheduler = make_scheduler("mc", prediction_type="sample")
    assert padding.any()
    torch.testing.assert_close(loss_of(model, scheduler, changed), loss_of(model, scheduler, batch))
    changed.targets[:, :, 0, 0] = 50.0
    assert loss_of(model, scheduler, changed) > 2 * loss_of(model, scheduler, batch)


class Answer(torch.nn.Module):
    """A network that knows the answer by heart."""

    def __init__(self, codec: AdapterCodec, answer: torch.Tensor) -> None:
        super().__init__()
        self.denoiser, self.answer = make_model(codec).denoiser, answer

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, support: SupportBatch) -> torch.Tensor:
        return self.answer


def test_the_loss_is_the_mean_over_filled_numbers(codec: AdapterCodec) -> None:
    # One segment, the sample predicted, unit weights: the answer is the last target itself.
    batch = make_batch(codec)
    scheduler = make_scheduler("mv", prediction_type="sample", loss_weighting="unit")
    assert loss_of(Answer(codec, batch.targets[:, -1]), scheduler, batch).item() == pytest.approx(0, abs=1e-5)
    assert loss_of(Answer(codec, batch.targets[:, -1] + 2), scheduler, batch).item() == pytest.approx(4, rel=1e-5)


def test_a_wrong_number_of_segments_is_refused(codec: AdapterCodec, model: ConditionalDenoiser) -> None:
    with pytest.raises(ValueError, match="2 segments and a task 3 local targets"):
        loss_of(model, make_scheduler("mc", num_segments=2), make_batch(codec))


def test_gradients_reach_every_parameter(codec: AdapterCodec, model: ConditionalDenoiser) -> None:
    loss_of(model, make_scheduler("mc"), make_batch(codec, ways=(2, WAYS))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_segments_count_by_their_weights(codec: AdapterCodec, model: ConditionalDenoiser) -> None:
    scheduler, batch = make_scheduler("mc"), make_batch(codec)
    losses, segments = local_consistency_losses(model, scheduler, batch, torch.Generator().manual_seed(5))
    weights = [0.0, 1.0, 3.0]
    found = local_consistency_loss(model, scheduler, batch, torch.Generator().manual_seed(5), weights)
    expected = sum(weights[i - 1] * loss for i, loss in zip(segments.tolist(), losses)) / len(losses)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="expected one for each of 3 segments"):
        local_consistency_loss(model, scheduler, batch, None, [1.0])
