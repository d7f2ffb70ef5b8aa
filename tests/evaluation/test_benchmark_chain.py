"""The data of the chain's picture and accuracy by steps, on a tiny pipeline beside its trajectories."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from scripts import DOMAINS, EXAMPLES, Collected
from tiny import assert_close, pipeline_for, seeded, tiny_lora_config

from mcdi_hf import FrozenBackbone, MCDiPipeline, Task
from mcdi_hf.training.validation import free_accuracies, generated_accuracies
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


sys.path.insert(0, str(EXAMPLES))

from benchmark_chain import (  # noqa: E402
    Plane,
    TokenSpace,
    accuracy_by_steps,
    generation_chain,
    optimised,
    rich_task,
)
from families import Family  # noqa: E402
from gradient_rival import GradientSettings, gradient_accuracies  # noqa: E402


SHOTS = 2


@pytest.fixture(scope="module")
def family(collected: Collected, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("chain")
    lora = json.loads((collected.trajectories / "trajectories" / "trajectories.json").read_text())["lora_config"]
    names = ("r", "lora_alpha", "target_modules", "layers_to_transform")
    backbone = FrozenBackbone.from_pretrained(str(collected.backbone), pooling="mean")
    pipe, _ = pipeline_for(backbone, tiny_lora_config(**{name: lora[name] for name in names}))
    pipe.save_pretrained(root / "pipeline")
    values = {
        "name": "tiny",
        "pipeline": str(root / "pipeline"),
        "trajectories": "collected/trajectories",
        "backbone": "backbone",
        "sources": [{"dataset_name": "source", "group_column": "domain"}],
        "test_domains": DOMAINS[2:],
        "validation_domains": DOMAINS[2:],
        "split": "train",
        "query_split": "test",
    }
    return Family(values, argparse.Namespace(runs_root=collected.root, data_root=collected.root, cache_dir=None))


@pytest.fixture
def pipe(family: Family):
    """The family's pipeline, whose settings a test may change."""
    own = {name: family.pipe.config[name] for name in ("imprint_from", "strength", "num_inference_steps")}
    yield family.pipe
    family.pipe.register_to_config(**own)


@pytest.fixture(scope="module")
def task(family: Family) -> Task:
    return rich_task(family, "3x2", examples_per_class=6, queries=3)


