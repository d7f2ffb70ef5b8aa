"""Loading a pipeline after a look at its files: nothing large is allocated, nothing foreign is run. Saving it whole."""

import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open

from ..adapters.codec import AdapterCodec
from ..adapters.head import RidgeHead
from ..adapters.layout import AdapterLayout
from ..adapters.lora_config import read_lora_config
from ..models.denoiser import MCDiDenoiser
from ..utils.files import check_format, read_json, write_folder


PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
WEIGHTS = re.compile(r"diffusion_pytorch_model(\.[\w-]+)?\.safetensors")
SHARD = re.compile(r"diffusion_pytorch_model(\.[\w-]+)?-\d{5}-of-\d{5}(\.[\w-]+)?\.safetensors")
MAX_TIMESTEPS = 100_000
# Of a pipeline's files. Whoever changes what they mean raises it, and reads the older ones or says what to do.
FORMAT_VERSION, FORMAT_KEY = 1, "_format_version"
PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "create_pr", "token")
# What a look at the index has in common with the download of the rest.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
BASE_MODEL = {"name_or_path": str, "fingerprint": str, "pooling": str, "max_length": int, "model_class": str}


def load_checked(pipeline_class: type, load: Callable, name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Any:
    """Load a pipeline by diffusers' own `from_pretrained` after a look at what it will read."""
    if kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors is False, but only safetensors are read: leave it out.")
    kwargs["use_safetensors"] = True  # diffusers would fall back to pickles
    folder = Path(name_or_path)
    if not folder.is_dir():
        # One commit from the first look on, whatever is pushed meanwhile; offline it is the cached one.
        kwargs["revision"] = _download_index(pipeline_class, str(name_or_path), kwargs).parent.name
        pipe = load(name_or_path, **kwargs)
        pipe.revision = kwargs["revision"]
        return pipe
    check_pipeline_folder(pipeline_class, folder, kwargs)
    try:
        return load(name_or_path, **kwargs)
    except ValueError as error:  # a setting of the index that the constructor refuses
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def download_checked(pipeline_class: type, download: Callable, name: str, kwargs: dict[str, Any]) -> str:
    """Download a pipeline by diffusers' own `download`, and refuse what is no pipeline of ours."""
    # Before diffusers reads it, who would ask for the code that it names.
    check_index(pipeline_class, _download_index(pipeline_class, name, kwargs), kwargs)
    folder = download(name, **kwargs)
    check_pipeline_folder(pipeline_class, Path(folder), kwargs)
    return folder


def backbone_place(pipe: Any) -> str | None:
    """Where a pipeline's backbone is loaded from, if not by its name: what begins with `./` lies beside the components."""
    place, home = pipe.config.base_model_name_or_path, pipe.name_or_path
    if place is None or not place.startswith("./") or home is None:
        return place
    own = Path(place)
    if ".." in own.parts:
        raise ValueError(f"base_model_name_or_path is {place!r}: expected a folder within that of the pipeline.")
    if not Path(home).is_dir():
        home = snapshot_download(home, revision=pipe.revision, allow_patterns=f"{own}/*")
    own = Path(home) / own
    if not own.is_dir():
        raise FileNotFoundError(f"{own} is missing: get the whole pipeline again, or name a base_model_name_or_path.")
    refuse_pickles(own)
    return str(own)


def _download_index(pipeline_class: type, name: str, kwargs: dict[str, Any]) -> Path:
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    return Path(hf_hub_download(name, pipeline_class.config_name, **hub))


def save_whole(pipe: Any, save: Callable, folder: Path, kwargs: dict[str, Any]) -> None:
    """Save a pipeline by diffusers' own `save_pretrained`, whole or not at all, and the same files every time."""
    push = kwargs.pop("push_to_hub", False)
    hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}

    place = pipe.config.base_model_name_or_path or ""

    def write(beside: Path) -> None:
        save(str(beside), **kwargs)
        if place.startswith("./"):
            shutil.copytree(backbone_place(pipe), beside / place)
        index = beside / pipe.config_name
        for path in beside.rglob("*.json"):
            values = json.loads(path.read_text())
            # Where this pipeline was loaded from is nobody's business.
            kept = {key: value for key, value in values.items() if key != "_name_or_path"}
            if path == index:
                kept[FORMAT_KEY] = FORMAT_VERSION
            if kept != values:
                path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")

    write_folder(folder, write, last=pipe.config_name)
    if push:
        pipe.push_to_hub(hub.pop("repo_id", folder.name), **hub, **kwargs)


