"""Choosing one adapter among candidates and what is free, by cross-validation on the support."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..adapters.codec import AdapterCodec
from ..adapters.generated import GeneratedAdapter
from ..adapters.stacked import StackedLora
from ..data.episodes import SupportBatch
from .checks import check_finite
from .pipeline_output import MCDiPipelineOutput


MAX_FOLDS = 4
FROZEN, SHARED, GENERATED = "frozen backbone", "shared adapter", "mean of candidates"
TEMPERATURES = torch.logspace(-1, 2, 31)  # that held-out logits may be divided by


@dataclass
class Folds:
    """Support sets with some of their examples held out: for each fold its task, and the classes of the examples that
    are `kept` and that are `held_out`, `(folds, examples)` each, -1 elsewhere.

    A class with one example has none to spare: such a task has no folds.
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
    """Chooses among the candidates of tasks, their mean and what is free, each task in stacked passes. `generate` is the
    pipeline's call, to generate for a fold without its examples.

    All options are coefficients of the shared basis: 0 is the frozen backbone, 1 the shared adapter.
    """

    def __init__(self, stacked: StackedLora, codec: AdapterCodec, generate: Callable[..., MCDiPipelineOutput]) -> None:
        self.stacked, self.codec, self.generate = stacked, codec, generate

    def select(self, output: MCDiPipelineOutput) -> list[GeneratedAdapter]:
        """The adapter of each task that judges its own support best; its details say what was chosen."""
        adapters, draws = [], output.draws
        for batch, candidates in zip(draws.batches, draws.candidates):
            first, folds, of_folds = len(adapters), Folds.of(batch.labels), None
            if len(folds.tasks):
                left = replace(batch[folds.tasks], labels=folds.kept, features=None, gradients=None)
                again = self.generate(left, output_type="latent", **draws.again(first + folds.tasks))
                of_folds = torch.cat(again.draws.candidates)
            for task, adapter in enumerate(output.adapters[first : first + len(batch)]):
                own, members, options = batch[task : task + 1], folds.tasks == task, self._options(candidates[[task]])
                names, details = self._names(candidates.shape[1]), {"folds": int(members.sum()), "refine_steps": 0}
                best = names.index(GENERATED)
                if members.any():
                    kept, held_out = folds.kept[members], folds.held_out[members]
                    logits = self._held_out_logits(own, kept, self._options(of_folds[members]))
                    right, losses = held_out_scores(logits, held_out)
                    best = choose(right, losses, best)
                    details["support_accuracies"] = dict(zip(names, right.float().mean(dim=1).tolist()))
                    details["support_losses"] = dict(zip(names, losses.tolist()))
                tensors = self.codec.complete(self.codec.matrices(options[0, [best]]), own, self.stacked)
                check_finite(tensors, first + task)
                (tensors,) = self.codec.layout.unstack(tensors, [len(adapter.labels)])
                chosen = replace(adapter.details, chosen=names[best], **details)
                adapters.append(replace(adapter, tensors=tensors, details=chosen))
        return adapters

    @staticmethod
    def _names(candidates: int) -> list[str]:
        return [
            FROZEN,
            SHARED,
            GENERATED,
            *(f"candidate {number + 1}" for number in range(candidates) if candidates > 1),
        ]

    def _options(self, candidates: torch.Tensor) -> torch.Tensor:
        """The coefficients `(folds, options, num_tokens, token_dim)` of what is free, of the mean of the candidates, and of
        each of them if there are several; candidates are tokens `(folds, candidates, num_tokens, token_dim)`."""
        made = self.codec.coefficients(candidates)
        mean = made.mean(dim=1, keepdim=True)
        parts = [torch.zeros_like(mean), torch.ones_like(mean), mean]
        return torch.cat(parts + ([made] if made.shape[1] > 1 else []), dim=1)

    def _held_out_logits(self, task: SupportBatch, kept: torch.Tensor, options: torch.Tensor) -> torch.Tensor:
        """What every option of every fold says of all of a task's examples under a head of the kept ones: `(options,
        folds, examples, classes)`.

        Args:
            task ([`SupportBatch`]): One task.
            kept (`torch.Tensor` of shape `(folds, examples)`): The classes to make heads of.
            options (`torch.Tensor` of shape `(folds, options, num_tokens, token_dim)`): Their coefficients.
        """
        count, number = options.shape[:2]
        rows = torch.zeros(count * number, dtype=torch.long)
        made_of = replace(task[rows], labels=kept.repeat_interleave(number, dim=0))
        tensors = self.codec.complete(self.codec.matrices(options.flatten(0, 1)), made_of, self.stacked)
        return self.stacked.logits(tensors, task[rows]).unflatten(0, (count, number)).transpose(0, 1)


def held_out_scores(logits: torch.Tensor, held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How well options judge held-out examples: which they answer rightly, `(options, held out)`, and the mean
    cross-entropy at the temperature that suits each option best, so that none is worse for being sharper: `(options,)`.

    Args:
        logits (`torch.Tensor` of shape `(options, folds, examples, classes)`): Minus infinity for padding classes.
        held_out (`torch.Tensor` of shape `(folds, examples)`): Classes from 0; -1 marks what is not held out.
    """
    asked = held_out >= 0
    picked, truth = logits[:, asked], held_out[asked]
    right = picked.argmax(dim=-1) == truth
    scaled = picked / TEMPERATURES.to(picked).view(-1, 1, 1, 1)
    truth = truth.expand(scaled.shape[:-1])
    losses = torch.nn.functional.cross_entropy(scaled.flatten(0, 2), truth.flatten(), reduction="none")
    return right, losses.unflatten(0, truth.shape).mean(dim=2).min(dim=0).values


def choose(right: torch.Tensor, losses: torch.Tensor, preferred: int) -> int:
    """The `preferred` option, unless others answer rightly more often by more than a standard error: then that of the most
    right answers, and of the least loss among those that have as many.

    On the few examples of a support set the best of several options is mostly the luckiest. Two options differ by chance by
    the square root of the number of examples on which they differ.

    Args:
        right (`torch.Tensor` of shape `(options, held out)`): Whether each option answers each held-out example rightly.
        losses (`torch.Tensor` of shape `(options,)`): The mean loss of each.
        preferred (`int`): The number of one of them.
    """
    gain = right.sum(dim=1) - right[preferred].sum()
    chance = (right != right[preferred]).sum(dim=1).sqrt()
    if not (gain > chance).any():
        return preferred
    most = torch.where(gain > chance, gain, -1)
    return int(torch.where(most == most.max(), losses, torch.inf).argmin())
