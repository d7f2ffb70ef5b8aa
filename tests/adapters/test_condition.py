"""What a generator sees of a support set."""

from dataclasses import replace

import pytest
import torch
from tiny import random_codec, tiny_backbone, tiny_language_pipeline, tiny_lora_config

from mcdi_hf import AdapterCodec, StackedLora
from mcdi_hf.adapters.condition import see_support
from mcdi_hf.data.episodes import SupportBatch, task_losses


TEXTS = ["a b c", "x y", "q", "m n o p", "z", "a a a", "b c d e f", "k l"]


def make() -> tuple[StackedLora, AdapterCodec, SupportBatch]:
    codec = random_codec(tiny_backbone(), tiny_lora_config())
    stacked = StackedLora(tiny_backbone(), codec.layout)
    support = SupportBatch.from_rows([((0, 1), (2, 3)), ((4, 5, 6), (7, 0, 1)), ((2,), (3,))])
    return stacked, codec, replace(support, examples=stacked.encode(TEXTS))


def test_the_gradient_is_that_of_the_loss_of_left_out_examples() -> None:
    stacked, codec, support = make()
    seen = see_support(stacked, codec.shared_adapter(), codec.head, support)

    def losses(coefficients: torch.Tensor) -> torch.Tensor:
        features = stacked.features(codec.matrices(coefficients), support.inputs())
        return task_losses(
            codec.head.left_out_logits(features, support.labels, support.class_mask), support.labels
        ).double()

    ones, step = torch.ones(3, *codec.filled.shape), 1e-2
    for place in ((0, 0), (1, 1), (3, 0)):
        moved = torch.zeros_like(ones)
        moved[:, *place] = step
        expected = (losses(ones + moved) - losses(ones - moved)) / (2 * step)
        torch.testing.assert_close(seen.gradients[:, *place].double(), expected, rtol=0.05, atol=1e-4)
    assert seen.features.shape == (3, 6, 32) and not seen.features.requires_grad


def test_a_task_sees_nothing_of_its_neighbours_nor_of_padding() -> None:
    stacked, codec, support = make()
    seen = see_support(stacked, codec.shared_adapter(), codec.head, support)
    alone = SupportBatch.from_rows([((0, 1), (2, 3))])
    alone = see_support(stacked, codec.shared_adapter(), codec.head, replace(alone, examples=support.examples))
    torch.testing.assert_close(seen.gradients[:1], alone.gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(seen.features[:1, :4], alone.features, rtol=1e-4, atol=1e-5)


def test_labels_change_the_gradient_and_not_the_features() -> None:
    stacked, codec, support = make()
    swapped = support.labels.clone()
    swapped[0] = torch.tensor([0, 1, 0, 1, -1, -1])
    seen, other = (
        see_support(stacked, codec.shared_adapter(), codec.head, support),
        see_support(stacked, codec.shared_adapter(), codec.head, replace(support, labels=swapped)),
    )
    assert other.features.equal(seen.features)
    assert not torch.allclose(other.gradients[0], seen.gradients[0], rtol=0.1)


@pytest.mark.parametrize("classes", [[("a", "b")], [("c", "d")]])
def test_a_language_model_is_judged_by_its_verbalizers(classes: list) -> None:
    pipe, _ = tiny_language_pipeline()
    support = SupportBatch.from_rows([((0, 1), (2, 3))], classes)
    seen = see_support(
        pipe.stacked,
        pipe.codec.shared_adapter(),
        pipe.codec.head,
        replace(support, examples=pipe.stacked.encode(TEXTS)),
    )
    assert seen.gradients.abs().max() > 0
