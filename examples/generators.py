"""The generators of a benchmark: trajectories, then pipelines of every objective and seed, each made once."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import collect_trajectories
import train_mcdi
from config import as_arguments
from data import write_whole
from families import ROOT
from train_arguments import ABLATIONS, arguments
from training_data import Data

from mcdi_hf.trajectories.description import differences


@dataclass(frozen=True)
class Generator:
    """What one fold's generators are made of.

    Attributes:
        name (`str`): The generator's and the fold's, below the folder of all generators.
        folder (`Path`): Where trajectories and pipelines lie.
        backbone (`Path`): A folder; `None` is the wheel's.
        trajectories (`dict`): Arguments of `collect_trajectories.py`.
        training (`dict`): Arguments of `train_mcdi.py`.
        validation_domains (`list[str]`), test_domains (`list[str]`): What this fold leaves out of training.
        seeds (`list[int]`): Of meta-training.
        ablation_seeds (`list[int]`): Of them those that the other objectives are trained with, too.
    """

    name: str
    folder: Path
    backbone: Path | None
    trajectories: dict
    training: dict
    validation_domains: list[str]
    test_domains: list[str]
    seeds: list[int]
    ablation_seeds: list[int]

    def pipeline(self, objective: str, seed: int) -> Path:
        return self.folder / f"{objective.split()[0]}-{seed}" / "pipeline"

    def make(self, data_root: Path, cache_dir: Path | None) -> dict[str, float]:
        """Make what is not there yet, and return the seconds that each stage took, whenever that was."""
        spent_path = self.folder / "seconds.json"
        spent = json.loads(spent_path.read_text()) if spent_path.exists() else {}
        data = None
        for stage, make in self._stages(data_root, cache_dir):
            if stage in spent:
                continue
            began = time.perf_counter()
            data = make(data)
            spent[stage] = time.perf_counter() - began
            text = json.dumps(spent, indent=1)
            write_whole(spent_path, lambda part: part.write_text(text))
        return spent

    def _stages(self, data_root: Path, cache_dir: Path | None) -> list[tuple]:
        """What is to be done, in its order: a name, and what makes it with the data of a stage before, if any."""
        common = {} if cache_dir is None else {"cache_dir": cache_dir}
        if self.backbone is not None:
            common["pretrained_model_name_or_path"] = self.backbone
        mixture = ROOT / self.trajectories["mixture"]
        collecting = self.trajectories | common
        collecting |= {"mixture": mixture, "mixture_root": data_root, "output_dir": self.folder}
        if "train_domains" not in collecting:
            collecting["held_out_domains"] = self.validation_domains + self.test_domains
        self._check_unchanged("trajectories", self.trajectories)
        self._check_unchanged("training", self.training)

        def collect(_: None) -> None:
            collect_trajectories.run(collect_trajectories.arguments(as_arguments(collecting, self.name)))

        def train(data: Data | None, objective: str, seed: int) -> Data:
            folder = self.pipeline(objective, seed).parent
            values = self.training | ABLATIONS[objective] | common
            values |= {"trajectories": self.folder / "trajectories", "validation_domains": self.validation_domains}
            args = arguments(self.name, as_arguments(values | {"seed": seed, "output_dir": folder}, self.name))
            run = train_mcdi.Run(args, data)
            run.resume("latest")
            run.train()
            return run.data

        stages = [("trajectories", collect)]
        for objective, seed in self.trained():
            stages.append((f"{objective}, seed {seed}", lambda data, own=(objective, seed): train(data, *own)))
        return stages

    def trained(self) -> list[tuple[str, int]]:
        """The objectives and seeds that there are pipelines of."""
        return [
            (objective, seed)
            for seed in self.seeds
            for objective in ABLATIONS
            if objective == "Mc-Di" or seed in self.ablation_seeds
        ]

    def _check_unchanged(self, what: str, values: dict) -> None:
        """Refuse a folder that was made with other settings than these."""
        path = self.folder / f"{what}.json"
        if path.exists():
            if different := differences(json.loads(path.read_text()), values):
                raise ValueError(
                    f"{self.folder} was made otherwise: {'; '.join(different)}. Take another --runs_root."
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_text(json.dumps(values, indent=1)))


def generators_of(family: dict, runs_root: Path, backbones_root: Path | None) -> dict[str, dict[str, Generator]]:
    """The generators of a family, by name and fold.

    Args:
        family (`dict`): The content of a file in `examples/configs/benchmark`.
        runs_root (`Path`): A folder; generators lie in its folder `generators`.
        backbones_root (`Path`, *optional*): The folder of backbones that are named.
    """
    found = {}
    for name, values in family["generators"].items():
        seeds = family.get("seeds", [0, 1, 2])
        backbone = values.get("backbone")
        if backbone is not None and (backbones_root is None or not (backbones_root / backbone).is_dir()):
            raise ValueError(f"--backbones_root {backbones_root} has no folder {backbone!r}, which {name!r} needs.")
        found[name] = {
            fold: Generator(
                f"{name}, {fold}",
                runs_root / "generators" / name / fold.replace(" ", "_"),
                backbone and backbones_root / backbone,
                family.get("trajectories", {}) | values["trajectories"],
                family.get("training", {}) | values["training"],
                own["validation_domains"],
                own["test_domains"],
                own.get("seeds", seeds),
                values.get("ablation_seeds", own.get("seeds", seeds)),
            )
            for fold, own in values["folds"].items()
        }
    return found
