"""Choosing one adapter among candidates and what is free, by cross-validation on the support."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..adapters.codec import AdapterCodec
from ..adapters.generated import GeneratedAdapter
from ..adapters.stacked import StackedLora
from ..data.episodes import SupportBatch, task_losses
from .checks import check_finite
from .pipeline_output import MCDiPipelineOutput


MAX_FOLDS = 4
FROZEN, MEAN_ADAPTER, MEAN_OF_CANDIDATES = "frozen backbone", "mean adapter", "mean of candidates"


@dataclass
class Folds:
    """Support sets with some of their examples held out: for each fold its task, and the classes of the examples that
    are `kept` and that are `held_out`, `(folds, examples)` each, -1 elsewhere.

    A class with one example has none to spare, so the adapters of such a task are judged on what they were made of:
    it has no folds.
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


class Selector:
    """Chooses among the candidates of tasks, their mean and what is free, each task in one stacked pass. `decode`
    reads whole adapters from tokens, and `generate` is the pipeline's call, to generate for a fold without its
    examples.
    """

    def __init__(
        self,
        stacked: StackedLora,
        codec: AdapterCodec,
        decode: Callable[[torch.Tensor, SupportBatch], dict[str, torch.Tensor]],
        generate: Callable[..., MCDiPipelineOutput],
    ) -> None:
        self.stacked, self.codec, self.decode, self.generate = stacked, codec, decode, generate

    def select(self, output: MCDiPipelineOutput) -> list[GeneratedAdapter]:
        """The adapter of the least loss for each task; its details say what was chosen."""
        adapters, draws = [], output.draws
        for batch, candidates in zip(draws.batches, draws.candidates):
            first, folds, of_folds = len(adapters), Folds.of(batch.labels), None
            if len(folds.tasks):
                left = replace(batch[folds.tasks], labels=folds.kept)
                again = self.generate(left, output_type="latent", **draws.again(first + folds.tasks))
                of_folds = torch.cat(again.draws.candidates)
            for task, adapter in enumerate(output.adapters[first : first + len(batch)]):
                own, members = batch[task : task + 1], folds.tasks == task
                kept, judged, made = own.labels, own.labels, candidates[task : task + 1]
                if members.any():
                    kept, judged, made = folds.kept[members], folds.held_out[members], of_folds[members]
                losses = self._losses(own, kept, judged, self._options(made))
                adapters.append(self._chosen(adapter, own, candidates[task], losses, len(made)))
                check_finite({key: value[None] for key, value in adapters[-1].tensors.items()}, first + task)
        return adapters

    def _chosen(
        self, adapter: GeneratedAdapter, task: SupportBatch, candidates: torch.Tensor, losses: torch.Tensor, folds: int
    ) -> GeneratedAdapter:
        """One task's adapter, with the tensors of the option of the least loss."""
        names = [FROZEN, MEAN_ADAPTER, *(f"candidate {index + 1}" for index in range(len(candidates)))]
        names += [MEAN_OF_CANDIDATES] if len(candidates) > 1 else []
        best = int(losses.argmin())
        options = self._options(candidates.unsqueeze(0))[0]
        tensors = self.decode(options[[best - 1]], task) if best else self._frozen_adapters(task)
        (tensors,) = self.codec.layout.unstack(tensors, [len(adapter.labels)])
        # The options are as they were generated, whatever was refined since.
        scores = {"support_losses": dict(zip(names, losses.tolist())), "folds": folds, "refine_steps": 0}
        return replace(adapter, tensors=tensors, details=replace(adapter.details, chosen=names[best], **scores))

    @staticmethod
    def _options(candidates: torch.Tensor) -> torch.Tensor:
        """The mean adapter, whose tokens are zero, the candidates, and their mean if there are several."""
        parts = [torch.zeros_like(candidates[:, :1]), candidates]
        if candidates.shape[1] > 1:
            parts.append(candidates.mean(dim=1, keepdim=True))
        return torch.cat(parts, dim=1)

    def _frozen_adapters(self, batch: SupportBatch) -> dict[str, torch.Tensor]:
        """Adapters that leave the backbone as it is, with heads imprinted from what it makes of the support."""
        tensors = self.codec.frozen_adapter(len(batch))
        if self.codec.layout.head_keys:
            head = self.stacked.free_heads(batch, self.codec.config.imprint_scale, tensors)
            tensors |= dict(zip(self.codec.layout.head_keys, head))
        return tensors

    def _losses(
        self, task: SupportBatch, kept: torch.Tensor, judged: torch.Tensor, options: torch.Tensor
    ) -> torch.Tensor:
        """The mean cross-entropy of the frozen backbone and of every option, over all folds: `(1 + options,)`.

        Args:
            task ([`SupportBatch`]): One task.
            kept, judged (`torch.Tensor` of shape `(folds, examples)`): The classes to make heads of, and to judge by.
            options (`torch.Tensor` of shape `(folds, options, tokens, token_dim)`): The tokens of the options.
        """
        count, number = options.shape[:2]
        folds = torch.zeros(count, dtype=torch.long, device=kept.device)
        made_of = replace(task[folds], labels=kept)
        frozen = self._frozen_adapters(made_of)
        each = torch.arange(count, device=kept.device).repeat_interleave(number)
        tensors = self.decode(options.flatten(0, 1), made_of[each])
        tensors = {
            key: torch.cat([frozen[key].unsqueeze(1), value.unflatten(0, (count, number))], dim=1).flatten(0, 1)
            for key, value in tensors.items()
        }
        labels = judged.repeat_interleave(1 + number, dim=0)
        judged_on = replace(task[folds.repeat_interleave(1 + number)], labels=labels)
        losses = task_losses(self.stacked.logits(tensors, judged_on), labels).unflatten(0, (count, 1 + number))
        weights = (judged >= 0).sum(dim=1, keepdim=True)
        return (losses * weights).sum(dim=0) / weights.sum()
