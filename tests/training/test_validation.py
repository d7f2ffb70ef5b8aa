"""Many tasks, each with a generated adapter of its own, judged in stacked passes."""

import pytest
import torch
from tiny import tiny_language_pipeline, tiny_pipeline

from mcdi_hf import FrozenBackbone, GeneratedAdapter, Task
from mcdi_hf.training.validation import generated_accuracies


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
    features = pipe.stacked.features_of_all(pipe.codec.mean_adapter(), examples)
    for strength in (0.5, 2.0):
        settings = {"strength": strength, "temperature": 0.0, "num_inference_steps": 3}
        expected = [right_answers(backbone, pipe(support_of(task), **settings).adapters[0], task) for task in TASKS]
        for tasks_at_once in (16, 3):
            found = generated_accuracies(pipe, examples, features, TASKS, tasks_at_once=tasks_at_once, **settings)
            assert found == pytest.approx(expected)
        seen.update(expected)
    assert len(seen) > 2  # else adapters would not matter


def test_another_task_s_condition_is_seen_and_the_head_is_the_task_s_own() -> None:
    pipe, backbone = tiny_pipeline()
    examples = pipe.stacked.encode(TEXTS)
    features = pipe.stacked.features_of_all(pipe.codec.mean_adapter(), examples)
    (task, _, other, _), settings = TASKS, {"strength": 2.0, "temperature": 0.0}
    tokens = pipe(pipe.encode_support(support_of(other)), output_type="latent", **settings).adapters
    tensors = pipe.decode_adapters(tokens, pipe.encode_support(support_of(task)))
    (own,) = pipe(support_of(task), **settings).adapters
    own.tensors = {key: value[0] for key, value in tensors.items()}
    expected = right_answers(backbone, own, task)
    assert generated_accuracies(pipe, examples, features, [task], [other], **settings) == [pytest.approx(expected)]
    with pytest.raises(ValueError, match="expected the same"):
        generated_accuracies(pipe, examples, features, TASKS[:2], TASKS[2:], **settings)
