"""A pipeline folder that was forged is refused before anything of it is loaded, and the file is named."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from fake_hub import FakeHub
from huggingface_hub import HfApi
from reliability import Reliability
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from versions import DTYPE

from mcdi_hf import MCDiPipeline


PART = "forged pipeline folders"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HUGE = 10**12
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "pipe"
    tiny_pipeline()[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "forged"))


def edit(file: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))

    return change


def edit_codec(part: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "codec/config.json").read_text())
        edit("codec/config.json", **{part: config[part] | values})(folder)

    return change


def edit_module(**values: object) -> Change:
    def change(folder: Path) -> None:
        modules = json.loads((folder / "codec/config.json").read_text())["layout"]["modules"]
        edit_codec("layout", modules=[modules[0] | values, *modules[1:]])(folder)

    return change


def fill(file: str, value: float, name: str | None = None) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        tensors[name or min(tensors)].view(-1)[-1] = value
        save_file(tensors, folder / file)

    return change


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / "denoiser" / WEIGHTS), folder / "denoiser/diffusion_pytorch_model.bin")


def pickle_only(folder: Path) -> None:
    pickle(folder)
    (folder / "denoiser" / WEIGHTS).unlink()


def shard(name: str, missing: bool = False) -> Change:
    """The denoiser in two files; the index has another name for the second one."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "denoiser" / WEIGHTS)
        (folder / "denoiser" / WEIGHTS).unlink()
        names = [
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00002-of-00002.safetensors",
        ]
        keys = sorted(tensors)
        for file, own in zip(names, (keys[::2], keys[1::2])):
            save_file({key: tensors[key] for key in own}, folder / "denoiser" / file, metadata={"format": "pt"})
        if missing:
            (folder / "denoiser" / names[1]).unlink()
        places = {key: (names[0], name or names[1])[index % 2] for index, key in enumerate(keys)}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "denoiser" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return change


