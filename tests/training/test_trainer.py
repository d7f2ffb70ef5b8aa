"""The two scripts from raw data to a pipeline, as a user runs them, on a tiny backbone and data set."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from safetensors.torch import load_file
from scripts import DOMAINS, EXAMPLES, LAUNCH, Collected, call, save_backbone, write_split
from tiny import tiny_backbone, tiny_language_model
from transformers import AutoModelForCausalLM

from mcdi_hf import MCDiPipeline


@dataclass
class Runs:
    """Everything that the tests below look at, made by five subprocesses."""

    backbone: Path
    trajectories: Path
    straight: Path
    resumed: Path
    spread: Path


@pytest.fixture(scope="module")
def runs(collected: Collected, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    backbone, trajectories = collected.backbone, collected.trajectories
    script = EXAMPLES / "train_mcdi.py"
    options = ["--pretrained_model_name_or_path", backbone, "--trajectories", trajectories / "trajectories"]
    options += ["--validation_domains", DOMAINS[2], "--validation_tasks", "2x1", "3x2", "--num_validation_episodes", 2]
    options += "--dim 16 --num_layers 1 --shots 1 3 --train_batch_size 2 --tasks_per_step 3 --inner_steps 2".split()
    options += "--max_train_steps 6 --lr_warmup_steps 2 --validation_steps 3 --checkpointing_steps 2".split()
    options += "--query_split test --task_loss_weight 0.5 --task_loss_tasks 3 --task_loss_warmup_steps 4".split()
    options += "--queries_per_class 2 --imprint_from generated --segment_weights 1 1 2 --max_grad_norm 1".split()
    options += ["--checkpoints_total_limit", 9, "--output_dir"]
    found = Runs(backbone, trajectories, root / "straight", root / "resumed", root / "spread")
    call(script, *options, found.straight)
    # What a run that was stopped after its second step leaves behind.
    shutil.copytree(checkpoint(found.straight, 0), checkpoint(found.resumed, 0))
    call(script, *options, found.resumed, "--resume_from_checkpoint", "latest")
    call(*LAUNCH, "--num_processes", 2, script, *options, found.spread)
    return found


def checkpoint(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"checkpoint_{number}"


def pipeline_tensors(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "pipeline").glob("*/*.safetensors"))
    return {f"{file.parent.name}.{key}": value for file in files for key, value in load_file(file).items()}


def test_weights_move_from_checkpoint_to_checkpoint(runs: Runs) -> None:
    folders = [checkpoint(runs.straight, number) for number in range(3)]
    steps = [torch.load(folder / "custom_checkpoint_0.pkl", weights_only=False)["step"] for folder in folders]
    assert steps == [2, 4, 6]
    weights = [load_file(folder / "model.safetensors")["denoiser.head_out.weight"] for folder in folders]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_a_resumed_run_is_the_straight_run_bit_for_bit(runs: Runs) -> None:
    straight, resumed = pipeline_tensors(runs.straight), pipeline_tensors(runs.resumed)
    assert {key.split(".")[0] for key in straight} == {"codec", "denoiser", "task_encoder"}
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    indices = [(run / "pipeline" / "model_index.json").read_text() for run in (runs.straight, runs.resumed)]
    assert indices[0] == indices[1]
    # The pipeline may be the one of step 3; the last checkpoint goes on to the end, with all of the run's state.
    last, last_resumed = checkpoint(runs.straight, 2), checkpoint(runs.resumed, 2)
    assert (last / "model.safetensors").read_bytes() == (last_resumed / "model.safetensors").read_bytes()
    for name in ("optimizer.bin", "scheduler.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        one, two = (torch.load(folder / name, weights_only=False) for folder in (last, last_resumed))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_two_processes_train_what_one_does(runs: Runs) -> None:
    assert (checkpoint(runs.spread, 2) / "random_states_1.pkl").exists()  # the second process was there
    assert not (checkpoint(runs.straight, 2) / "random_states_1.pkl").exists()
    one, two = (load_file(checkpoint(run, 2) / "model.safetensors") for run in (runs.straight, runs.spread))
    start = load_file(checkpoint(runs.straight, 0) / "model.safetensors")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert max((one[key] - start[key]).abs().max().item() for key in one) > 1e-4
    torch.testing.assert_close(pipeline_tensors(runs.straight), pipeline_tensors(runs.spread), rtol=0, atol=1e-5)


def test_the_trained_pipeline_loads_and_generates(runs: Runs) -> None:
    pipe = MCDiPipeline.from_pretrained(runs.straight / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    description = json.loads((runs.trajectories / "trajectories" / "trajectories.json").read_text())
    assert pipe.codec.config.base_model == description["base_model"]
    assert pipe.config.num_inference_steps == 4 and pipe.config.strength in (0.5, 1.0)
    assert pipe.scheduler.config.num_segments == description["settings"]["num_targets"]
    support = {"one": ["a b", "c"], "two": ["d"], "three": ["e f g"]}
    (adapter,) = pipe(support, generator=torch.Generator().manual_seed(0)).adapters
    free = pipe.baseline(support)
    assert adapter.labels == list(support)
    assert set(adapter.tensors) == set(pipe.codec.layout.keys)
    assert all(torch.isfinite(value).all() for value in adapter.tensors.values())
    assert all(not torch.equal(adapter.tensors[key], free.tensors[key]) for key in adapter.tensors)


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
    common = ["--pretrained_model_name_or_path", folder, "--dataset_name", tmp_path / "source"]
    options = [*common, "--base_model_name", folder, "--group_column", "domain", "--train_domains", *DOMAINS[:2]]
    options += "--pooling last_token --target_modules q_proj v_proj --layers 2 --token_dim 20 --ways 2 3".split()
    options += "--examples_per_class 4 4 --queries_per_class 2 --num_tasks 3 --train_batch_size 4".split()
    options += "--max_train_steps 3 --shared_steps 2".split()
    call(EXAMPLES / "collect_trajectories.py", *options, "--output_dir", tmp_path / "made")
    options = [*common, "--trajectories", tmp_path / "made" / "trajectories", "--validation_domains", DOMAINS[2]]
    options += "--validation_tasks 2x1 --num_validation_episodes 2 --dim 16 --num_layers 1 --shots 1 2".split()
    options += (
        "--train_batch_size 2 --tasks_per_step 2 --inner_steps 1 --max_train_steps 2 --queries_per_class 2".split()
    )
    options += "--task_loss_weight 0.5 --task_loss_tasks 2 --learning_rate 0.1".split()
    call(EXAMPLES / "train_mcdi.py", *options, "--output_dir", tmp_path / "run")
    pipe = MCDiPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    support = {"i": ["m n", "i o"], "j": ["j j"]}
    (adapter,) = pipe(support, generator=torch.Generator().manual_seed(0)).adapters
    assert all("lora_" in key and value.isfinite().all() for key, value in adapter.tensors.items())
    assert not any(value.equal(pipe.baseline(support).tensors[key]) for key, value in adapter.tensors.items())
    adapter.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"


def test_trajectories_of_another_backbone_are_refused(collected: Collected, tmp_path: Path) -> None:
    folder = collected.trajectories
    other = tiny_backbone(seed=1)
    save_backbone(other, tmp_path / "other")
    options = ["--pretrained_model_name_or_path", tmp_path / "other", "--trajectories", folder / "trajectories"]
    with pytest.raises(AssertionError, match=f"weights {other.fingerprint}.*Load the backbone and the revision"):
        call(
            EXAMPLES / "train_mcdi.py", *options, "--validation_domains", DOMAINS[2], "--output_dir", tmp_path / "run"
        )
    assert not (tmp_path / "run" / "pipeline").exists()
