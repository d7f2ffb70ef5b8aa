"""The generators of an experiment: released pipelines, or trajectories and pipelines of every objective and seed."""

import argparse
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from seal import write_json
from splits import BACKBONE_ID, installed_backbone, sources_below

from mcdi_hf import MCDiTrainer, MCDiTrainingArguments, TrajectoryArguments, TrajectoryCollector
from mcdi_hf.trajectories.description import differences


ROOT = Path(__file__).parents[2]
# Mc-Di and the paper's ablations. On a single level the gradient is taken as it is, so its optimizer is Adam.
OBJECTIVES = {
    "Mc-Di": {"objective": "mc"},
    "Mv-Di": {"objective": "mv"},
    "Tw-Di": {"objective": "tw"},
    "single level (OCD)": {"objective": "mv", "inner_steps": 1, "outer_optimizer": "adam"},
}


@dataclass(frozen=True)
class Generator:
    """The generators of one fold.

    Attributes:
        name (`str`): What they are called, with the fold.
        fold (`str`): What was left out of training.
        folder (`Path`): Where all that is made of them lies.
        backbone (`str`): The folder of the backbone.
        pipelines (`dict`): `(objective, seed)` -> a folder. Where nothing is trained the seeds of a released one are of
            episodes and noise; else it is the first seed's, and those beside it are trained as it was.
        trajectories (`str`, *optional*): A folder, for methods that learn from the training tasks, too.
        validation_domains, test_domains (`list[str]`): What is left out of training.
        recipe (`dict`): What to train them with; empty if all are released.
    """

    name: str
    fold: str
    folder: Path
    backbone: str
    pipelines: dict[tuple[str, int], Path]
    trajectories: str | None
    validation_domains: list[str]
    test_domains: list[str]
    recipe: dict = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return [seed for objective, seed in self.pipelines if objective == "Mc-Di"]

    def make(self, data_root: Path, cache_dir: Path | None) -> dict[str, float]:
        """Make what is not there yet; the seconds that each stage took, whenever that was."""
        if not self.recipe:
            return {}
        self._check_unchanged()
        path = self.folder / "seconds.json"
        spent = json.loads(path.read_text()) if path.exists() else {}
        stages = {"trajectories": lambda: self._collect(data_root, cache_dir)} if "trajectories" in self.recipe else {}
        for (objective, seed), pipeline in self.pipelines.items():
            if self.folder not in pipeline.parents:  # released, not trained here
                continue
            stages[f"{objective}, seed {seed}"] = lambda own=(objective, seed): self._train(*own, data_root, cache_dir)
        for stage, make in stages.items():
            if stage not in spent:
                began = time.perf_counter()
                make()
                spent[stage] = time.perf_counter() - began
                write_json(path, spent)
        return {stage: spent[stage] for stage in stages}

    def _collect(self, data_root: Path, cache_dir: Path | None) -> None:
        values = {"pretrained_model_name_or_path": self.backbone, "base_model_name": BACKBONE_ID}
        values |= {"output_dir": str(self.folder), "cache_dir": cache_dir and str(cache_dir)}
        values |= self.recipe["trajectories"]
        if "train_domains" not in values:
            values["held_out_domains"] = self.validation_domains + self.test_domains
        sources = sources_below(data_root, self.recipe["sources"])
        TrajectoryCollector(args=TrajectoryArguments(**values), sources=sources).collect()

    def _train(self, objective: str, seed: int, data_root: Path, cache_dir: Path | None) -> None:
        values = self.recipe["training"] | OBJECTIVES[objective] | {"seed": seed}
        values |= {"pretrained_model_name_or_path": self.backbone, "cache_dir": cache_dir and str(cache_dir)}
        values = {"validation_domains": self.validation_domains} | values | {"resume_from_checkpoint": "latest"}
        args = MCDiTrainingArguments(output_dir=str(self.pipelines[objective, seed].parent), **values)
        sources = sources_below(data_root, self.recipe.get("sources") or read_sources(self.trajectories))
        trainer = MCDiTrainer(args=args, trajectories=self.trajectories, sources=sources)
        folder = trainer.train()
        if objective != "Mc-Di":  # what an objective taught is in the last weights: validation may keep the start
            trainer.ema.copy_to(trainer.model.parameters())
            released = json.loads((self.pipelines["Mc-Di", self.seeds[0]] / "model_index.json").read_text())
            trainer.pipe.register_to_config(strength=released["strength"])
            trainer.pipe.save_pretrained(folder)

    def _check_unchanged(self) -> None:
        """Refuse a folder that was made with another recipe than this."""
        path = self.folder / "recipe.json"
        if not path.exists():
            return write_json(path, self.recipe)
        if different := differences(json.loads(path.read_text()), self.recipe):
            raise ValueError(f"{self.folder} was made otherwise: {'; '.join(different)}. Take another --runs_root.")


