"""The shared start: it learns, keeps the best, and goes on to the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import llama_config
from tiny import tiny_backbone, tiny_dataset, tiny_language_model, tiny_lora_config

from mcdi_hf import AdapterLayout, EpisodeSampler, LabelledRows, StackedLora, train_shared_adapter
from mcdi_hf.data.stacks import StackSampler
from mcdi_hf.trajectories.shared import SharedStart, batches_of, initial_adapter, source_of


DATASET = tiny_dataset()
ROWS = LabelledRows(DATASET, "label", "domain")


def make(backbone=None, config=None, **settings) -> SharedStart:
    backbone, config = backbone or tiny_backbone(), config or tiny_lora_config()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, config, backbone.head_name))
    sampler = StackSampler(EpisodeSampler(ROWS, (2, 3), (1, 4), 3))
    values = {"num_steps": 6, "tasks_per_step": 4, "learning_rate": 0.01}
    return SharedStart(stacked, stacked.encode(DATASET["text"][:]), sampler, list(ROWS.groups), **(values | settings))


def support_of(start: SharedStart) -> tuple:
    """The support and the query sets of four tasks."""
    return batches_of(start.sampler.stack(3, 4), start.examples, torch.device("cpu"))


def held_out(start: SharedStart) -> tuple:
    sampler = EpisodeSampler(ROWS, (2, 2), (2, 2), 4, seed=9)
    return start.examples, {"2x2": [sampler[number] for number in range(4)]}


def test_it_learns_with_its_head_and_its_sources_coefficients() -> None:
    start = make(num_steps=100)
    first = {name: value.detach().clone() for name, value in start._learnt().items()}
    losses = [start.train_step() for _ in range(100)]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])
    assert all(not value.equal(first[name]) for name, value in start._learnt().items())
    tensors, head, encoder = start.result()
    assert tensors.keys() == start.stacked.layout.lora_shapes.keys() and head.feature_norm == start.norm
    assert all(value.equal(start.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_without_shares_there_is_one_adapter_and_nothing_else() -> None:
    start = make(own_share=0.0, proposed_share=0.0)
    for _ in range(3):
        start.train_step()
    assert (start.encoder.prototypes == 0).all()
    assert start.read(support_of(start)[0], torch.ones(4, dtype=torch.bool)).proposal.eq(0).all()
    start.validate(*held_out(start))
    assert start.curve[0].keys() == {"step", "mean", "2x2"}


def test_a_language_model_learns_no_head() -> None:
    backbone = tiny_language_model()
    start = make(backbone, llama_config())
    for name in ("a", "b"):
        assert name in backbone.processor.get_vocab()
    assert not start._learnt().keys() & start.scalars.keys() and start.norm == 1


def test_every_task_is_seen_in_its_way() -> None:
    start = make()
    with torch.no_grad():
        start.encoder.prototypes[1] = 1.0
        start.encoder.recall[-1].bias.copy_(torch.tensor([-99.0, 99.0, -99.0]))  # all are like the second source
        start.encoder.downhill.bias.fill_(2.0)
    support, no = support_of(start)[0], torch.zeros(4, dtype=torch.bool)
    own, proposed = torch.tensor([True, True, False, False]), torch.tensor([False, False, False, True])
    seen = start.seen_by([0, 1, 1, 1], own, proposed, start.read(support, proposed))
    for key, value in seen.items():
        factors = torch.tensor([1.0, 2.0, 1.0, 4.0] if "lora_A" in key else [1.0] * 4)
        assert value.equal(factors[:, None, None] * start.tensors[key])
    assert start.seen_by([0] * 4, no, no, None) is start.tensors


def test_a_task_is_proposed_the_same_whoever_else_is_in_the_stack() -> None:
    start = make(num_steps=20)
    for _ in range(20):
        start.train_step()
    support = support_of(start)[0]
    together, alone = (start.read(support, torch.tensor(rows)) for rows in ([True] * 4, [False, False, True, False]))
    assert together.proposal.std(dim=0).max() > 1e-3
    torch.testing.assert_close(alone.proposal, together.proposal[2:3], rtol=1e-3, atol=1e-4)


def test_the_encoder_learns_to_tell_sources() -> None:
    start = make(num_steps=300)
    for _ in range(300):
        start.train_step()
    tasks = start.sampler.stack(1000, 40)
    support = batches_of(tasks, start.examples, torch.device("cpu"))[0]
    found = start.read(support, torch.ones(len(tasks), dtype=torch.bool)).prototype_logits.argmax(dim=1)
    right = [start.sources[number] == task.group for number, task in zip(found, tasks)]
    assert np.mean(right) > 0.7  # 1/3 by chance


def test_the_basis_learns_through_proposals_and_not_through_what_they_are_made_of() -> None:
    start = make(own_share=0.0, proposed_share=1.0)
    start.read(support_of(start)[0], torch.ones(4, dtype=torch.bool)).proposal.sum().backward()
    assert all(value.grad is None for value in start.tensors.values())
    start.train_step()
    assert all(value.grad.any() for key, value in start.tensors.items() if "lora_B" in key)


def test_the_best_on_validation_is_what_is_returned() -> None:
    start = make()
    validation = held_out(start)
    start.validate(*validation)
    first = {key: value.detach().clone() for key, value in start.tensors.items()}
    start.curve[0]["mean"] = 2.0  # nothing can be better
    start.train_step()
    start.validate(*validation)
    assert all(value.equal(first[key]) for key, value in start.result()[0].items())
    assert [point["step"] for point in start.curve] == [0, 1] and start.curve[1].keys() >= {
        "2x2, own coefficients",
        "2x2, proposed",
    }


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    straight, straight_head, straight_encoder = train_shared_adapter(
        make(), held_out(make()), 2, tmp_path / "straight", {"a": 1}
    )
    half = make()
    for _ in range(4):
        half.train_step()
        if half.step % 2 == 0:
            half.validate(*held_out(half))
    half.save(tmp_path / "half", {"a": 1})
    half.train_step()  # lost
    found, head, encoder = train_shared_adapter(make(), held_out(make()), 2, tmp_path / "half", {"a": 1})
    assert all(value.equal(straight_encoder.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert head == straight_head and all(value.equal(straight[key]) for key, value in found.items())
    assert (tmp_path / "half").read_bytes() == (tmp_path / "straight").read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    make().save(tmp_path / "made", {"a": 1})
    with pytest.raises(ValueError, match="made with other settings: a is 1 there, 2 here"):
        train_shared_adapter(make(), None, 2, tmp_path / "made", {"a": 2})
    (tmp_path / "made").write_bytes((tmp_path / "made").read_bytes()[:-9])
    with pytest.raises(ValueError, match="made is damaged: .*Delete it and run the same command again"):
        train_shared_adapter(make(), None, 2, tmp_path / "made", {"a": 1})


def test_divergence_is_an_error() -> None:
    with pytest.raises(ValueError, match="diverged at step"):
        train_shared_adapter(make(learning_rate=1e30))


def test_a_first_adapter_is_as_peft_makes_it() -> None:
    layout = make().stacked.layout
    tensors, again, other = (initial_adapter(layout, seed) for seed in (0, 0, 1))
    for key, shape in layout.lora_shapes.items():
        assert tensors[key].shape == (1, *shape) and tensors[key].equal(again[key])
        if "lora_B" in key:
            assert (tensors[key] == 0).all()
        else:  # uniform within 1 / sqrt(16)
            assert 0.2 < tensors[key].abs().max() <= 0.25 and not tensors[key].equal(other[key])


def test_the_source_of_a_group_stands_before_the_slash() -> None:
    assert source_of("sentiment/books") == "sentiment" and source_of("trec") == "trec"
