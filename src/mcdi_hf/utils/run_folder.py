"""The output folder of a run: it has one writer at a time, and its checkpoints are whole."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .files import could_not_write, delete_folder, replace_folder


CHECKPOINT = re.compile(r"checkpoint_(\d+)")


@contextmanager
def hold_folder(folder: Path, state: PartialState | Accelerator) -> Iterator[None]:
    """Make an output folder this run's own. The processes of one launch are one writer: the main one holds the lock.

    Raises:
        `OSError`: on every process, when another run holds the folder, or when it cannot be written.
    """
    lock, refused = FileLock(folder / ".lock", blocking=False), None
    if state.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            refused = f"Another run writes to {folder}: wait for its end, or choose another output_dir."
        except OSError as error:
            refused = f"{folder} cannot be written: {error.strerror}. Choose another output_dir."
    (refused,) = broadcast_object_list([refused])
    if refused:
        raise OSError(refused)
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, total_limit: int | None) -> None:
    """Write the state of a run to `checkpoint_STEP`, which is whole or not there, and keep only the newest
    `total_limit`. To be called on every process. An `OSError` says that it cannot be written; the earlier ones are
    whole then.
    """
    place, part = folder / f"checkpoint_{step}", folder / ".part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(part))
    except (SafetensorError, RuntimeError) as error:  # what safetensors and PyTorch make of a full disk
        raise OSError(could_not_write(place, str(error).splitlines()[0])) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(place, part)
        others = [path for path in _checkpoints(folder) if path != place]
        for path in others[: 0 if total_limit is None else max(0, len(others) + 1 - total_limit)]:
            delete_folder(path)
    accelerator.wait_for_everyone()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or `None`."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoint_*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))
