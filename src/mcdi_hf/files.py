"""Files that are whole or not there."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


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
        message = (
            f"Could not write {path}: {error.strerror}. What was written before is whole. Free space, or see to it "
            "that the folder can be written, and run the same command again."
        )
        raise OSError(error.errno, message) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that somebody else may have written; whatever is wrong with it is an error that names the file.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when it is no JSON object, holds NaN or infinity, or is larger than 64 MiB.
    """
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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")