def dense_losses(family: Family, task: Task, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The query's cross-entropy of adapters with heads, one adapter and one example at a time."""
    examples, found = family.splits["validation"][0].examples, []
    for index in range(len(tensors[family.codec.layout.keys[0]])):
        own = {key: value[index : index + 1] for key, value in tensors.items()}
        losses = []
        for label, rows in enumerate(task.query):
            for row in rows:
                logits = family.stacked.logits(own, examples[torch.tensor([row])])[0, 0]
                losses.append(-logits.log_softmax(dim=-1)[label])
        found.append(torch.stack(losses).mean())
    return torch.stack(found)


def test_a_plane_is_that_of_the_principal_components() -> None:
    angle = torch.linspace(0, 2 * torch.pi, 9, dtype=torch.float64)[:-1]  # on an ellipse: its axes are known
    axes = torch.linalg.qr(torch.randn(12, 3, generator=seeded(), dtype=torch.float64)).Q.T
    coordinates = torch.stack([3 * angle.cos(), 2 * angle.sin(), 0.1 * (-1.0) ** torch.arange(8)], dim=1)
    path = (coordinates @ axes + 5).unflatten(1, (4, 3))
    plane = Plane.through(path)
    total = 9 / 2 + 4 / 2 + 0.01  # variances along the three axes
    assert plane.variance_explained == pytest.approx([9 / 2 / total, 4 / 2 / total])
    found = plane.project(path)
    assert_close(found.mean(dim=0), torch.zeros(2, dtype=torch.float64))
    assert_close(found.abs(), coordinates[:, :2].abs())
    assert (found[-1] >= 0).all()
    assert_close(plane.project(plane.lift(found)), found)
    off = path - plane.lift(found)
    assert_close(plane.project(plane.origin + off), torch.zeros(8, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 points: expected at least 3"):
        Plane.through(path[:2])


def test_the_path_is_the_optimisers_from_the_shared_start(family: Family, task: Task) -> None:
    tensors, targets = optimised(family, task)
    settings = family.description["settings"]
    layout = family.codec.layout
    family.codec.layout.check(tensors)
    assert len(tensors[layout.keys[0]]) == settings["num_steps"] + 1
    assert len(targets) == settings["num_targets"] and targets[-1] == settings["num_steps"]
    for row in family.trajectories:
        start = split_weights(torch.from_numpy(row["weights"][:1]), len(row["classes"]), layout)
        for key in layout.lora_shapes:
            assert_close(tensors[key][:1], start[key])
            assert (tensors[key][1:] - tensors[key][:-1]).abs().amax(dim=(1, 2)).min() > 0  # every step is there


@pytest.mark.parametrize("imprint_from", ["mean", "generated"])
def test_tokens_of_the_path_are_its_adapters(
    family: Family, pipe: MCDiPipeline, task: Task, imprint_from: str
) -> None:
    pipe.register_to_config(imprint_from=imprint_from)
    space, (tensors, _) = TokenSpace(family, task, SHOTS), optimised(family, task)
    path = space.encode(tensors)
    again = pipe.complete(path, space.batch(len(path)))
    for key, value in tensors.items():
        assert_close(again[key], value)
    assert_close(space.losses(path), dense_losses(family, task, tensors))
    # A point of the plane is an adapter of its own; with what is off the plane put back it is the path's.
    plane = Plane.through(path)
    flat = plane.lift(plane.project(path))
    assert not torch.allclose(space.losses(flat), space.losses(path), rtol=1e-5)
    assert_close(space.losses(flat + (path - flat)), dense_losses(family, task, tensors))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_picture_holds_the_path_the_chains_and_the_losses(
    family: Family, pipe: MCDiPipeline, task: Task, strength: float
) -> None:
    pipe.register_to_config(strength=strength)
    found = generation_chain(family, "tiny", task, SHOTS, draws=3, size=4, seed=1)
    assert json.loads(json.dumps(found)) == found
    assert found["classes"] == list(task.classes) and found["shots"] == SHOTS and found["table"] == "tiny"
    space, (tensors, targets) = TokenSpace(family, task, SHOTS), optimised(family, task)
    path = space.encode(tensors)
    plane = Plane.through(path)
    trajectory = np.array(found["trajectory"])
    np.testing.assert_allclose(trajectory.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(trajectory[targets], found["targets"])
    assert (
        0 < found["variance_explained"][1] <= found["variance_explained"][0] <= sum(found["variance_explained"]) <= 1
    )

    # The chains end on what the pipeline samples from the same noise.
    states, batch = space.chains(3, 20, seed=1), space.batch(3)
    generator = seeded(1)
    noise = torch.randn(states[:, 0].shape, generator=generator)
    sampled = pipe.sample(batch.features, batch.labels, batch.class_mask, 20, generator=generator, latents=noise)
    assert torch.equal(states[:, 0], noise) and torch.equal(states[:, -1], sampled)
    chains = np.array(found["chains"])
    assert chains.shape == (3, 21, 2) and found["passages"] == [7, 13, 20]
    np.testing.assert_allclose(chains, plane.project(states), atol=1e-6)
    free = np.array(found["free"])
    np.testing.assert_allclose(np.array(found["adapter"]) - free, strength * (chains[:, -1].mean(axis=0) - free))
    assert 0 < found["adapter_in_plane"] < 1

    own = {"adapter": strength * sampled.mean(dim=0), "free": torch.zeros_like(sampled[0])}
    own |= {f"target {number}": path[step] for number, step in enumerate(targets, start=1)}
    for name, tokens in own.items():
        completed = pipe.complete(tokens[None], space.batch(1))
        assert found["losses"][name] == pytest.approx(dense_losses(family, task, completed).item(), rel=1e-4)
    assert found["losses"].keys() == own.keys()

    x, y, losses = (np.array(found["grid"][name]) for name in ("x", "y", "loss"))
    shown = np.concatenate([trajectory, chains.reshape(-1, 2), [free, found["adapter"]]])
    assert (shown.min(axis=0) > [x[0], y[0]]).all() and (shown.max(axis=0) < [x[-1], y[-1]]).all()
    assert losses.shape == (4, 4)
    for column, row in ((0, 3), (2, 1)):
        tokens = plane.lift(torch.tensor([[x[column], y[row]]]))
        assert losses[row, column] == pytest.approx(space.losses(tokens).item(), rel=1e-4)


def test_passages_of_fewer_steps_are_where_they_leave_a_segment(family: Family, task: Task) -> None:
    space = TokenSpace(family, task, SHOTS)
    assert space.chains(1, 4, seed=0).shape[:2] == (1, 5)
    assert family.pipe.scheduler.timesteps.tolist() == [19, 14, 9, 4]  # the segments begin at 13, 7 and 0
    assert space.passages() == [2, 3, 4]


def test_a_rich_task_has_many_examples_and_the_generator_sees_the_first(family: Family, task: Task) -> None:
    assert task.group == DOMAINS[2] and len(task.classes) == 3
    assert [len(rows) for rows in (*task.support, *task.query)] == [6] * 3 + [3] * 3
    named = rich_task(family, f"{DOMAINS[2]}:2x1", examples_per_class=4, queries=2, number=3)
    assert len(named.classes) == 2 and len(named.support[0]) == 4
    seen = TokenSpace(family, task, SHOTS).batch(2)
    assert seen.rows.tolist() == [[row for rows in task.support for row in rows[:SHOTS]]] * 2
    with pytest.raises(ValueError, match="6 examples in its support: expected 7 shots"):
        TokenSpace(family, task, 7)


def test_accuracies_by_steps_are_those_of_each_number_alone(family: Family, pipe: MCDiPipeline) -> None:
    pipe.register_to_config(num_inference_steps=3)
    tasks = family.tasks("validation", "2x2", 5, 4)
    split, settings = family.splits["validation"][0], GradientSettings("imprinted", 1, 0.01)
    found = accuracy_by_steps(family, "tiny", "2x2", tasks, [1, 3], settings, [1, 4], 10.0, num_candidates=2, seed=6)
    assert json.loads(json.dumps(found)) == found and pipe.config.num_inference_steps == 3
    assert (found["table"], found["kind"]) == ("tiny", "2x2")
    assert list(found["generated"]) == ["1", "3"] and list(found["gradient"]) == ["1", "4"]
    own = generated_accuracies(pipe, split.examples, split.features, tasks, num_candidates=2, generator=seeded(6))
    assert found["generated"]["3"] == own
    frozen = family.stacked.features_of_all(initial_adapter(family.codec.layout), split.examples)
    assert found["frozen"] == free_accuracies(family.stacked, frozen, 10.0, tasks)
    longer = GradientSettings("imprinted", 4, 0.01)
    assert found["gradient"]["4"] == gradient_accuracies(
        family.stacked, split.examples, frozen, tasks, longer, 10.0, seed=6
    )
    with pytest.raises(ValueError, match="num_inference_steps"):
        accuracy_by_steps(family, "tiny", "2x2", tasks, [21], settings, [1], 10.0)
    assert pipe.config.num_inference_steps == 3


def test_no_example_beside_the_shots_is_seen_by_the_generator(family: Family, task: Task) -> None:
    split = family.splits["validation"][0]
    shots = [row for rows in task.support for row in rows[:SHOTS]]
    others = [row for row in range(len(split.examples)) if row not in shots]
    features = split.features.clone()
    try:
        split.features[others] = float("nan")
        found = generation_chain(family, "tiny", task, SHOTS, draws=1, num_inference_steps=2, size=2)
    finally:
        split.features.copy_(features)
    assert np.isfinite(found["chains"]).all() and np.isfinite(found["grid"]["loss"]).all()
