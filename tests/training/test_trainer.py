"""Meta-training: interrupted, spread over processes, watched and stopped by callbacks, and of every kind of backbone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from scripts import (
    DOMAINS,
    EXAMPLES,
    LAUNCH,
    Collected,
    call,
    collecting,
    command_line,
    save_backbone,
    training,
    write_split,
)
from tiny import tiny_backbone, tiny_language_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from mcdi_hf import FrozenBackbone, MCDiPipeline, MCDiTrainer, Source, TrajectoryCollector, TrajectoryFolder


class Runs:
    """A run that nothing disturbed, one that was resumed, and one of two processes, by the script."""

    def __init__(self, collected: Collected, root: Path) -> None:
        self.trajectories = collected.trajectories / "trajectories"
        self.straight, self.resumed, self.spread = root / "straight", root / "resumed", root / "spread"
        assert MCDiTrainer(training(self.straight), self.trajectories).train() == self.straight / "pipeline"
        with pytest.raises(KeyboardInterrupt):
            MCDiTrainer(training(self.resumed), self.trajectories, callbacks=[Interrupted()]).train()
        MCDiTrainer(training(self.resumed, resume_from_checkpoint="latest"), self.trajectories).train()
        options = command_line(training(self.spread, trajectories=str(self.trajectories)))
        self.printed = call(*LAUNCH, "--num_processes", 2, EXAMPLES / "train_mcdi.py", *options)


class Interrupted(TrainerCallback):
    """Ends a run as a user does, behind its first checkpoint."""

    def on_save(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def runs(collected: Collected, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(collected, tmp_path_factory.mktemp("runs"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint_{step}"


def pipeline_tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "pipeline").glob("*/*.safetensors"))
    return {f"{file.parent.name}.{key}": value for file in files for key, value in load_file(file).items()}


def test_weights_move_from_checkpoint_to_checkpoint(runs: Runs) -> None:
    folders = [checkpoint(runs.straight, step) for step in (2, 4, 6)]
    kept = [torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True) for folder in folders]
    assert [one["global_step"] for one in kept] == [2, 4, 6]
    weights = [load_file(folder / "model.safetensors")["denoiser.token_out.weight"] for folder in folders]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_resumed_run_is_the_straight_run_bit_for_bit(runs: Runs) -> None:
    straight, resumed = pipeline_tensors(runs.straight), pipeline_tensors(runs.resumed)
    assert {key.split(".")[0] for key in straight} == {"codec", "denoiser", "task_encoder"}
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    for name in ("pipeline/model_index.json", "curve.json"):
        assert (runs.straight / name).read_text() == (runs.resumed / name).read_text()
    # The pipeline may be the one of step 3; the last checkpoint goes on to the end, with all of the run's state.
    last, last_resumed = checkpoint(runs.straight, 6), checkpoint(runs.resumed, 6)
    assert (last / "model.safetensors").read_bytes() == (last_resumed / "model.safetensors").read_bytes()
    for name in ("optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        one, two = (torch.load(folder / name, weights_only=False) for folder in (last, last_resumed))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_two_processes_train_what_one_does(runs: Runs) -> None:
    assert (checkpoint(runs.spread, 6) / "random_states_1.pkl").exists()  # the second process was there
    assert not (checkpoint(runs.straight, 6) / "random_states_1.pkl").exists()
    one, two = (load_file(checkpoint(run, 6) / "model.safetensors") for run in (runs.straight, runs.spread))
    start = load_file(checkpoint(runs.straight, 2) / "model.safetensors")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert max((one[key] - start[key]).abs().max().item() for key in one) > 1e-3
    torch.testing.assert_close(pipeline_tensors(runs.straight), pipeline_tensors(runs.spread), rtol=0, atol=1e-4)
    best = json.loads((runs.straight / "curve.json").read_text())
    best = max((one["2x1"] + one["3x2"]) / 2 for one in best if one["step"])
    found = re.search(r"best mean validation accuracy ([\d.]+); the pipeline is in (.*)", runs.printed)
    assert float(found[1]) == pytest.approx(best, abs=2e-4) and found[2] == str(runs.spread / "pipeline")


def test_the_trained_pipeline_loads_and_generates(runs: Runs) -> None:
    pipe = MCDiPipeline.from_pretrained(runs.straight / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    description = json.loads((runs.trajectories / "trajectories.json").read_text())
    assert pipe.codec.config.base_model == description["base_model"]
    assert pipe.config.num_inference_steps == 4 and pipe.config.strength in (0.5, 1.0)
    assert (pipe.config.trained_ways, pipe.config.trained_shots) == ([2, 3], [1, 3])
    assert pipe.scheduler.config.num_segments == description["settings"]["num_targets"]
    support = {"one": ["a b", "c"], "two": ["d"], "three": ["e f g"]}
    (adapter,) = pipe(support, generator=torch.Generator().manual_seed(0)).adapters
    (free,) = pipe(support, strength=0).adapters
    assert adapter.labels == list(support) and set(adapter.tensors) == set(pipe.codec.layout.keys)
    assert all(torch.isfinite(value).all() for value in adapter.tensors.values())
    same = [key for key, value in adapter.tensors.items() if value.equal(free.tensors[key])]
    assert same == [key for key in adapter.tensors if "lora_B" in key]


class Watcher(TrainerCallback):
    """Writes down what it is told, as a callback of `transformers.Trainer` may."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen, self.metrics, self.losses, self.stop_at = [], [], [], stop_at

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs) -> None:
        assert model is not None and optimizer is not None and lr_scheduler is not None
        self.seen.append(("begin", state.global_step))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.stop_at

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.losses.append(logs["weight loss"])

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        self.seen.append(("evaluate", state.global_step))
        self.metrics.append(metrics)

    def on_save(self, args, state, control, **kwargs) -> None:
        self.seen.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(("end", state.global_step))


