"""REPTILE on the adapter: its steps in closed form, and its file."""

import sys
from pathlib import Path

import pytest
import torch
from scripts import EXAMPLES
from tiny import assert_close, tiny_backbone, tiny_dataset, tiny_lora_config

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    LabelledRows,
    StackedLora,
    Task,
    TrajectorySettings,
    collect_trajectories,
)
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


sys.path.insert(0, str(EXAMPLES))

from reptile_rival import AdapterReptile  # noqa: E402


SCALE = 2.0


@pytest.fixture(scope="module")
def setting() -> tuple[StackedLora, EncodedExamples, EpisodeSampler]:
    table, backbone = tiny_dataset(), tiny_backbone()
    stacked = StackedLora(backbone, AdapterLayout.from_model(backbone.model, tiny_lora_config()))
    return (
        stacked,
        stacked.encode(table["text"][:]),
        EpisodeSampler(LabelledRows(table, "label", "domain"), (2, 4), (3, 3), 5),
    )


def ends(
    stacked: StackedLora, examples: EncodedExamples, start: dict, tasks: list[Task], steps: int
) -> tuple[dict, list[float]]:
    """The mean adapter after some steps of Adam on each task, one at a time, and the accuracies."""
    settings = TrajectorySettings(num_steps=steps, num_targets=1, batch_size=20, imprint_scale=SCALE, seed=3)
    features, found = stacked.features_of_all(start, examples), []
    for number, task in enumerate(tasks):
        found += collect_trajectories(stacked, examples, start, features, [task], [number], settings)
    adapters = [
        split_weights(torch.from_numpy(row["weights"][-1:]), len(row["classes"]), stacked.layout) for row in found
    ]
    mean = {key: torch.cat([one[key] for one in adapters]).mean(dim=0, keepdim=True) for key in start}
    return mean, [row["accuracy"] for row in found]


def test_a_step_goes_towards_the_mean_end_of_its_tasks(setting) -> None:
    stacked, examples, sampler = setting
    first = initial_adapter(stacked.layout, 3)
    reptile = AdapterReptile.train(stacked, examples, sampler, steps=2, seed=3, scale=SCALE)
    second, _ = ends(stacked, examples, first, [sampler[number] for number in range(4)], 5)  # a whole step
    third, _ = ends(stacked, examples, second, [sampler[number] for number in range(4, 8)], 5)  # half a step
    for key, value in reptile.start.items():
        assert_close(value, (second[key] + third[key]) / 2)
        assert not value.equal(first[key])


def test_test_tasks_are_adapted_from_the_start_and_the_file_keeps_it(setting, tmp_path: Path) -> None:
    stacked, examples, sampler = setting
    reptile = AdapterReptile.train(stacked, examples, sampler, steps=1, seed=3, scale=SCALE)
    reptile.save(tmp_path / "reptile.safetensors")
    loaded = AdapterReptile.load(stacked, tmp_path / "reptile.safetensors")
    assert (loaded.scale, loaded.seed) == (SCALE, 3)
    assert all(value.equal(loaded.start[key]) for key, value in reptile.start.items())
    tasks = [sampler[number] for number in range(100, 106)]
    _, expected = ends(stacked, examples, reptile.start, tasks, 4)
    assert len(set(expected)) > 2
    for one in (reptile, loaded):
        assert one.accuracies(examples, one.features(examples), tasks, num_steps=4) == pytest.approx(expected)


def test_a_start_for_other_adapters_is_refused(setting, tmp_path: Path) -> None:
    stacked, examples, sampler = setting
    AdapterReptile(stacked, initial_adapter(stacked.layout), SCALE, 0).save(tmp_path / "reptile.safetensors")
    layout = AdapterLayout.from_model(stacked.backbone.model, tiny_lora_config(r=3))
    with pytest.raises(ValueError, match="has a start for other adapters: .*expected .*3"):
        AdapterReptile.load(StackedLora(stacked.backbone, layout), tmp_path / "reptile.safetensors")
