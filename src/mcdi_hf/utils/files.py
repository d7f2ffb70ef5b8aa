"""Files that are whole or not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


MAX_JSON_BYTES = 64 * 2**20  # a layout of 50,000 tokens takes 5 MB


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place, under a name that no loader reads, and move it there when it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, could_not_write(path, error.strerror)) from error


def could_not_write(path: Path, reason: str) -> str:
    """What to say of a file or a folder that could not be written."""
    return (
        f"Could not write {path}: {reason}. What was written before is whole. Free space, or see to it "
        "that the folder can be written, and run the same command again."
    )


def write_folder(folder: Path, write: Callable[[Path], object], last: str) -> None:
    """Let `write` make files beside their folder, and move them in, which keeps its other files, when all of them are
    on the disk.

    The file `last`, that no loader goes without, leaves the folder first and comes last: a folder that a kill
    leaves is as it was, or whole, or has no such file. A failed write is always an `OSError`, from safetensors too.
    """
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    except OSError as error:
        raise OSError(error.errno, could_not_write(folder, error.strerror)) from error
    try:
        write(beside)
        paths = sorted((path for path in beside.rglob("*") if path.is_file()), key=lambda path: path == beside / last)
        _sync(paths)
        (folder / last).unlink(missing_ok=True)
        for path in paths:
            place = folder / path.relative_to(beside)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    except OSError as error:
        raise OSError(error.errno, could_not_write(folder, error.strerror or str(error))) from error
    except SafetensorError as error:
        raise OSError(could_not_write(folder, str(error))) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(folder: Path, part: Path) -> None:
    """Once it is on the disk, move a folder to its place; an old one there is deleted whole."""
    _sync(part.iterdir())
    if folder.exists():
        delete_folder(folder)
    os.replace(part, folder)


def delete_folder(folder: Path) -> None:
    """Delete a folder under another name, because what is half deleted must not look whole."""
    old = folder.with_name(".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """What safetensors writes, but with the metadata in order, which it leaves to chance: the same adapter is the same
    file, and pushed again it is no new commit.
    """
    content = save(tensors, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]


def read_tensors(path: Path, name: str, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a safetensors file, and the JSON object that its metadata has under a name. A `ValueError` says
    that the file is damaged."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[name])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it and run the same command again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that somebody else may have written. What is wrong with it is a `ValueError` that names
    the file: no JSON object, NaN or infinity in it, or more than 64 MiB. A missing one is a `FileNotFoundError`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: get the whole folder again.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES} bytes: it is not what it should be.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Expected a JSON object; get the file again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected a JSON object; get the file again.")
    return values


def check_format(path: Path, version: Any, newest: int, otherwise: str) -> None:
    """Refuse a file of a format that is not one from 1 to `newest`; `otherwise` says what helps besides an upgrade."""
    if version not in range(1, newest + 1):
        raise ValueError(
            f"{path} is of format {version!r}: this mcdi_hf reads up to {newest}. Upgrade mcdi_hf, or {otherwise}."
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")
