import torch
from tiny import tiny_backbone, tiny_lora_config, tiny_pipeline

from mcdi_hf import Task
from mcdi_hf.evaluation.episodes import query_accuracy
from mcdi_hf.evaluation.gradient import frozen_features, gradient_lora


SUPPORT = {"first": ["a b c", "a c", "b a"], "second": ["x y z", "z y", "x z x"]}


def test_frozen_features_are_what_the_head_reads() -> None:
    backbone = tiny_backbone()
    texts = [text for examples in SUPPORT.values() for text in examples]
    features = frozen_features(backbone, texts)
    head = getattr(backbone.model, backbone.head_name)
    torch.testing.assert_close(head(features), backbone.model(**backbone.inputs(texts)).logits)


def test_gradient_lora_learns_its_support_set_and_leaves_the_backbone_alone() -> None:
    backbone = tiny_backbone()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    texts = [text for examples in SUPPORT.values() for text in examples]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    def loss(steps: int) -> float:
        torch.manual_seed(0)
        model = gradient_lora(backbone, SUPPORT, tiny_lora_config(), steps, 0.1, imprint_scale=0.0)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(**backbone.inputs(texts)).logits, labels).item()

    assert loss(40) < 0.8 * loss(0)
    assert all(value.equal(before[name]) for name, value in backbone.model.state_dict().items())


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
