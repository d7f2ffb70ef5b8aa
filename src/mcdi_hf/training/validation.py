"""Accuracy on the query examples of many tasks, in stacked passes, and the controls beside it."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_accuracies
from ..data.tasks import Task
from ..pipelines.pipeline_mcdi import MCDiPipeline


Condition = Literal["own", "shuffled labels", "another task"]


@torch.no_grad()
def generated_accuracies(
    pipe: MCDiPipeline,
    examples: EncodedExamples,
    tasks: list[Task],
    condition: Condition = "own",
    tasks_at_once: int = 8,
    **settings,
) -> list[float]:
    """Generate an adapter for each task; the share of the task's query that each answers rightly.

    Args:
        pipe ([`MCDiPipeline`]): With a backbone.
        examples ([`EncodedExamples`]): The table that the tasks' rows point into.
        tasks (`list[Task]`): Their heads are always made of their own support, under the adapter that is judged.
        condition (`str`, *optional*, defaults to `"own"`): What the generator sees: the task's support, or for the controls
            the same examples with `"shuffled labels"`, which ask whether labels are read, or the support of
            `"another task"`, which asks whether anything is.
        tasks_at_once (`int`, *optional*, defaults to 8): How many are one stack.
        settings: Those of [`MCDiPipeline.__call__`]: `num_candidates`, `strength`, `temperature`, and so on.
    """
    found, device = [], pipe.stacked.device
    others = [*tasks[len(tasks) // 2 :], *tasks[: len(tasks) // 2]] if condition == "another task" else tasks
    for first in range(0, len(tasks), tasks_at_once):
        part = slice(first, first + tasks_at_once)
        support, query = (SupportBatch.from_tasks(tasks[part], name, device) for name in ("support", "query"))
        seen = SupportBatch.from_tasks(others[part], device=device)
        support.examples = query.examples = seen.examples = examples
        if condition == "shuffled labels":
            seen = shuffled_labels(seen, seed=first)
        tokens = pipe(seen, output_type="latent", return_dict=False, **settings)[0]
        tensors = pipe.codec.matrices(pipe.codec.coefficients(tokens))
        logits = pipe.stacked.episode_logits(tensors, pipe.codec.head, support, query)
        found += task_accuracies(logits, query.labels).tolist()
    return found


def shuffled_labels(support: SupportBatch, seed: int) -> SupportBatch:
    """Support sets whose labels are permuted over the examples of each task; as many of each class as before."""
    random, labels = np.random.default_rng(seed), support.labels.clone()
    for own in labels:
        known = (own >= 0).nonzero().flatten()
        own[known] = own[known[torch.from_numpy(random.permutation(len(known))).to(known.device)]]
    return replace(support, labels=labels)
