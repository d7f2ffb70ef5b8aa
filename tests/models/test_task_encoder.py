"""The task encoder sees a set of classes, each of them a set of examples: neither has an order."""

from pathlib import Path

import pytest
import torch

from mcdi_hf import TaskEncoder


FEATURE_DIM, TOKEN_DIM, NUM_TOKENS, DIM = 7, 3, 5, 10
LABELS = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 2, 2]])


@pytest.fixture
def encoder() -> TaskEncoder:
    torch.manual_seed(0)
    encoder = TaskEncoder(FEATURE_DIM, NUM_TOKENS, TOKEN_DIM, DIM, num_directions=6, num_prototypes=4).eval()
    for parameter in (*encoder.propose.parameters(), *encoder.downhill.parameters(), encoder.prototypes):  # no zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 6, FEATURE_DIM, generator=generator)
    gradients = torch.randn(2, NUM_TOKENS, TOKEN_DIM, generator=generator)
    mask = torch.ones(2, 3, dtype=torch.bool)
    return {"features": features, "gradients": gradients, "labels": LABELS, "class_mask": mask}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_order_of_examples_does_not_matter(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    shuffled = {**inputs, "features": inputs["features"][:, order], "labels": LABELS[:, order]}
    plain, other = encoder(**inputs), encoder(**shuffled)
    assert_close(other.class_tokens, plain.class_tokens)
    assert_close(other.task_token, plain.task_token)
    assert_close(other.proposal, plain.proposal)


@torch.no_grad()
def test_permuted_classes_permute_their_tokens_alone(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    order = torch.tensor([2, 0, 1])
    plain, other = encoder(**inputs), encoder(**{**inputs, "labels": order.argsort()[LABELS]})
    assert_close(other.class_tokens, plain.class_tokens[:, order])
    assert_close(other.task_token, plain.task_token)
    assert not torch.allclose(plain.class_tokens, plain.class_tokens[:, order], atol=0.1)


@torch.no_grad()
def test_padding_changes_nothing(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    padded = {
        "gradients": inputs["gradients"],
        "features": torch.nn.functional.pad(inputs["features"], (0, 0, 0, 2), value=9.0),
        "labels": torch.nn.functional.pad(LABELS, (0, 2), value=-1),
        "class_mask": torch.nn.functional.pad(inputs["class_mask"], (0, 2), value=False),
    }
    plain, other = encoder(**inputs), encoder(**padded)
    assert_close(other.class_tokens[:, :3], plain.class_tokens)
    assert other.class_tokens[:, 3:].eq(0).all()
    assert_close(other.task_token, plain.task_token)


@torch.no_grad()
@pytest.mark.parametrize("change", ["moved example", "more shots", "other labels"])
def test_content_matters(encoder: TaskEncoder, inputs: dict[str, torch.Tensor], change: str) -> None:
    if change == "moved example":
        features = inputs["features"].clone()
        features[:, 0, 0] += 1
        changed = {**inputs, "features": features}
    elif change == "more shots":  # every example twice: the means stay
        changed = {**inputs, "features": inputs["features"].repeat(1, 2, 1), "labels": LABELS.repeat(1, 2)}
    else:
        changed = {**inputs, "labels": LABELS[:, [0, 3, 4, 1, 2, 5]]}
    plain, other = encoder(**inputs), encoder(**changed)
    assert (other.task_token - plain.task_token).abs().amax() > 1e-3
    assert (other.proposal - plain.proposal).abs().amax() > 1e-3


@torch.no_grad()
def test_the_proposal_hears_direction_and_size_of_the_gradient(
    encoder: TaskEncoder, inputs: dict[str, torch.Tensor]
) -> None:
    plain = encoder(**inputs).proposal
    assert plain.shape == (2, NUM_TOKENS, TOKEN_DIM)
    for gradients in (10 * inputs["gradients"], inputs["gradients"].roll(1, dims=1)):
        assert (encoder(**{**inputs, "gradients": gradients}).proposal - plain).abs().amax() > 1e-3
    assert encoder(**{**inputs, "gradients": torch.zeros_like(inputs["gradients"])}).proposal.isfinite().all()


@torch.no_grad()
def test_nothing_is_proposed_before_any_training(inputs: dict[str, torch.Tensor]) -> None:
    assert TaskEncoder(FEATURE_DIM, NUM_TOKENS, TOKEN_DIM, DIM, 6)(**inputs).proposal.eq(0).all()


@torch.no_grad()
def test_a_task_that_is_like_a_prototype_is_proposed_it(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    before = encoder(**inputs)
    recalled = before.prototype_logits.softmax(dim=1) @ encoder.prototypes.flatten(1)
    correction = before.proposal - recalled.view_as(before.proposal)
    encoder.recall[-1].bias[2] = 1e4
    assert_close(encoder(**inputs).proposal, encoder.prototypes[2] + correction)


@torch.no_grad()
def test_proposals_are_rescaled_number_by_number(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    factors = torch.linspace(0, 3, NUM_TOKENS * TOKEN_DIM).view(NUM_TOKENS, TOKEN_DIM)
    plain = encoder(**inputs).proposal
    encoder.rescale(factors)
    assert_close(encoder(**inputs).proposal, factors * plain)


@torch.no_grad()
def test_a_direction_without_variance_drowns_no_other(encoder: TaskEncoder, inputs: dict[str, torch.Tensor]) -> None:
    same = {**inputs, "features": inputs["features"][:, :1].expand(-1, 6, -1)}
    assert encoder(**same).task_token.abs().amax() < 100


@torch.no_grad()
def test_saved_and_loaded(encoder: TaskEncoder, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    loaded = TaskEncoder.from_pretrained(tmp_path)
    class_tokens, task_token, proposal, _ = encoder(**inputs, return_dict=False)
    found = loaded(**inputs)
    assert found.class_tokens.equal(class_tokens) and found.task_token.equal(task_token)
    assert found.proposal.equal(proposal)
