"""Files that are whole or not there."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


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
