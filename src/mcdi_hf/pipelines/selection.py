"""Choosing one adapter among candidates and what is free, by cross-validation on the support."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .support import SupportBatch


if TYPE_CHECKING:
    from .pipeline_mcdi import MCDiPipeline


MAX_FOLDS = 4
FROZEN, MEAN_ADAPTER, AVERAGE = "frozen backbone", "mean adapter", "mean of candidates"


@dataclass
class Folds:
    """Support sets with some of their examples held out.

    A class with one example has none to spare, so the adapters of such a task are judged on what they were made of: it
    has no folds.

    Attributes:
        tasks (`torch.Tensor` of shape `(folds,)`): Whose fold it is.
        kept (`torch.Tensor` of shape `(folds, examples)`): The classes of the examples that are left, -1 elsewhere.
        held_out (`torch.Tensor` of shape `(folds, examples)`): The classes of those that are not, -1 elsewhere.
    """

    tasks: torch.Tensor
    kept: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor) -> "Folds":
        """Hold out every example once, a like share of each class at a time.

        Args:
            labels (`torch.Tensor` of shape `(tasks, examples)`): Classes from 0; -1 marks padding.
        """
        member = labels.unsqueeze(1) == torch.arange(int(labels.max()) + 1, device=labels.device).unsqueeze(-1)
        counts = member.sum(dim=2)
        fewest = torch.where(counts > 0, counts, MAX_FOLDS).min(dim=1).values.clamp(max=MAX_FOLDS).tolist()
        place = torch.where(member, member.cumsum(dim=2) - 1, 0).sum(dim=1)  # of an example in its class
        pairs = [(task, fold) for task, number in enumerate(fewest) if number > 1 for fold in range(number)]
        tasks = torch.tensor([task for task, _ in pairs], dtype=torch.long, device=labels.device)
        folds = torch.tensor([fold for _, fold in pairs], dtype=torch.long, device=labels.device)
        numbers = torch.tensor(fewest, device=labels.device)[tasks]
        out = (place[tasks] % numbers.unsqueeze(-1)) == folds.unsqueeze(-1)
        own = labels[tasks]
        return cls(tasks, own.masked_fill(out, -1), own.masked_fill(~out, -1))


@dataclass
class Choice:
    """What was chosen for one task.

    Attributes:
        option (`str`): `"frozen backbone"`, `"mean adapter"`, `"candidate I"` or `"mean of candidates"`.
        tokens (`torch.Tensor` of shape `(tokens, token_dim)`, *optional*): Its tokens; none say the frozen backbone.
        scores (`dict[str, float]`): Option -> mean cross-entropy on examples that it was not made of, if there were
            folds, and on the support itself otherwise.
        num_folds (`int`): The folds; 1 without any.
    """

    option: str
    tokens: torch.Tensor | None
    scores: dict[str, float]
    num_folds: int


def choose(
    pipe: "MCDiPipeline",
    candidates: torch.Tensor,
    of_folds: torch.Tensor,
    folds: Folds,
    batch: SupportBatch,
    classes: list[tuple[str, ...]],
) -> list[Choice]:
    """Judge the candidates of every task, and what is free, each task in one stacked pass.

    Args:
        pipe ([`MCDiPipeline`]): The generator.
        candidates (`torch.Tensor` of shape `(tasks, candidates, tokens, token_dim)`): Made of the whole support.
        of_folds (`torch.Tensor` of shape `(folds, candidates, tokens, token_dim)`): From the same noise, made of what
            each fold leaves.
        folds ([`Folds`]): The folds.
        batch ([`SupportBatch`]): The support sets, with examples.
        classes (`list[tuple[str, ...]]`): The class names of every task.
    """
    words = pipe.stacked.word_heads(classes)
    chosen = []
    for task, own in enumerate(candidates):
        members = folds.tasks == task
        head = words and tuple(values[task] for values in words)
        if members.any():
            kept, judged, made = folds.kept[members], folds.held_out[members], of_folds[members]
        else:
            kept = judged = batch.labels[task].unsqueeze(0)
            made = own.unsqueeze(0)
        losses = _losses(pipe, _options(made), kept, judged, batch, task, head)
        options = _options(own.unsqueeze(0))[0]
        names = [FROZEN, MEAN_ADAPTER, *(f"candidate {number + 1}" for number in range(len(own)))]
        names += [AVERAGE] if len(own) > 1 else []
        best = int(losses.argmin())
        tokens = None if best == 0 else options[best - 1]
        chosen.append(Choice(names[best], tokens, dict(zip(names, losses.tolist())), len(made)))
    return chosen


def frozen_adapters(
    pipe: "MCDiPipeline", batch: SupportBatch, labels: torch.Tensor, words: tuple[torch.Tensor, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Adapters that leave the backbone as it is, with heads imprinted from what it makes of the support.

    Args:
        pipe ([`MCDiPipeline`]): The generator.
        batch ([`SupportBatch`]): The support sets, with examples.
        labels (`torch.Tensor` of shape `(tasks, examples)`): The classes of those to imprint from, -1 elsewhere.
        words (`tuple`, *optional*): The words that stand in for the heads of a language model.

    Returns:
        Key -> `torch.Tensor` of shape `(tasks, *shape)`.
    """
    tensors = pipe.codec.mean_adapter(len(labels))
    tensors = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}
    if words is None:
        inputs, scale = batch.examples[batch.rows.flatten()], pipe.codec.config.imprint_scale
        head = pipe.stacked.imprint(tensors, inputs, labels, batch.class_mask, scale)
        tensors |= dict(zip(pipe.codec.layout.head_keys, head))
    return tensors


def _options(candidates: torch.Tensor) -> torch.Tensor:
    """The mean adapter, whose tokens are zero, the candidates, and their mean if there are several."""
    parts = [torch.zeros_like(candidates[:, :1]), candidates]
    if candidates.shape[1] > 1:
        parts.append(candidates.mean(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def _losses(pipe, options, kept, judged, batch, task, words) -> torch.Tensor:
    """The mean cross-entropy of the frozen backbone and of every option, over all folds: `(1 + options,)`."""
    count, number = options.shape[:2]
    part = batch.repeat(task, count * number, kept.repeat_interleave(number, dim=0))
    tensors = pipe.complete(options.flatten(0, 1), part)
    plain = batch.repeat(task, count, kept)
    frozen = frozen_adapters(pipe, plain, kept, words)
    tensors = {
        key: torch.cat([frozen[key].unsqueeze(1), value.unflatten(0, (count, number))], dim=1).flatten(0, 1)
        for key, value in tensors.items()
    }
    part = batch.repeat(task, count * (1 + number), judged.repeat_interleave(1 + number, dim=0))
    head = words and tuple(value.expand(len(part.labels), *value.shape) for value in words)
    logits = pipe.stacked.logits(tensors, part.examples[part.plain_rows.flatten()], part.class_mask, head)
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), part.labels, ignore_index=-1, reduction="none"
    ).unflatten(0, (count, 1 + number))
    return losses.sum(dim=(0, 2)) / (judged >= 0).sum()
