"""Accuracy on the query examples of many tasks, in stacked passes."""

import torch

from ..adapters.head import head_logits
from ..adapters.stacked import StackedLora
from ..episodes import Episodes, rows_and_labels
from ..layers import EncodedExamples
from ..pipelines.pipeline_mcdi import MCDiPipeline
from ..pipelines.support import SupportBatch
from ..tasks import Task
from ..trajectories.shared import free_heads


@torch.no_grad()
def query_accuracy(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], examples: EncodedExamples, task: Task
) -> float:
    """The share of a task's query examples that one adapter classifies rightly.

    Args:
        stacked (`StackedLora`): The backbone.
        tensors (`dict[str, torch.Tensor]`): Key -> tensor of one adapter, without a stack dimension. A language model's
            has no head: the words for the classes are.
        examples (`EncodedExamples`): The data set that the task's rows point into.
        task (`Task`): The task.
    """
    rows, labels = rows_and_labels(task.query)
    own = {key: value.unsqueeze(0) for key, value in tensors.items()}
    features = stacked.features_of_all(own, examples, rows).unsqueeze(0)
    logits = stacked.apply_head(own, features, words=stacked.word_heads([task.classes]))
    return (logits[0].argmax(dim=-1).cpu() == labels).float().mean().item()


@torch.no_grad()
def generated_accuracies(
    pipe: MCDiPipeline,
    examples: EncodedExamples,
    features: torch.Tensor,
    tasks: list[Task],
    conditions: list[Task] | None = None,
    num_candidates: int = 1,
    strength: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    tasks_at_once: int = 16,
    condition_features: torch.Tensor | None = None,
) -> list[float]:
    """Generate an adapter for each task and judge it on the task's query.

    Args:
        pipe (`MCDiPipeline`): The generator, with its backbone.
        examples (`EncodedExamples`): The data set that the tasks' rows point into.
        features (`torch.Tensor` of shape `(rows, feature_dim)`): What the head reads of it under the mean adapter.
        tasks (`list[Task]`): The tasks.
        conditions (`list[Task]`, *optional*): Tasks of as many classes, whose support the generator sees instead: the
            control that asks whether the condition matters.
        num_candidates, strength, temperature, generator: As in [`MCDiPipeline.__call__`]; candidates are averaged.
        tasks_at_once (`int`, *optional*, defaults to 16): Tasks of a stack.
        condition_features (`torch.Tensor` of shape `(rows, feature_dim)`, *optional*): What the generator sees of each
            row, if not `features`: those of noise, for instance.

    Returns:
        The share of right answers for each task.
    """
    if conditions is not None and [len(one.classes) for one in conditions] != [len(one.classes) for one in tasks]:
        raise ValueError("The conditions are not as many as the tasks, with as many classes each: expected the same.")
    found = []
    for first in range(0, len(tasks), tasks_at_once):
        part = slice(first, first + tasks_at_once)
        tensors = generated_tensors(
            pipe,
            examples,
            features,
            tasks[part],
            None if conditions is None else conditions[part],
            num_candidates,
            strength,
            temperature,
            generator,
            condition_features,
        )
        found += _query_accuracies(pipe.stacked, tensors, examples, tasks[part])
    return found