def read_sources(trajectories: str) -> list[dict]:
    """The sources that trajectories were collected on."""
    return json.loads((Path(trajectories) / "trajectories.json").read_text())["sources"]


def fingerprint(folder: Path) -> str:
    """A hash of a pipeline's weights and settings, whatever the folder is called and whatever was measured of it."""
    if not folder.is_dir():
        raise ValueError(f"There is no pipeline {folder}: expected a released one, or one that was trained.")
    digest, measured = hashlib.sha256(), folder / "results.json"
    paths = (path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors") and path != measured)
    for path in sorted(paths):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def generators_of(config: dict, folder: Path, args: argparse.Namespace) -> list[Generator]:
    """The generators of an experiment, one a fold.

    Args:
        config (`dict`): The experiment's, with a `generator`, the file of a recipe beside it, or a `pipeline`, a
            folder in the repository, and optionally its `trajectories`, a folder below the runs' root, and the file of
            its `training` arguments, to train the other seeds with, and those ablations that are among the `methods`.
        folder (`Path`): Where the config lies.
        args (`argparse.Namespace`): The command's `runs_root` and `backbones_root`.
    """
    if "pipeline" in config:
        pipeline = ROOT / config["pipeline"]
        own = args.runs_root / "released" / f"{pipeline.name}-{fingerprint(pipeline)}"
        seeds = config.get("seeds", [0])
        if "training" not in config:
            pipelines = {("Mc-Di", seed): pipeline for seed in seeds}
        else:
            wanted = config.get("methods", OBJECTIVES)
            pipelines = {
                (objective, seed): path
                for (objective, seed), path in trained_below(own, seeds, seeds[:1]).items()
                if objective in wanted
            } | {("Mc-Di", seeds[0]): pipeline}
        domains = config["validation_domains"], config["test_domains"]
        backbone = _backbone(config.get("backbone"), args.backbones_root)
        trajectories = None
        if "trajectories" in config:
            trajectories = args.runs_root / config["trajectories"]
            if not trajectories.is_dir():
                raise ValueError(
                    f"There is no folder {trajectories}: collect the trajectories of {pipeline.name} by its script in "
                    f"examples/reproduce, or take `trajectories` out of the config, and methods that need them."
                )
            trajectories = str(trajectories)
        recipe = {"training": json.loads((ROOT / config["training"]).read_text())} if "training" in config else {}
        return [Generator(pipeline.name, "all", own, backbone, pipelines, trajectories, *domains, recipe)]
    path = folder / config["generator"]
    recipe = json.loads(path.read_text())
    found = []
    for fold, domains in recipe["folds"].items():
        own = args.runs_root / "generators" / path.stem / fold.replace(" ", "_")
        seeds = domains.get("seeds", recipe.get("seeds", [0, 1, 2]))
        pipelines = trained_below(own, seeds, recipe.get("ablation_seeds", seeds))
        found.append(
            Generator(
                f"{path.stem}, {fold}",
                fold,
                own,
                _backbone(recipe.get("backbone"), args.backbones_root),
                pipelines,
                str(own / "trajectories"),
                domains["validation_domains"],
                domains["test_domains"],
                {name: recipe[name] for name in ("sources", "trajectories", "training")},
            )
        )
    return found


def trained_below(folder: Path, seeds: list[int], ablation_seeds: list[int]) -> dict[tuple[str, int], Path]:
    """Where generators lie that are trained here: Mc-Di for all seeds, the paper's ablations for some."""
    return {
        (objective, seed): folder / f"{objective.split()[0]}-{seed}" / "pipeline"
        for seed in seeds
        for objective in OBJECTIVES
        if objective == "Mc-Di" or seed in ablation_seeds
    }


def _backbone(name: str | None, root: Path) -> str:
    """The folder of a backbone, in the repository or below the root; by default that of the wheel."""
    if name is None:
        return installed_backbone()
    for folder in (ROOT / name, root / name):
        if folder.is_dir():
            return str(folder)
    raise ValueError(f"{root} has no folder {name!r}: say with --backbones_root where the backbones are.")