def without(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def as_integers(folder: Path) -> None:
    tensors = load_file(folder / "denoiser" / WEIGHTS)
    save_file({name: value.long() for name, value in tensors.items()}, folder / "denoiser" / WEIGHTS)


FORGED: dict[str, tuple[Change, str]] = {
    "a pickle beside the weights": (pickle, "diffusion_pytorch_model.bin is a pickle"),
    "a pickle in place of the weights": (pickle_only, "diffusion_pytorch_model.bin is a pickle"),
    "code for the pipeline": (edit("model_index.json", _class_name=["pipe", "Mine"]), "never run"),
    "another pipeline": (edit("model_index.json", _class_name="DDPMPipeline"), "expected 'MCDiPipeline'"),
    "code for a component": (edit("model_index.json", denoiser=["denoiser", "Mine"]), "handed in"),
    "a function for a component": (edit("model_index.json", denoiser=["os", "system"]), "handed in"),
    "another class of ours": (edit("model_index.json", denoiser=["mcdi_hf", "TaskEncoder"]), "MCDiDenoiser"),
    "no component": (edit("model_index.json", denoiser=[None, None]), "MCDiDenoiser"),
    "a component outside": (edit("model_index.json", **{"../evil": ["mcdi_hf", "MCDiDenoiser"]}), "'../evil'"),
    "a setting of another kind": (edit("model_index.json", num_inference_steps="20"), "num_inference_steps '20'"),
    "a config of another class": (edit("denoiser/config.json", _class_name="UNet2DModel"), "UNet2DModel"),
    "an unknown setting": (edit("scheduler/scheduler_config.json", betas_end=0.1), "betas_end"),
    "a shard outside": (shard("../denoiser/x.safetensors"), "'../denoiser/x.safetensors'"),
    "a shard anywhere": (shard("/etc/passwd"), "'/etc/passwd'"),
    "a shard that is missing": (shard("", missing=True), "00002-of-00002.safetensors is missing"),
    "NaN in weights": (fill(f"denoiser/{WEIGHTS}", float("nan")), "NaN or inf"),
    "inf in statistics": (fill(f"codec/{WEIGHTS}", float("inf")), "NaN or inf"),
    "scales of zero": (fill(f"codec/{WEIGHTS}", 0.0, "std"), "scales above 0"),
    "whole numbers as weights": (as_integers, "whole numbers"),
    "NaN in a config": (edit("scheduler/scheduler_config.json", beta_end=float("nan")), "holds NaN"),
    "a huge width": (edit("denoiser/config.json", dim=2**40), "makes no MCDiDenoiser|of shape"),
    "a great width": (edit("denoiser/config.json", dim=2**20), "of shape"),
    "a huge depth": (edit("denoiser/config.json", num_layers=HUGE), f"num_layers {HUGE}"),
    "heads that do not divide": (edit("denoiser/config.json", num_heads=3), "num_heads is 3"),
    "no heads": (edit("denoiser/config.json", num_heads=0), "num_heads is 0"),
    "a huge feed-forward layer": (edit("denoiser/config.json", ff_mult=HUGE), "of shape|makes no"),
    "huge features": (edit("task_encoder/config.json", feature_dim=HUGE), "of shape|makes no"),
    "tokens of another layout": (edit("denoiser/config.json", tokens=[[HUGE] * 3]), "another tokens"),
    "a huge token": (edit("task_encoder/config.json", token_dim=HUGE), "another token_dim"),
    "huge matrices": (edit_module(in_features=HUGE), "of shape|makes no"),
    "a head of another kind": (edit("codec/config.json", head={"log_scale": "1"}), "log_scale '1' of the head"),
    "a head without a norm": (edit("codec/config.json", head={"feature_norm": 0.0}), "feature_norm 0.0 of the head"),
    "a pipeline of an earlier version": (edit("codec/config.json", imprint_scale=10.0), "is of mcdi_hf 0.1"),
    "a negative rank": (edit_module(rank=-1), r"sizes hold \[-1\]"),
    "a rank of another kind": (edit_module(rank="2"), r"sizes hold \['2'\]"),
    "a module without a name": (edit_module(name=None), "different names"),
    "a layer too far": (edit_module(name=f"encoder.layer.{HUGE}.query"), "another tokens"),
    "no layout": (edit("codec/config.json", layout=None), "no layout of adapters"),
    "a foreign LoraConfig": (edit_codec("lora_config", evil=1), "evil"),
    "no fingerprint": (edit_codec("base_model", fingerprint=None), "fingerprint"),
    "huge timesteps": (edit("scheduler/scheduler_config.json", num_train_timesteps=HUGE), str(HUGE)),
    "another schedule": (edit("scheduler/scheduler_config.json", beta_schedule="evil"), "makes no LocalConsistency"),
    "no index": (without("model_index.json"), "model_index.json is missing"),
    "no config": (without("codec/config.json"), "codec/config.json is missing"),
    "no weights": (without(f"codec/{WEIGHTS}"), f"has no {WEIGHTS}"),
    "a list for a config": (lambda folder: (folder / "codec/config.json").write_text("[]"), "holds a list"),
    "a deep config": (lambda folder: (folder / "codec/config.json").write_text("[" * 10**6), "is damaged"),
    "a huge config": (
        lambda folder: (folder / "codec/config.json").open("wb").truncate(HUGE),
        "codec/config.json is larger",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_folders_are_refused(folder: Path, reliability: Reliability, name: str) -> None:
    change, message = FORGED[name]
    change(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, said = reliability.attempt(PART, lambda: MCDiPipeline.from_pretrained(folder), str(folder))
    assert loaded is None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    with pytest.raises((ValueError, OSError), match=message):
        MCDiPipeline.from_pretrained(folder)
    assert len(said) < 600 + 3 * len(str(folder))


FOREIGN_ADAPTERS: dict[str, Change] = {
    "another alpha": edit_codec("lora_config", lora_alpha=400),
    "other targets": edit_codec("lora_config", target_modules=["key"]),
}


@pytest.mark.parametrize("name", FOREIGN_ADAPTERS)
def test_a_config_of_other_adapters_is_refused_by_the_backbone(
    folder: Path, reliability: Reliability, name: str
) -> None:
    """Only PEFT knows what a config makes, and it needs the backbone: the first call with examples loads it."""
    FOREIGN_ADAPTERS[name](folder)
    pipe = MCDiPipeline.from_pretrained(folder)
    _, said = reliability.attempt(PART, lambda: pipe({"p": ["a"], "q": ["b"]}), "scales other modules than the layout")
    assert said


def test_what_a_saved_pipeline_may_be(folder: Path, sound: Path) -> None:
    """Shards, half precision in a variant, DDIM's steps, a file that nobody reads: all load."""
    pipe = MCDiPipeline.from_pretrained(sound)
    shard("")(folder)
    (folder / "pipeline.py").write_text("raise SystemExit")
    (folder / "optimizer.bin").write_bytes(b"not read")
    loaded = MCDiPipeline.from_pretrained(folder)
    torch.testing.assert_close(loaded.denoiser.state_dict(), pipe.denoiser.state_dict(), rtol=0, atol=0)
    pipe.scheduler = DDIMScheduler(num_train_timesteps=20)
    pipe.save_pretrained(folder.parent / "half", variant="fp16")
    half = MCDiPipeline.from_pretrained(folder.parent / "half", variant="fp16", **{DTYPE: torch.float16})
    assert half.denoiser.dtype == torch.float16 and isinstance(half.scheduler, DDIMScheduler)


def test_a_component_at_hand_is_not_read(folder: Path, sound: Path) -> None:
    pipe = MCDiPipeline.from_pretrained(sound)
    shutil.rmtree(folder / "denoiser")
    edit("model_index.json", denoiser=["mcdi_hf", "TaskEncoder"])(folder)
    assert MCDiPipeline.from_pretrained(folder, denoiser=pipe.denoiser).denoiser is pipe.denoiser
    shutil.rmtree(folder / "codec")
    assert MCDiPipeline.from_pretrained(folder, denoiser=pipe.denoiser, codec=pipe.codec).codec is pipe.codec


def test_pickles_cannot_be_asked_for(sound: Path) -> None:
    with pytest.raises(ValueError, match="only safetensors"):
        MCDiPipeline.from_pretrained(sound, use_safetensors=False)


@pytest.mark.parametrize(
    "name", ["code for the pipeline", "NaN in weights", "a pickle in place of the weights", "no index"]
)
def test_forged_repositories_are_refused(hub: FakeHub, folder: Path, reliability: Reliability, name: str) -> None:
    FORGED[name][0](folder)
    api = HfApi()
    api.upload_folder(repo_id=api.create_repo("tester/forged").repo_id, folder_path=folder)
    names = ("model_index.json", "diffusion_pytorch_model")
    for trust in (False, True):
        loaded, _ = reliability.attempt(
            "forged pipelines on the Hub",
            lambda: MCDiPipeline.from_pretrained("tester/forged", trust_remote_code=trust),
            *names,
            "safetensors",
        )
        assert loaded is None