def test_callbacks_see_the_run_and_stop_it(runs: Runs, tmp_path: Path) -> None:
    watcher = Watcher()
    trainer = MCDiTrainer(training(tmp_path / "whole"), runs.trajectories, callbacks=[watcher])
    trainer.train()
    steps = [("evaluate", 0), ("save", 2), ("evaluate", 3), ("save", 4), ("evaluate", 6), ("save", 6)]
    assert watcher.seen == [("begin", 0), *steps, ("end", 6)] and len(watcher.losses) == 6
    curve = [one for one in trainer.state.log_history if one["step"] == 3]
    accuracy = max((one["2x1"] + one["3x2"]) / 2 for one in curve)
    assert watcher.metrics[1]["eval_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert trainer.state.best_metric == max(one["eval_accuracy"] for one in watcher.metrics)
    stopped = Watcher(stop_at=1)
    folder = MCDiTrainer(training(tmp_path / "stopped"), runs.trajectories, callbacks=[stopped]).train()
    assert stopped.seen == [("begin", 0), ("evaluate", 0), ("evaluate", 1), ("end", 1)]
    assert (folder / "model_index.json").exists()  # of what there was when it stopped


def test_transformers_own_early_stopping_counts_on_after_a_resume(runs: Runs, tmp_path: Path) -> None:
    """A strength of next to nothing: no validation is better than the first one."""
    own = {"strengths": [1e-6], "validation_steps": 1, "checkpointing_steps": 1, "max_train_steps": 6}
    callback = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = MCDiTrainer(training(tmp_path / "whole", **own), runs.trajectories, callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == 3
    shutil.copytree(checkpoint(tmp_path / "whole", 2), checkpoint(tmp_path / "resumed", 2))
    arguments = training(tmp_path / "resumed", resume_from_checkpoint="latest", **own)
    again = MCDiTrainer(arguments, runs.trajectories, callbacks=[EarlyStoppingCallback(early_stopping_patience=3)])
    again.train()
    assert again.state.global_step == 3


def test_a_tracker_and_the_hub_get_what_was_found(
    runs: Runs, collected: Collected, hub: FakeHub, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    folder = TrajectoryFolder(runs.trajectories)
    moved = shutil.copytree(collected.source, tmp_path / "moved")
    arguments = training(
        tmp_path / "run", report_to="tensorboard", push_to_hub=True, hub_model_id="tester/mcdi", max_train_steps=1
    )
    backbone = FrozenBackbone.from_pretrained(str(collected.backbone))
    sources = [Source(str(moved), group_column="domain")]
    trainer = MCDiTrainer(arguments, folder, sources, backbone)
    shutil.copytree(trainer.train(), tmp_path / "copy")
    assert list((tmp_path / "run" / "mcdi").glob("events*"))
    pushed = MCDiPipeline.from_pretrained("tester/mcdi")
    assert pushed.config.strength == MCDiPipeline.from_pretrained(tmp_path / "copy").config.strength
    card = ModelCard.load("tester/mcdi")
    best = [one for one in trainer.state.log_history if one.get("kept")][-1]
    for kind in ("2x1", "3x2"):
        row = [trainer.state.log_history[0][kind]] + [
            best[kind + one] for one in ("", ", shuffled labels", ", another task")
        ]
        assert f"| {kind} | {' | '.join(f'{value:.3f}' for value in row)} |" in card.text
    assert 'from_pretrained("tester/mcdi")' in card.text and card.data.library_name == "diffusers"
    assert not any(str(place) in card.content for place in (tmp_path, collected.trajectories.parent))
    with pytest.raises(ValueError, match="expected the same columns"):
        MCDiTrainer(training(tmp_path / "other"), folder, [Source(str(moved))], backbone)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trajectories": None}, "There are no trajectories"),
        ({"validation_domains": DOMAINS[1:]}, "train and validation share the classes"),
        ({"validation_domains": ["east"]}, r"no domains \['east'\]"),
        ({"validation_tasks": ["2-1"]}, "kind of tasks '2-1' is unknown: expected WAYSxSHOTS"),
        ({"validation_tasks": ["east:2x1"]}, "no tasks 'east:2x1': expected one of the groups"),
        ({"validation_tasks": ["9x1"]}, "no tasks of the kind '9x1': No group has 9 classes"),
        ({"validation_domains": []}, "No domain is left to validate on"),
        ({"task_loss_tasks": 0}, "task_loss_tasks is 0"),
        ({"shots": [1, 7]}, "has 6 examples, fewer than 7 shots"),
    ],
)
def test_a_run_that_cannot_be_is_refused(runs: Runs, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCDiTrainer(training(tmp_path / "run", **({"trajectories": str(runs.trajectories)} | changes)))
    assert not (tmp_path / "run").exists()


def test_divergence_is_named(runs: Runs, tmp_path: Path) -> None:
    arguments = training(tmp_path / "run", lr_warmup_steps=0)
    arguments.learning_rate = 1e4  # which the arguments themselves refuse
    trainer = MCDiTrainer(arguments, runs.trajectories)
    with pytest.raises(FloatingPointError, match="Meta-training diverged"):
        trainer.train()


def test_without_validation_domains_those_are_taken_that_no_trajectory_is_of(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trainer = MCDiTrainer(training(tmp_path / "run", validation_domains=None), runs.trajectories)
    assert f"all that no trajectory is of: {DOMAINS[2:]}" in capsys.readouterr().out
    assert {task.group for tasks in trainer.data.validation.values() for task in tasks} == {DOMAINS[2]}
    views = MCDiTrainer(training(tmp_path / "run", num_views=2, support_views=3), runs.trajectories)
    assert views.data.train.num_views == 2 and views.pipe.config.support_views == 3
    views.outer_step()


def test_a_language_model_from_raw_data_to_a_pipeline(tmp_path: Path) -> None:
    folder = save_backbone(tiny_language_model(), tmp_path / "llama")
    names = list("abcdefghijkl")  # words of the model
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=names), "domain": ClassLabel(names=DOMAINS)}
    )
    rows = [
        {"text": f"{names[label]} {one} {one}", "label": label, "domain": label // 4}
        for label in range(12)
        for one in "mnopqrst"
    ]
    write_split(tmp_path / "source", "train", Dataset.from_list(rows, features=features))
    own = {"pooling": "last_token", "target_modules": ["q_proj", "v_proj"], "layers": [2], "num_tasks": 3}
    sources = [Source(str(tmp_path / "source"), group_column="domain")]
    trajectories = TrajectoryCollector(collecting(folder, tmp_path / "made", **own), sources).collect()
    own = {"segment_weights": None}
    place = MCDiTrainer(training(tmp_path / "run", **own), trajectories).train()
    pipe = MCDiPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    support = {"i": ["m n", "i o"], "j": ["j j"]}
    (adapter,) = pipe(support, generator=torch.Generator().manual_seed(0)).adapters
    (free,) = pipe(support, strength=0).adapters
    assert all("lora_" in key and value.isfinite().all() for key, value in adapter.tensors.items())
    same = [key for key, value in adapter.tensors.items() if value.equal(free.tensors[key])]
    assert same == [key for key in adapter.tensors if "lora_B" in key]
    adapter.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_trajectories_of_another_backbone_are_refused(runs: Runs, tmp_path: Path) -> None:
    other = tiny_backbone(seed=1)
    with pytest.raises(ValueError, match=f"weights {other.fingerprint}.*Load the backbone and the revision"):
        MCDiTrainer(training(tmp_path / "run"), runs.trajectories, backbone=other)
