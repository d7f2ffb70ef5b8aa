import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_backbone, tiny_image_backbone, tiny_language_pipeline, tiny_lora_config, tiny_pipeline

from mcdi_hf import StackedLora, Task
from mcdi_hf.training.validation import generated_accuracies, query_accuracy
from mcdi_hf.evaluation.gradient import frozen_features, gradient_lora


SUPPORT = {"first": ["a b c", "a c", "b a"], "second": ["x y z", "z y", "x z x"]}


def test_frozen_features_are_what_the_head_reads() -> None:
    backbone = tiny_backbone()
    texts = [text for examples in SUPPORT.values() for text in examples]
    features = frozen_features(backbone, texts)
    head = getattr(backbone.model, backbone.head_name)
    torch.testing.assert_close(head(features), backbone.model(**backbone.inputs(texts)).logits)


def noise_images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_gradient_lora_learns_its_support_set_and_leaves_the_backbone_alone(kind: str) -> None:
    backbone, support, config = tiny_backbone(), SUPPORT, tiny_lora_config()
    if kind == "images":
        images, backbone = noise_images(6), tiny_image_backbone()
        support = {"first": images[:3], "second": images[3:]}
        config = tiny_lora_config(task_type=None, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    examples = [example for group in support.values() for example in group]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    def loss(steps: int) -> float:
        torch.manual_seed(0)
        model = gradient_lora(backbone, support, config, steps, 0.1, imprint_scale=0.0)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(**backbone.inputs(examples)).logits, labels).item()

    assert loss(40) < 0.8 * loss(0)
    assert all(value.equal(before[name]) for name, value in backbone.model.state_dict().items())


def test_accuracies_of_a_language_model_are_those_of_its_words() -> None:
    pipe, backbone = tiny_language_pipeline()
    pipe.set_progress_bar_config(disable=True)
    texts = ["a b", "c a", "b c", "x y", "z y", "a x", "y b", "z c"]
    tasks = [
        Task(("p", "q"), ((0,), (1,)), ((2, 3, 4), (5, 6, 7)), "all"),
        Task(("q", "r", "s"), ((0,), (3,), (5,)), ((1, 2), (4,), (6, 7)), "all"),
    ]
    examples = pipe.stacked.encode(texts)
    features = pipe.stacked.features_of_all(pipe.codec.mean_adapter(), examples)
    found = set()
    for strength in (0.0, 4.0, 8.0):
        settings = {"strength": strength, "temperature": 0.0}
        together = generated_accuracies(pipe, examples, features, tasks, **settings)
        for task, accuracy in zip(tasks, together, strict=True):
            support = {name: [texts[row] for row in rows] for name, rows in zip(task.classes, task.support)}
            adapter = pipe(support, **settings).adapters[0]
            model = adapter.load_into(backbone.classifier(num_labels=2))
            words = backbone.processor.convert_tokens_to_ids(list(task.classes))
            right = []
            for label, rows in enumerate(task.query):
                for row in rows:
                    with torch.no_grad():
                        logits = model(**backbone.inputs([texts[row]])).logits[0, -1, words]
                    right.append(int(logits.argmax()) == label)
            assert accuracy == pytest.approx(sum(right) / len(right))
            assert query_accuracy(pipe.stacked, adapter.tensors, examples, task) == pytest.approx(accuracy)
            found.add(accuracy)
    assert len(found) > 1
    for conditions in (tasks[::-1], tasks[:1]):
        with pytest.raises(ValueError, match="as many classes each"):
            generated_accuracies(pipe, examples, features, tasks, conditions)


def test_an_encoder_has_no_words_in_place_of_a_head() -> None:
    pipe, backbone = tiny_pipeline()
    with pytest.raises(ValueError, match="is no language model"):
        backbone.word_head(("a", "b"))
    pipe.codec.layout.head_name = None
    stacked = StackedLora(backbone, pipe.codec.layout)
    with pytest.raises(ValueError, match="Expected words"):
        stacked.apply_head(pipe.codec.mean_adapter(), torch.zeros(1, 2, 16))


def test_query_accuracy_is_that_of_the_adapter_in_peft() -> None:
    pipe, backbone = tiny_pipeline()
    texts = ["a b", "c a", "b c", "x y", "z y", "a x", "y b", "z c"]
    task = Task(("first", "second"), ((0,), (1,)), ((2, 3, 4), (5, 6, 7)), "all")
    examples = pipe.stacked.encode(texts)
    found = set()
    for seed in range(6):
        adapter = pipe(SUPPORT, generator=torch.Generator().manual_seed(seed), strength=40.0).adapters[0]
        model = adapter.load_into(backbone.classifier(num_labels=2))
        with torch.no_grad():
            predicted = model(**backbone.inputs(texts[2:])).logits.argmax(dim=-1)
        expected = (predicted == torch.tensor([0, 0, 0, 1, 1, 1])).float().mean().item()
        assert query_accuracy(pipe.stacked, adapter.tensors, examples, task) == expected
        found.add(expected)
    assert len(found) > 1  # else the adapters would all have said the same
