"""The output folder of a run: it has one writer at a time, and its checkpoints are whole."""

import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mcdi_hf.utils.files import could_not_write


CHECKPOINT = re.compile(r"checkpoint_(\d+)")


def hold_folder(folder: Path, accelerator: Accelerator) -> FileLock:
    """Make an output folder this run's own, until the lock is released or the run ends, however it ends.

    The processes of one launch are one writer: the main one holds the lock.

    Args:
        folder (`Path`): It is made if need be.
        accelerator (`Accelerator`): The run's.

    Raises:
        `OSError`: on every process, when another run holds the folder, or when it cannot be written.
    """
    lock, refused = FileLock(folder / ".lock", blocking=False), None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            refused = f"Another run writes to {folder}: wait for its end, or choose another --output_dir."
        except OSError as error:
            refused = f"{folder} cannot be written: {error.strerror}. Choose another --output_dir."
    (refused,) = broadcast_object_list([refused])
    if refused:
        raise OSError(refused)
    return lock


def save_checkpoint(accelerator: Accelerator, folder: Path, number: int, total_limit: int | None) -> None:
    """Write the state of a run to `checkpoint_NUMBER`, which is whole or not there, and delete the oldest ones.

    To be called on every process.

    Args:
        accelerator (`Accelerator`): With everything that is registered for checkpointing.
        folder (`Path`): Where the checkpoints lie.
        number (`int`): That of this one; one of the same number is replaced.
        total_limit (`int`, *optional*): How many to keep.

    Raises:
        `OSError`: when it cannot be written. The earlier ones are whole, and this one is not there.
    """
    place, part = folder / f"checkpoint_{number}", folder / ".part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(part))
    except (SafetensorError, RuntimeError) as error:  # what safetensors and PyTorch make of a full disk
        raise OSError(could_not_write(place, str(error).splitlines()[0])) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if place.exists():
            _delete(place)
        os.replace(part, place)
        others = [path for path in _checkpoints(folder) if path != place]
        for path in others[: 0 if total_limit is None else max(0, len(others) + 1 - total_limit)]:
            _delete(path)
    accelerator.wait_for_everyone()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or `None`."""
    return next(reversed(_checkpoints(folder)), None)


def _delete(checkpoint: Path) -> None:
    """Under another name, because what is half deleted must not look whole."""
    old = checkpoint.with_name(".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(checkpoint, old)
    shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoint_*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))
