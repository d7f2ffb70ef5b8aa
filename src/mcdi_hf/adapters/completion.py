"""From tokens to whole adapters: what was generated, and the free part of the head."""

import torch

from ..layers import EncodedExamples
from .codec import AdapterCodec
from .head import class_means, imprint_head
from .stacked import StackedLora


def complete_adapters(
    codec: AdapterCodec,
    tokens: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    class_mask: torch.Tensor,
    stacked: StackedLora | None = None,
    examples: EncodedExamples | None = None,
    rows: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Read adapters from tokens, with the free part of their heads, if they have any, imprinted from their support.

    Args:
        codec (`AdapterCodec`): The fitted codec.
        tokens (`torch.Tensor` of shape `(adapters, tokens, token_dim)`): The generated tokens.
        features (`torch.Tensor` of shape `(adapters, examples, feature_dim)`): The support as the head reads it under
            the mean adapter.
        labels (`torch.Tensor` of shape `(adapters, examples)`): Its classes from 0; -1 marks padding.
        class_mask (`torch.Tensor` of shape `(adapters, classes)`): False marks padding.
        stacked (`StackedLora`, *optional*): With it the heads are imprinted from what each generated adapter makes of
            its support, in a pass of their own; without it from `features`.
        examples (`EncodedExamples`, *optional*): The examples of that pass.
        rows (`torch.Tensor` of shape `(adapters, views * examples)`, *optional*): The support's rows in `examples`, those
            of the first view first.

    Returns:
        Key on disk -> `torch.Tensor` of shape `(adapters, *shape)`.
    """
    if not codec.layout.head_keys:
        return codec.decode(tokens)
    scale = codec.config.imprint_scale
    if stacked is None:
        means = class_means(features, labels, class_mask.shape[1]).to(codec.mean.dtype)
        return codec.decode(tokens, imprint_head(means, scale, class_mask))
    inputs = examples[rows.flatten()]
    return codec.decode(tokens, stacked.imprint(codec.decode_matrices(tokens), inputs, labels, class_mask, scale))
