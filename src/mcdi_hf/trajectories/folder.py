"""A trajectory data set on disk: a folder that is a data set repository of the Hub as it stands."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Array2D, Dataset, Features, List, Value
from huggingface_hub import CommitInfo, HfApi

from ..adapters.codec import AdapterCodec
from ..adapters.layout import AdapterLayout
from ..models.task_encoder import TaskEncoder
from ..utils.files import write_file, write_folder
from .dataset_card import trajectory_card
from .description import FORMAT_VERSION, differences, read_codec, read_record, same_basis
from .shards import check_shard


RECORD, CARD, CODEC, TASK_ENCODER = "trajectories.json", "README.md", "codec", "task_encoder"
SHARD_NAME = re.compile(r"train-(\d{6})-(\d{6})\.parquet")


def trajectory_features(layout: AdapterLayout) -> Features:
    """The columns of a trajectory data set.

    `weights` is `(1 + k, num_tokens * token_dim)`: the coefficients z at the start, which are 1, then at the `k` local
    targets, flat; see [`AdapterCodec`]. `support` lists, for each of `classes`, the rows of the table of sources that
    the optimiser saw. `accuracy` is that on other rows at the end, `start_accuracy` the shared adapter's on them.
    """
    return Features(
        {
            "task": Value("int64"),
            "group": Value("string"),
            "classes": List(Value("string")),
            "support": List(List(Value("int64"))),
            "steps": List(Value("int64")),
            "losses": List(Value("float32")),
            "train_accuracy": Value("float32"),
            "start_accuracy": Value("float32"),
            "accuracy": Value("float32"),
            "weights": Array2D((None, len(layout.modules) * layout.token_dim), "float32"),
        }
    )


class TrajectoryFolder:
    """A trajectory data set on disk, made by [`TrajectoryFolder.create`] or copied from its repository, which grows
    shard by shard.

    Its files are those of a data set repository: the card `README.md`, `trajectories.json`, whose `record` tells
    how the trajectories were made, with the adapters' `layout`, the folder `codec`, in whose basis the weights are
    written, the folder `task_encoder`, which was trained beside that basis, and shards
    `data/train-<first task>-<last task>.parquet` with the columns `features`. A file is written whole or not at all, so
    a collection that was stopped at any moment can be continued.

    Example: `TrajectoryFolder(Path("runs/mine/trajectories")).summary()`
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise ValueError(f"{folder} is no trajectory data set: it has no {RECORD}.")
        self.record, self.layout = read_record(folder / RECORD)
        self.features = trajectory_features(self.layout)

    @property
    def codec(self) -> AdapterCodec:
        """The codec that the weights are written with."""
        return read_codec(self.folder / CODEC, self.layout)

    @classmethod
    def create(cls, folder: Path, codec: AdapterCodec, encoder: TaskEncoder, description: dict) -> "TrajectoryFolder":
        """Make an empty data set of a codec's adapters, or open one that was made in the same way to continue it.

        `description` is all else that the trajectories depend on, as JSON has it: `lora_config`, `base_model`, the
        optimiser's settings, seeds, sources, versions. The number of tasks, which may grow, is no part of it. A
        `ValueError` says that the folder holds trajectories that were made otherwise, and names every difference, or
        in another basis; an `OSError` that it cannot be written.
        """
        # dict(**...) refuses a description that has a `layout` of its own.
        record = dict(**description, layout=codec.layout.to_dict(), format_version=FORMAT_VERSION)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        if (folder / RECORD).is_file():
            different = differences(read_record(folder / RECORD)[0], json.loads(text))
            if different:
                raise ValueError(
                    f"{folder} holds trajectories that were made otherwise: {'; '.join(different)}. Choose another "
                    "folder, or the same settings to continue."
                )
            if not same_basis(read_codec(folder / CODEC, codec.layout), codec):
                raise ValueError(
                    f"{folder} holds trajectories in the basis of another shared adapter, which the same settings can "
                    "make on another machine: get its shared_adapter.safetensors again, or choose another folder."
                )
        elif (folder / CARD).exists() or (folder / "data").exists():
            raise ValueError(f"{folder} holds other files and no {RECORD}: choose another folder.")
        else:
            for name, part in ((CODEC, codec), (TASK_ENCODER, encoder)):
                write_folder(folder / name, part.save_pretrained, last=part.config_name)
            write_file(folder / RECORD, lambda file: file.write(text.encode()))
        made = cls(folder)
        if not (folder / CARD).exists():
            made._write_card(None)
        return made

    @property
    def shards(self) -> dict[range, Path]:
        """Task numbers -> Parquet file, in order."""
        shards = {}
        for path in sorted((self.folder / "data").glob("*.parquet")):
            match = SHARD_NAME.fullmatch(path.name)
            if match is None:
                raise ValueError(f"{path} is no shard of trajectories, but loaders would read it: move it away.")
            shards[range(int(match[1]), int(match[2]) + 1)] = path
        return shards

    @property
    def numbers(self) -> set[int]:
        """The numbers of the tasks that are there, each in a whole shard."""
        return {number for numbers in self.shards for number in numbers}

    def check_whole(self) -> None:
        """Refuse a data set without trajectories, with tasks missing between 0 and the last, or with a damaged
        shard."""
        numbers = self.numbers
        if not numbers:
            raise ValueError(f"{self.folder} holds no trajectories yet: run the collection first.")
        missing = sorted(set(range(max(numbers))) - numbers)
        if missing:
            raise ValueError(
                f"{self.folder} is not finished, {len(missing)} of its tasks up to {max(numbers)} are missing: "
                f"{missing}. Run the same collection again to add them."
            )
        for numbers, path in self.shards.items():
            check_shard(path, numbers, self.features)

    def append(self, rows: list[dict]) -> None:
        """Write one shard, whole or not at all.

        `rows` have successive task numbers and all the columns of [`trajectory_features`]; `weights` is a float32
        `np.ndarray` of shape `(1 + k, num_tokens * token_dim)`. A `ValueError` says that a task is there already, or
        that weights are not finite or do not fit the layout; an `OSError` that the shard cannot be written.
        """
        width, numbers = self.features["weights"].shape[1], [row["task"] for row in rows]
        if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(f"A shard holds tasks with successive numbers; got {numbers}.")
        if there := sorted(self.numbers.intersection(numbers)):
            raise ValueError(f"{self.folder} holds the tasks {there} already.")
        for row in rows:
            weights, expected = row["weights"], (len(row["steps"]), width)
            if weights.shape != expected or len(row["losses"]) != len(row["steps"]) - 1:
                raise ValueError(
                    f"Task {row['task']} has weights of shape {weights.shape} and {len(row['losses'])} losses; its "
                    f"{len(row['steps'])} steps need {expected} and {len(row['steps']) - 1}."
                )
            if not np.isfinite(weights).all():
                raise ValueError(f"The weights of task {row['task']} are not finite: its optimiser diverged.")
        columns = {name: [row[name] for row in rows] for name in self.features}
        table = Dataset.from_dict(columns, features=self.features).data.table

        def write(file: BinaryIO) -> None:
            # Small row groups, because a stream reads them one at a time; floats have no use for a dictionary. The
            # format's own checksums, because a flipped bit in a weight cannot be seen otherwise.
            pyarrow.parquet.write_table(table, file, row_group_size=8, use_dictionary=False, write_page_checksum=True)

        write_file(self.folder / "data" / f"train-{numbers[0]:06d}-{numbers[-1]:06d}.parquet", write)

    def summary(self) -> dict:
        """What the folder holds, when it is whole: `tasks`, their number; `groups`, group -> number of tasks;
        `accuracy` (held out), `start_accuracy` and `train_accuracy`, each mean and standard deviation over the tasks;
        `losses`, step -> mean; `megabytes` of the shards.
        """
        self.check_whole()
        names = [name for name in self.features if name not in ("classes", "support", "weights")]
        # Not `read_table`, which makes columns of what it takes for partitions in the folder's name.
        tables = [pyarrow.parquet.ParquetFile(path).read(columns=names) for path in self.shards.values()]
        columns = pyarrow.concat_tables(tables).to_pydict()
        losses: dict[int, list[float]] = {}
        for steps, values in zip(columns["steps"], columns["losses"]):
            for step, loss in zip(steps[1:], values):
                losses.setdefault(step, []).append(loss)
        accuracies = {name: columns[name] for name in ("accuracy", "start_accuracy", "train_accuracy")}
        return {
            "tasks": len(columns["task"]),
            "groups": dict(sorted(Counter(columns["group"]).items())),
            **{name: (float(np.mean(values)), float(np.std(values))) for name, values in accuracies.items()},
            "losses": {step: float(np.mean(values)) for step, values in sorted(losses.items())},
            "megabytes": sum(path.stat().st_size for path in self.shards.values()) / 1e6,
        }

    def finish(self) -> None:
        """Write the card anew, with a summary of the trajectories, which must be whole."""
        self._write_card(self.summary())

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **kwargs) -> CommitInfo:
        """Push the whole folder to a data set repository, which is made if need be. Shards that only it has go.

        `kwargs`, such as `create_pr`, `revision` and `commit_message`, are passed on to `HfApi.upload_folder`.
        """
        self.check_whole()
        api = HfApi(token=token)
        return api.upload_folder(
            repo_id=api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id,
            repo_type="dataset",
            folder_path=self.folder,
            ignore_patterns="*.part",
            delete_patterns="data/*.parquet",
            **{"commit_message": "Upload trajectories"} | kwargs,
        )

    def _write_card(self, summary: dict | None) -> None:
        title, width = self.folder.resolve().name, self.features["weights"].shape[1]
        card = trajectory_card(title, self.record, width, summary)
        write_file(self.folder / CARD, lambda file: file.write(str(card).encode()))
