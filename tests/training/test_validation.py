"""Many tasks, each with a generated adapter of its own, judged in stacked passes."""

import pytest
import torch
from tiny import tiny_language_pipeline, tiny_pipeline

from mcdi_hf import FrozenBackbone, GeneratedAdapter, Task
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.training.validation import generated_accuracies, shuffled_labels


TEXTS = ["a b", "c a d e", "b c", "x y w", "z y", "a x", "y b k l m", "z c", "q", "r q s", "t", "u v t"]
# Of two and three classes, of one to three shots, and of queries of many sizes: most of a stack is padding.
TASKS = [
    Task(("p", "q"), ((0,), (3,)), ((1, 2, 5, 7), (4, 6, 8, 9)), "all"),
    Task(("q", "r", "s"), ((0, 1, 2), (3, 4, 5), (8, 9)), ((6, 7, 10), (11,), (3,)), "all"),
    Task(("p", "s"), ((10, 11), (6, 7)), ((8, 9, 0, 1, 2), (3, 4, 5)), "all"),
    Task(("q", "p"), ((4,), (9,)), ((0, 2, 8), (1, 3, 5)), "all"),
]


def support_of(task: Task) -> dict[str, list[str]]:
    return {name: [TEXTS[row] for row in rows] for name, rows in zip(task.classes, task.support)}


@torch.no_grad()
def right_answers(backbone: FrozenBackbone, adapter: GeneratedAdapter, task: Task) -> float:
    """What PEFT finds, text by text."""
    model = adapter.load_into(backbone.classifier(num_labels=len(task.classes))).eval()
    right = []
    for label, rows in enumerate(task.query):
        for row in rows:
            logits = model(**backbone.inputs([TEXTS[row]])).logits[0]
            if backbone.is_causal_lm:
                logits = logits[-1, backbone.processor.convert_tokens_to_ids(list(task.classes))]
            right.append(int(logits.argmax()) == label)
    return sum(right) / len(right)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_language_pipeline])
def test_a_stack_gives_each_task_what_a_call_of_the_pipeline_gives_it(make) -> None:
    pipe, backbone = make()
    examples, seen = pipe.stacked.encode(TEXTS), set()
    for strength in (0.5, 1.9):
        settings = {"strength": strength, "temperature": 0.0, "num_inference_steps": 3}
        expected = [right_answers(backbone, pipe(support_of(task), **settings).adapters[0], task) for task in TASKS]
        for tasks_at_once in (16, 3):
            found = generated_accuracies(pipe, examples, TASKS, tasks_at_once=tasks_at_once, **settings)
            assert found == pytest.approx(expected)
        seen.update(expected)
    assert len(seen) > 2  # else adapters would not matter


def judged_by_hand(pipe, backbone: FrozenBackbone, task: Task, seen: SupportBatch, **settings) -> float:
    """What PEFT finds of the task's own head under what was generated from something else."""
    tokens = pipe(seen, output_type="latent", **settings).adapters
    tensors = pipe.decode_adapters(tokens, pipe.encode_support(support_of(task)))
    (own,) = pipe(support_of(task), **settings).adapters
    own.tensors = {key: value[0] for key, value in tensors.items()}
    return right_answers(backbone, own, task)


def test_the_controls_change_what_is_seen_and_the_head_is_the_task_s_own() -> None:
    pipe, backbone = tiny_pipeline()
    examples, settings = pipe.stacked.encode(TEXTS), {"strength": 1.9, "temperature": 0.0}
    first, second = TASKS[1], TASKS[2]
    pair = [first, second]
    for condition in ("another task", "shuffled labels"):
        found = generated_accuracies(pipe, examples, pair, condition, tasks_at_once=1, **settings)
        for number, (task, other) in enumerate(((first, second), (second, first))):
            seen = SupportBatch.from_tasks([other if condition == "another task" else task])
            seen.examples = examples
            if condition == "shuffled labels":
                seen = shuffled_labels(seen, seed=number)
            assert found[number] == pytest.approx(judged_by_hand(pipe, backbone, task, seen, **settings))


def test_shuffled_labels_are_as_many_of_each_class() -> None:
    support = SupportBatch.from_tasks(TASKS)
    shuffled, again = (shuffled_labels(support, seed=3) for _ in range(2))
    assert shuffled.labels.equal(again.labels) and not shuffled.labels.equal(support.labels)
    for own, other in zip(support.labels, shuffled.labels):
        assert sorted(own.tolist()) == sorted(other.tolist())
        assert (own < 0).equal(other < 0)
