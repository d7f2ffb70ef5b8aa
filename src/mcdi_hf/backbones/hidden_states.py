"""Hidden states in a file: computed once, and read by whoever needs the same ones."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock

from ..utils.files import write_file
from .frozen import FrozenBackbone


def cache_name(backbone: FrozenBackbone, place: str, inputs: Any, batch_size: int) -> str:
    """The name of the file for the hidden states that are the input of the layer at `place`: another one for all
    that may change a bit of them. The backbone's weights count, its name does not; `inputs` are the tokens of all
    texts, or the images; the rounding depends on `batch_size`.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in backbone.model.config.to_dict().items() if key != "_name_or_path"}
    kind = backbone.device.type
    dtypes = [str(backbone.model.dtype), str(torch.get_autocast_dtype(kind)), torch.is_autocast_enabled(kind)]
    settings = [config, dtypes, kind, place, batch_size, torch.__version__]
    if backbone.reads_images:
        settings.append(backbone.processor.to_dict())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if backbone.reads_images:
        for image in inputs:
            image = image.convert("RGB")
            digest.update(f"{image.size}".encode() + image.tobytes())
    else:
        for key in sorted(inputs):
            counts = [len(values) for values in inputs[key]]
            digest.update(key.encode() + np.array(counts).tobytes() + np.concatenate(inputs[key]).tobytes())
    return f"hidden-states-{backbone.fingerprint}-{digest.hexdigest()[:32]}.npy"


def cached_states(
    path: Path, states: Iterator[torch.Tensor], length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, bool]:
    """Memory-map the hidden states `(length, ...)` of a file, on the CPU, after writing them part by part if they
    are not there; and say whether they were. Of several processes that ask for one file, one writes it while the
    others wait; it is there whole or not at all. Writing into the tensor does not change the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not (was_there := path.exists()):
            write_file(path, lambda file: _write_states(file, states, length, dtype))
    # bytes, because NumPy has no bfloat16
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(dtype), was_there


def _write_states(file: BinaryIO, states: Iterator[torch.Tensor], length: int, dtype: torch.dtype) -> None:
    for index, part in enumerate(states):
        if part.dtype != dtype:
            raise ValueError(f"The hidden states are of {part.dtype}, expected the backbone's {dtype}.")
        values = part.cpu().contiguous().view(torch.uint8).numpy()
        if index == 0:
            header = {"descr": "|u1", "fortran_order": False, "shape": (length, *values.shape[1:])}
            np.lib.format.write_array_header_2_0(file, header)
        file.write(values.data)
