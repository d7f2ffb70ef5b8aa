"""Examples after the frozen lower layers: a table that the upper layers take rows of."""

from dataclasses import dataclass

import torch


@dataclass
class EncodedExamples:
    """Examples after the frozen lower layers, ready for any number of passes through the adapted upper ones.

    Attributes:
        hidden_states (`torch.Tensor`): Input of the first adapted layer. Of texts the tokens, one text behind the
            other and without padding: `(tokens, hidden)`. Of images `(views * examples, length, hidden)`, since all
            are of one length. It may be memory-mapped.
        device (`torch.device`): Where the upper layers are; the picked rows are brought there.
        starts, counts (`torch.Tensor` of shape `(views * examples,)`, *optional*): The first token of each text in
            `hidden_states` and the number of its tokens, on the CPU. Images have none.
        num_views (`int`, *optional*, defaults to 1): The examples as they are come first; the other views of the same
            examples, in the same order, are augmented ones.
    """

    hidden_states: torch.Tensor
    device: torch.device
    starts: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    num_views: int = 1

    def __len__(self) -> int:
        """The number of examples, whatever the number of views."""
        return len(self.hidden_states if self.counts is None else self.counts) // self.num_views

    def __getitem__(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the upper layers for some rows; texts are padded with zeros to the longest of them."""
        if self.counts is None:
            return {"pixel_values": self.hidden_states[rows].to(self.device)}
        counts = self.counts[rows]
        places = torch.arange(int(counts.max()))
        mask = places < counts.unsqueeze(1)
        tokens = (self.starts[rows].unsqueeze(1) + places)[mask]
        picked = self.hidden_states[tokens].to(self.device)
        mask = mask.to(self.device)
        padded = picked.new_zeros(*mask.shape, picked.shape[1])
        padded[mask] = picked
        return {"inputs_embeds": padded, "attention_mask": mask.long()}

    def lengths(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of tokens of some rows: `(rows,)`."""
        if self.counts is None:
            return torch.full((len(rows),), self.hidden_states.shape[1])
        return self.counts[rows]

    def means(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean hidden state of some rows over their tokens, or patches: `(rows, hidden)`."""
        inputs = self[rows]
        if self.counts is None:
            return inputs["pixel_values"].mean(dim=1)
        return inputs["inputs_embeds"].sum(dim=1) / inputs["attention_mask"].sum(dim=1, keepdim=True)