@torch.no_grad()
def generated_tensors(
    pipe: MCDiPipeline,
    examples: EncodedExamples,
    features: torch.Tensor,
    tasks: list[Task],
    conditions: list[Task] | None = None,
    num_candidates: int = 1,
    strength: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    condition_features: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Generate an adapter for each task, all in one stack: key -> `(tasks, *shape)`.

    Args:
        pipe, examples, features, tasks, conditions, num_candidates, strength, temperature, generator,
        condition_features: As in [`generated_accuracies`].
    """
    shown = features if condition_features is None else condition_features
    episodes = Episodes.of(tasks, pipe.stacked.device)
    seen = episodes if conditions is None else Episodes.of(conditions, pipe.stacked.device)
    tokens = pipe.sample(
        shown[seen.support].repeat_interleave(num_candidates, dim=0),
        seen.labels.repeat_interleave(num_candidates, dim=0),
        episodes.class_mask.repeat_interleave(num_candidates, dim=0),
        temperature=temperature,
        generator=generator,
    )
    tokens = tokens.unflatten(0, (-1, num_candidates)).mean(dim=1)
    tokens = tokens * (pipe.config.strength if strength is None else strength)
    support = episodes.support
    return pipe.complete(
        tokens, SupportBatch(features[support], episodes.labels, episodes.class_mask, support, examples)
    )


@torch.no_grad()
def free_accuracies(
    stacked: StackedLora,
    features: torch.Tensor,
    scale: float,
    tasks: list[Task],
    support_features: torch.Tensor | None = None,
) -> list[float]:
    """The accuracy of one adapter for all tasks, with heads that need no training: imprinted from support, or words.

    Args:
        stacked (`StackedLora`): The backbone; a language model's heads are the words for the classes.
        features (`torch.Tensor` of shape `(rows, feature_dim)`): What the head reads of every example under it.
        scale (`float`): See [`imprint_head`].
        tasks (`list[Task]`): The tasks.
        support_features (`torch.Tensor` of shape `(rows, feature_dim)`, *optional*): What it reads of support examples,
            if not `features`: the mean of several views, for instance.
    """
    episodes = Episodes.of(tasks, features.device)
    support = features if support_features is None else support_features
    head = free_heads(stacked, support, tasks, episodes.class_mask, scale)
    return episodes.accuracies(head_logits(features[episodes.query], *head, episodes.class_mask))


def _query_accuracies(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], examples: EncodedExamples, tasks: list[Task]
) -> list[float]:
    """The accuracy of each task's own whole adapter on its query, in one stack."""
    episodes, words = Episodes.of(tasks, stacked.device), stacked.word_heads([task.classes for task in tasks])
    return episodes.accuracies(stacked.logits(tensors, examples[episodes.query.flatten()], episodes.class_mask, words))


@torch.no_grad()
def adapter_accuracies(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    examples: EncodedExamples,
    tasks: list[Task],
    scale: float,
    tasks_at_once: int = 16,
) -> list[float]:
    """The accuracy of an adapter for each task, its head imprinted from what it makes of the task's support, or words.

    Args:
        stacked (`StackedLora`): The backbone; a language model's heads are the words for the classes.
        tensors (`dict[str, torch.Tensor]`): Key -> `(tasks, *shape)`, the LoRA matrices of each task's adapter.
        examples (`EncodedExamples`): The data set that the tasks' rows point into.
        tasks (`list[Task]`): The tasks, with any numbers of classes and examples.
        scale (`float`): See [`imprint_head`].
        tasks_at_once (`int`, *optional*, defaults to 16): Tasks of a stack.

    Returns:
        The share of right answers for each task.
    """
    if other := {key: len(value) for key, value in tensors.items() if len(value) != len(tasks)}:
        raise ValueError(f"There are {len(tasks)} tasks, but so many adapters: {other}. Expected one a task.")
    found = []
    for first in range(0, len(tasks), tasks_at_once):
        part = tasks[first : first + tasks_at_once]
        episodes = Episodes.of(part, stacked.device)
        own = {key: value[first : first + len(part)].to(stacked.device) for key, value in tensors.items()}
        head = stacked.word_heads([task.classes for task in part])
        if head is None:
            support = examples[episodes.support.flatten()]
            head = stacked.imprint(own, support, episodes.labels, episodes.class_mask, scale)
        features = stacked.features(own, examples[episodes.query.flatten()])
        found += episodes.accuracies(head_logits(features, *head, episodes.class_mask))
    return found


def support_texts(texts: list[str], task: Task) -> dict[str, list[str]]:
    """A task's support as texts, from those of all rows."""
    return {name: [texts[row] for row in rows] for name, rows in zip(task.classes, task.support)}
