"""Texts that were tokenised already."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenizedText:
    """A text, or a pair, as its tokenizer left it, without padding.

    Attributes:
        inputs (`tuple[tuple[str, tuple[int, ...]], ...]`): Name of an input, such as `"input_ids"`, and its numbers.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def rows(cls, batch: Mapping[str, Any]) -> list["TokenizedText"]:
        """The examples of a tokenizer's batch.

        Args:
            batch (`Mapping`): As `tokenizer(texts)` gives it, with `input_ids` and `attention_mask`, of lists or
                tensors, padded or not.
        """
        if missing := sorted({"input_ids", "attention_mask"} - set(batch)):
            raise ValueError(f"The tokenised batch has no {missing}; it has {sorted(batch)}.")
        columns = {key: [torch.as_tensor(row).tolist() for row in values] for key, values in batch.items()}
        if len({tuple(map(len, rows)) for rows in columns.values()}) > 1:
            raise ValueError(f"The inputs {sorted(columns)} of the tokenised batch are not of one shape.")
        kept = [[place for place, one in enumerate(mask) if one] for mask in columns["attention_mask"]]
        return [
            cls(tuple((key, tuple(rows[row][place] for place in places)) for key, rows in columns.items()))
            for row, places in enumerate(kept)
        ]
