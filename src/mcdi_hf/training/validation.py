"""Accuracy on the query examples of many tasks, in stacked passes."""

from dataclasses import replace

import torch

from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch, task_accuracies
from ..data.tasks import Task
from ..pipelines.pipeline_mcdi import MCDiPipeline


@torch.no_grad()
def generated_accuracies(
    pipe: MCDiPipeline,
    examples: EncodedExamples,
    features: torch.Tensor,
    tasks: list[Task],
    conditions: list[Task] | None = None,
    tasks_at_once: int = 16,
    **settings,
) -> list[float]:
    """Generate an adapter for each task; the share of the task's query that each answers rightly.

    `examples` are the table that the tasks' rows point into, and `features` `(rows, feature_dim)` what the head
    reads of it under the mean adapter. `conditions` are tasks of as many classes, whose support the generator sees
    instead, while heads are imprinted from the tasks' own: the control that asks whether the condition matters.
    `settings` are those of [`MCDiPipeline.__call__`]: `num_candidates`, `strength`, `temperature`, and so on.
    """
    if conditions is not None and [len(one.classes) for one in conditions] != [len(one.classes) for one in tasks]:
        raise ValueError("The conditions are not as many as the tasks, with as many classes each: expected the same.")
    found = []
    for first in range(0, len(tasks), tasks_at_once):
        part = slice(first, first + tasks_at_once)
        support = SupportBatch.from_tasks(tasks[part], device=pipe.stacked.device)
        support = replace(support, features=features[support.rows], examples=examples)
        seen = support
        if conditions is not None:
            seen = SupportBatch.from_tasks(conditions[part], device=pipe.stacked.device)
            seen.features = features[seen.rows]
        tokens = pipe(seen, output_type="latent", return_dict=False, **settings)[0]
        query = SupportBatch.from_tasks(tasks[part], "query", pipe.stacked.device)
        query.examples = examples
        logits = pipe.stacked.logits(pipe.decode_adapters(tokens, support), query)
        found += task_accuracies(logits, query.labels).tolist()
    return found