def check_pipeline_folder(pipeline_class: type, folder: Path, given: dict[str, Any]) -> None:
    """Refuse a folder that is no saved pipeline, naming the file, what is wrong with it and what was expected: a
    component of a class that is not ours, pickles beside the weights, configs and weights that do not fit each other,
    numbers that are not finite, missing files. Components that are `given` by the caller are not read.

    Damage that leaves every number finite and in its place cannot be seen: safetensors keep no checksum.
    """
    check_index(pipeline_class, folder / pipeline_class.config_name, given)
    layout = given["codec"].layout if "codec" in given else None
    # The codec first: the sizes of its tensors are those of the layout, which the denoiser must have, too.
    for name, kind in sorted(_components(pipeline_class).items(), key=lambda item: item[1] is not AdapterCodec):
        if name in given:
            continue
        path = folder / name / kind.config_name
        kind, config = _read_config(path, _kinds(kind))
        if issubclass(kind, SchedulerMixin):
            if type(steps := config.get("num_train_timesteps", 1)) is not int or not 1 <= steps <= MAX_TIMESTEPS:
                raise ValueError(f"{path} has num_train_timesteps {steps!r}: expected 1 to {MAX_TIMESTEPS}.")
            _make(path, kind, config)
            continue
        sets = _weight_sets(path.parent)
        if kind is AdapterCodec:
            layout = _check_codec(path, config, sets)
        sizes = MCDiDenoiser.sizes_of(layout) if kind is MCDiDenoiser else {"token_dim": layout.token_dim}
        if kind is not AdapterCodec and (other := [size for size in sizes if config.get(size) != sizes[size]]):
            raise ValueError(f"{path} has another {other[0]} than the codec's layout: they are not of one pipeline.")
        for files in sets:
            _check_weights(path, kind, config, files)


def check_index(pipeline_class: type, path: Path, given: dict[str, Any]) -> None:
    """Refuse an index that names other classes than ours, or settings that the pipeline does not have."""
    index, components = read_json(path), _components(pipeline_class)
    settings = {name: hint for name, hint in _hints(pipeline_class).items() if name not in components}
    if index.get("_class_name") != pipeline_class.__name__:
        raise ValueError(
            f"{path} is of {index.get('_class_name')!r}: expected {pipeline_class.__name__!r}. Code that comes with a "
            "pipeline is never run."
        )
    check_format(path, index.get(FORMAT_KEY, 1), FORMAT_VERSION, "get the pipeline that was saved for this version")
    for name, kind in components.items():
        allowed = [[one.__module__.split(".")[0], one.__name__] for one in _kinds(kind)]
        if name not in given and index.get(name) not in allowed:
            raise ValueError(
                f"{path} has as {name} {index.get(name)!r}: expected {' or '.join(map(str, allowed))}. Another one is "
                f"loaded by you and handed in, from_pretrained(..., {name}=yours)."
            )
    for name, value in index.items():
        if name.startswith("_") or name in components:
            continue
        if name not in settings:
            raise ValueError(f"{path} has {name!r}, which {pipeline_class.__name__} does not know.")
        if not isinstance(value, settings[name]) and not (settings[name] is float and type(value) is int):
            raise ValueError(f"{path} has {name} {value!r}: expected {settings[name]}.")


def _hints(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind.__init__).items() if name != "return"}


def _components(pipeline_class: type) -> dict[str, type]:
    hints = _hints(pipeline_class)
    return {name: hint for name, hint in hints.items() if inspect.isclass(hint) and issubclass(hint, ConfigMixin)}


def _kinds(kind: type) -> tuple[type, ...]:
    """The classes that may stand for one of the pipeline's: a scheduler has compatible ones."""
    return (kind, *(getattr(diffusers, name) for name in getattr(kind, "_compatibles", [])))


