"""The controls against what their definitions say, in closed form or within the error of many draws."""

import pytest
import torch
from tiny import assert_close, seeded

from mcdi_hf.evaluation.controls import noised, pca_samples


def adapters(count: int) -> dict[str, torch.Tensor]:
    generator = seeded(3)
    return {
        "one.lora_A": 2 + 0.5 * torch.randn(count, 2, 3, generator=generator),
        "one.lora_B": torch.randn(count, 4, 1, generator=generator) * torch.tensor([[5.0], [1.0], [0.1], [0.0]]) - 1,
    }


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in tensors.values()], dim=1)


def test_noise_is_as_wide_as_the_training_adapters_are_spread() -> None:
    reference = {"a": torch.tensor([[[1.0, 4.0]], [[3.0, 4.0]]]), "b": torch.full((2, 3), 7.0)}
    # Differences from the mean: -1, 1, 0, 0 in "a", none in "b".
    tensors = {"a": torch.full((20_000, 1, 2), 5.0), "b": torch.full((20_000, 3), 5.0)}
    found = noised(tensors, reference, 2.0, seeded())
    assert found["b"].equal(tensors["b"])
    assert found["a"].mean().item() == pytest.approx(5.0, abs=0.03)
    assert found["a"].std().item() == pytest.approx(2.0 * 0.5**0.5, rel=0.02)
    assert found["a"].std(dim=0).flatten().tolist() == pytest.approx([2.0 * 0.5**0.5] * 2, rel=0.02)


def test_noise_of_no_width_changes_nothing_and_a_seed_gives_the_same() -> None:
    tensors = adapters(4)
    assert all(value.equal(tensors[key]) for key, value in noised(tensors, tensors, 0.0, seeded()).items())
    first, second = (noised(tensors, tensors, 1.0, seeded(5)) for _ in range(2))
    assert all(value.equal(second[key]) and not value.equal(tensors[key]) for key, value in first.items())


def test_samples_have_the_mean_and_the_covariance_of_the_training_adapters() -> None:
    training = adapters(6)
    found = pca_samples(training, 40_000, generator=seeded())
    assert {key: value.shape for key, value in found.items()} == {
        "one.lora_A": (40_000, 2, 3),
        "one.lora_B": (40_000, 4, 1),
    }
    given, made = flat(training), flat(found)
    scale = torch.cov(given.T).diag().max().item()
    torch.testing.assert_close(made.mean(dim=0), given.mean(dim=0), rtol=0, atol=0.03 * scale**0.5)
    torch.testing.assert_close(torch.cov(made.T), torch.cov(given.T), rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize("num_components", [None, 5, 2, 1])
def test_samples_lie_in_the_span_of_the_greatest_components(num_components: int | None) -> None:
    training = adapters(6)
    given = flat(training)
    made = flat(pca_samples(training, 30, num_components, seeded())) - given.mean(dim=0)
    count = num_components or 5
    components = torch.linalg.svd(given - given.mean(dim=0), full_matrices=False).Vh[:count]
    assert_close(made @ components.T @ components, made)
    assert torch.linalg.matrix_rank(made, rtol=1e-4) == count


def test_the_number_of_components_is_checked() -> None:
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"num_components is {number}: expected 1 to 5, one less than the 6"):
            pca_samples(adapters(6), 3, number)
