"""`kill -9` while something is saved: what lies there is what was, or what was to come, or refused by name."""

import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from reliability import Reliability
from safetensors.torch import load_file
from scripts import KILL_AT, call
from tiny import tiny_pipeline

from mcdi_hf import GeneratedAdapter, MCDiPipeline
from mcdi_hf.adapters.head import RidgeHead


# One process that saves, and is killed, once for each of its file operations; until one lives. Prints how many were killed.
SAVE_AND_KILL = """
import pickle, shutil
from mcdi_hf import MCDiPipeline

kind, source, old, root = sys.argv[1:]
made = MCDiPipeline.from_pretrained(source) if kind == "pipeline" else pickle.load(open(source, "rb"))
number, code = 0, -signal.SIGKILL
while code == -signal.SIGKILL:
    number += 1
    own = os.path.join(root, str(number))
    os.makedirs(own)
    if old:
        shutil.copytree(old, os.path.join(own, "saved"))
    if os.fork() == 0:
        kill_at(own, number)
        made.save_pretrained(os.path.join(own, "saved"))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
assert code == 0
print(number - 1)
"""
SUPPORT = {"first": ["a b c", "a c"], "second": ["x y z", "z y"]}


def pipeline_state(folder: Path) -> dict:
    """All that a loaded pipeline is made of: its weights, and its settings."""
    pipe = MCDiPipeline.from_pretrained(folder)
    parts = {"denoiser": pipe.denoiser, "task_encoder": pipe.task_encoder, "codec": pipe.codec}
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return {"weights": weights, "settings": pipe.config["strength"], "head": pipe.codec.head}


def adapter_state(folder: Path) -> dict:
    config = PeftConfig.from_pretrained(str(folder))
    return {"weights": load_file(folder / "adapter_model.safetensors"), "alpha": config.lora_alpha}


def same(one: dict, two: dict) -> bool:
    weights, other = one["weights"], two["weights"]
    rest = [{key: value for key, value in state.items() if key != "weights"} for state in (one, two)]
    return rest[0] == rest[1] and weights.keys() == other.keys() and all(weights[k].equal(other[k]) for k in weights)


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """What was saved before, a folder, and where the script finds what is to be saved now. All of it differs."""
    pipe, _ = tiny_pipeline()
    old, new = tmp_path / "old", tmp_path / "new"
    adapter = pipe(SUPPORT, generator=torch.Generator().manual_seed(0), num_inference_steps=2).adapters[0]
    (pipe if request.param == "pipeline" else adapter).save_pretrained(old)
    if request.param == "adapter":
        config = adapter.lora_config | {"lora_alpha": 9}
        other = {key: value + 1 for key, value in adapter.tensors.items()}
        made = GeneratedAdapter(other, config, adapter.base_model, adapter.labels, adapter.details)
        new.write_bytes(pickle.dumps(made))
        return old, new
    for part in (pipe.denoiser, pipe.task_encoder):
        for parameter in part.parameters():
            parameter.data += 1
    shared = {key: value + 1 for key, value in pipe.codec.shared_adapter().items()}
    pipe.codec.set_shared_adapter(shared, RidgeHead(9.0))
    pipe.register_to_config(strength=0.25)
    pipe.save_pretrained(new)
    return old, new


@pytest.mark.parametrize("saved", ["pipeline", "adapter"], indirect=True)
@pytest.mark.parametrize("there", [False, True])
def test_kill_at_every_step_of_a_save(
    saved: tuple[Path, Path], there: bool, reliability: Reliability, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (old, new), kind = saved, request.node.callspec.params["saved"]
    state = pipeline_state if kind == "pipeline" else adapter_state
    key = "model_index.json" if kind == "pipeline" else "adapter_config.json"
    count = int(call("-c", KILL_AT + SAVE_AND_KILL, kind, new, old if there else "", tmp_path / "runs"))
    assert count >= 10
    folders = [tmp_path / "runs" / str(number) / "saved" for number in range(1, count + 2)]
    expected = [state(folders[-1])] + [state(old)] * there
    assert len(expected) == 1 or not same(*expected)
    seen = []
    for folder in folders:
        loaded, said = reliability.attempt(
            f"folders after kill -9 in a save of {kind}s",
            lambda: state(folder),
            key,
            str(folder),
            same=lambda found: any(same(found, one) for one in expected),
        )
        assert said or any(same(loaded, one) for one in expected), folder
        seen.append("refused" if said else "new" if same(loaded, expected[0]) else "old")
    # In this order, and refused only while files are moved.
    assert seen == sorted(seen, key=["old", "refused", "new"].index) and seen[-1] == "new"