def _read_config(path: Path, kinds: tuple[type, ...]) -> tuple[type, dict[str, Any]]:
    """A component's class, which must be one of some, and its config, without an argument that the class has not."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is missing: get the whole pipeline again.")
    refuse_pickles(path.parent)
    config = read_json(path)
    kind = next((one for one in kinds if one.__name__ == config.get("_class_name")), None)
    if kind is None:
        raise ValueError(f"{path} is of {config.get('_class_name')!r}: expected {kinds[0].__name__!r}.")
    known = inspect.signature(kind.__init__).parameters
    if "imprint_scale" in config or "head_width" in config:
        raise ValueError(
            f"{path} is of mcdi_hf 0.1, whose adapters were made otherwise: use that version, or train anew."
        )
    if unknown := sorted(name for name in config if not name.startswith("_") and name not in known):
        raise ValueError(f"{path} has {unknown}, which {kind.__name__} does not know.")
    return kind, config


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder that holds what runs code when it is read."""
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(
            f"{folder / pickled[0]} is a pickle, which may run anything when it is read: only safetensors are. If "
            "you trust it, convert it and delete it."
        )


def _make(path: Path, kind: type, config: dict[str, Any]) -> Any:
    """A component from its config, without memory for its tensors."""
    try:
        with torch.device("meta") if issubclass(kind, ModelMixin) else torch.device("cpu"):
            return kind.from_config(config)
    except Exception as error:  # a foreign config can go wrong in any way, and each of them is the config's fault
        raise ValueError(f"{path} makes no {kind.__name__}: {type(error).__name__}: {error}") from error


def _weight_sets(folder: Path) -> list[dict[str, tuple[Path, tuple[int, ...]]]]:
    """Every set of weights that a loader may take, one or one a variant: tensor -> its file and its shape."""
    sets = [[path] for path in sorted(folder.iterdir()) if WEIGHTS.fullmatch(path.name)]
    for index in sorted(folder.glob("diffusion_pytorch_model*.index*.json")):
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files.")
        if strange := sorted(name for name in set(places.values()) if not SHARD.fullmatch(name)):
            raise ValueError(
                f"{index} names {strange[0]!r}: expected files of the same folder, as save_pretrained does."
            )
        sets.append([folder / name for name in sorted(set(places.values()))])
    if not sets:
        raise FileNotFoundError(f"{folder} has no diffusion_pytorch_model.safetensors: get the whole pipeline again.")
    return [{name: (path, shape) for path in paths for name, shape in _shapes(path).items()} for paths in sets]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: get the whole pipeline again.")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Expected safetensors; get the file again.") from error


def _check_codec(path: Path, config: dict[str, Any], sets: list[dict]) -> AdapterLayout:
    """The codec's layout, whose tokens are as many as there are scales."""
    try:
        layout = AdapterLayout.from_dict(config.get("layout"))
        read_lora_config(config.get("lora_config"))
        head = RidgeHead(**(config.get("head") or {}))
    except Exception as error:  # as in `_make`
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    base_model = config.get("base_model")
    for name, kind in BASE_MODEL.items():
        if not isinstance(base_model, dict) or not isinstance(base_model.get(name), kind):
            raise ValueError(f"{path} has no {name} of a base_model: expected a {kind.__name__}.")
    for name, value in asdict(head).items():
        if type(value) not in (int, float) or not math.isfinite(value) or name == "feature_norm" and value <= 0:
            raise ValueError(f"{path} has {name} {value!r} of the head: expected a finite number, a norm above 0.")
    for files in sets:
        _, found = files.get("std", (path, None))
        if found != (len(layout.modules), 1):
            raise ValueError(
                f"{path} has a layout of {len(layout.modules)} modules, but the std beside it has the shape {found}: they "
                "are of different codecs."
            )
    return layout


def _check_weights(path: Path, kind: type, config: dict[str, Any], files: dict) -> None:
    """Refuse weights that are not those that the config asks for, or are not finite."""
    blocks = config.get("num_layers", 0)
    if type(blocks) is not int or blocks > len(files):
        raise ValueError(f"{path} has num_layers {blocks!r}, but there are {len(files)} tensors.")
    expected = {name: tuple(value.shape) for name, value in _make(path, kind, config).state_dict().items()}
    if different := sorted(files.keys() ^ expected.keys()):
        where, _ = files.get(different[0], (path, None))
        raise ValueError(f"{where} and {path.name} do not fit: only one of them has {different[0]!r}.")
    for name, (place, found) in files.items():
        if found != expected[name]:
            raise ValueError(f"{place} has {name} of shape {found}: expected {expected[name]}, see {path.name}.")
        with safe_open(place, "pt") as file:
            tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{place} has {name} with NaN or inf, or of whole numbers: expected finite numbers.")
        if kind is AdapterCodec and name == "std" and not (tensor > 0).all():
            raise ValueError(f"{place} has {name} of {tensor.min().item()}: expected scales above 0.")
