"""Many tasks, each with an adapter of its own, judged in stacked passes."""

import pytest
import torch
from tiny import pipeline_for, random_adapters, tiny_backbone, tiny_language_pipeline, tiny_lora_config

from mcdi_hf import Task
from mcdi_hf.training.validation import adapter_accuracies, free_accuracies, query_accuracy


TEXTS = ["a b", "c a d e", "b c", "x y w", "z y", "a x", "y b k l m", "z c", "q", "r q s", "t", "u v t"]
# Of two and three classes, of one to three shots, and of queries of many sizes: most of a stack is padding.
TASKS = [
    Task(("p", "q"), ((0,), (3,)), ((1, 2, 5, 7), (4, 6, 8, 9)), "all"),
    Task(("q", "r", "s"), ((0, 1, 2), (3, 4, 5), (8, 9)), ((6, 7, 10), (11,), (3,)), "all"),
    Task(("p", "s"), ((10, 11), (6, 7)), ((8, 9, 0, 1, 2), (3, 4, 5)), "all"),
    Task(("q", "p"), ((4,), (9,)), ((0, 2, 8), (1, 3, 5)), "all"),
]


def test_a_stack_gives_each_task_what_its_adapter_gives_it_alone() -> None:
    pipe, _ = pipeline_for(tiny_backbone(), tiny_lora_config())
    stacked, scale = pipe.stacked, 3.0
    examples, seen = stacked.encode(TEXTS), set()
    for seed in range(5):
        tensors = {key: 3 * value for key, value in random_adapters(stacked.layout, len(TASKS), seed=seed).items()}
        matrices = {key: tensors[key] for key in stacked.layout.lora_shapes}
        expected = []
        for index, task in enumerate(TASKS):
            own = {key: value[index : index + 1] for key, value in matrices.items()}
            expected += free_accuracies(stacked, stacked.features_of_all(own, examples), scale, [task])
        assert adapter_accuracies(stacked, matrices, examples, TASKS, scale) == pytest.approx(expected)
        assert adapter_accuracies(stacked, matrices, examples, TASKS, scale, tasks_at_once=3) == pytest.approx(
            expected
        )
        seen.update(expected)
    assert len(seen) > 3  # else adapters would not matter


def test_a_language_model_answers_by_its_words() -> None:
    pipe, _ = tiny_language_pipeline()
    examples, seen = pipe.stacked.encode(TEXTS), set()
    for seed in range(3):
        tensors = random_adapters(pipe.stacked.layout, len(TASKS), seed=seed)
        expected = [
            query_accuracy(pipe.stacked, {key: value[index] for key, value in tensors.items()}, examples, task)
            for index, task in enumerate(TASKS)
        ]
        assert adapter_accuracies(pipe.stacked, tensors, examples, TASKS, 10.0) == pytest.approx(expected)
        seen.update(expected)
    assert len(seen) > 2


def test_another_number_of_adapters_than_of_tasks_is_refused() -> None:
    pipe, _ = pipeline_for(tiny_backbone(), tiny_lora_config())
    tensors = {key: torch.zeros(3, *shape) for key, shape in pipe.stacked.layout.lora_shapes.items()}
    with pytest.raises(ValueError, match="4 tasks, but so many adapters: .*: 3"):
        adapter_accuracies(pipe.stacked, tensors, pipe.stacked.encode(TEXTS), TASKS, 10.0)
