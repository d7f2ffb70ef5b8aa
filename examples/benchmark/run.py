"""Run one experiment of the benchmark: generators, every baseline and every control, on tasks that nothing has seen.

    python examples/benchmark/run.py --config examples/benchmark/configs/text.json --data_root DATA

makes the generators (trajectories, then Mc-Di and its ablations for every training seed), chooses the methods'
settings on validation tasks, seals all choices, and only then draws the test tasks, each once. A run that was
interrupted goes on where it stopped. It writes OUTPUT_DIR/NAME.json with the accuracy of every episode; report.py
makes tables and pictures of it. `--smoke` runs an experiment on tiny data and a tiny backbone of its own, in less than
a minute.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chain import along_chain
from commands import HelpFormatter
from fold import Fold
from generators import ROOT, Generator, fingerprint, generators_of
from memorisation import BETWEEN, memorised
from methods import METHODS, NOISED, Method
from seal import Sealed, write_json
from smoke import write_smoke
from splits import VALIDATION_SEED, Sizes, Split, shots_of
from timing import seconds_to_adapter
from tqdm.auto import tqdm

from mcdi_hf import Task


TEST_SEED = 1000  # of the test tasks; the training seed is added
MOST_SETTINGS = 4
NEEDED = ("title", "sources", "split", "kinds", "validation_kinds")
OPTIONAL = (
    "generator",
    "pipeline",
    "backbone",
    "trajectories",
    "training",
    "seeds",
    "sizes",
    "methods",
    "control_kind",
)
SPLITS = ("query_split", "validation_sources", "validation_split", "test_split", "validation_domains", "test_domains")
KNOWN = (*NEEDED, *OPTIONAL, *SPLITS)
PACKAGES = ("mcdi_hf", "torch", "transformers", "diffusers", "peft", "datasets", "setfit")


def read_config(path: Path) -> dict:
    """Read an experiment's config with what it `extends`, less what is `null`, and refuse one with which a run could not
    come to its end."""
    config = json.loads(path.read_text())
    if "extends" in config:
        config = json.loads((path.parent / config.pop("extends")).read_text()) | config
        config = {name: value for name, value in config.items() if value is not None}
    if missing := [name for name in NEEDED if name not in config]:
        raise ValueError(f"{path} has no {missing}: expected all of {list(NEEDED)}.")
    if unknown := sorted(set(config) - set(KNOWN)):
        raise ValueError(f"{path} has {unknown}: expected some of {sorted(KNOWN)}.")
    if ("generator" in config) == ("pipeline" in config):
        raise ValueError(f"{path}: expected either a generator to train or a released pipeline.")
    sizes = [field.name for field in fields(Sizes)]
    for what, known in {"methods": list(METHODS), "sizes": sizes}.items():
        if unknown := sorted(set(config.get(what, [])) - set(known)):
            raise ValueError(f"{path} has the {what} {unknown}: expected some of {known}.")
    shots, tuned = ({shots_of(kind) for kind in config[name]} for name in ("kinds", "validation_kinds"))
    if missing := sorted(shots - tuned):
        raise ValueError(
            f"{path} has kinds of {missing} shots, but no validation_kinds of as many to choose settings on."
        )
    return config


class Experiment:
    """One experiment.

    Args:
        config (`Path`): Its config, whose name is the experiment's.
        args (`argparse.Namespace`): The command's.
    """

    def __init__(self, config: Path, args: argparse.Namespace) -> None:
        self.name, self.config, self.args = config.stem, read_config(config), args
        self.sizes = Sizes(**self.config.get("sizes", {}))
        self.generators = generators_of(self.config, config.parent, args)
        self.methods = {name: METHODS[name] for name in METHODS if name in self.config.get("methods", METHODS)}
        self.folder = args.runs_root / "experiments" / self.name
        self.spent: dict[str, float] = {}

    def run(self) -> dict:
        """Do what is not done yet; the results."""
        for generator in self.generators:
            for stage, seconds in generator.make(self.args.data_root, self.args.cache_dir).items():
                name = "trajectories" if stage == "trajectories" else "meta-training"
                self.spent[name] = self.spent.get(name, 0.0) + seconds
        sealed = Sealed(self.folder, self._settings())
        if sealed.seal is None:
            with self._timed("choices on validation"):
                for generator in self.generators:
                    self._choose(Fold(generator, self.config, self.sizes, self.args), sealed)
            sealed.close()
        with self._timed("test"):
            for generator in self.generators:
                self._test(generator, sealed)
        return self._results(sealed)

    def _settings(self) -> dict:
        """All that the results depend on, beside the choices."""
        generators = {
            f"{generator.fold}, {objective}, seed {seed}": fingerprint(path)
            for generator in self.generators
            for (objective, seed), path in generator.pipelines.items()
        }
        return {"config": self.config, "sizes": asdict(self.sizes), "test_seed": TEST_SEED, "generators": generators}

    def _choose(self, fold: Fold, sealed: Sealed) -> None:
        """What a fold's validation tasks choose for every number of shots, on its first seed; the first fold's times.

        Each fold chooses for itself: the validation domains of one may be test domains of another.
        """
        split, own, seed = fold.split("validation"), fold.generator.fold, fold.generator.seeds[0]
        for name, method in self._fitting(fold, seed).items():
            for shots in sorted({shots_of(kind) for kind in self.config["kinds"]}):
                sealed.choose(choice_name(name, shots, own), lambda: self._choice(method, split, fold, shots))
        shots = shots_of(self._time_kind)
        task = split.tasks(self._time_kind, VALIDATION_SEED, 1)[0]
        timed = {  # a control takes the time of what it controls
            name: (method, setting_of(sealed, name, shots, own))
            for name, method in self._fitting(fold, seed).items()
            if method.group != "controls" and method.episodes(self.sizes, task)
        }
        sealed.choose("times", lambda: seconds_to_adapter(split, fold, timed, task, seed))

    def _choice(self, method: Method, split: Split, fold: Fold, shots: int) -> dict:
        """The setting of the highest mean accuracy on validation tasks of so many shots, and all that was tried."""
        settings = method.settings(split, fold, shots)
        if len(settings) > MOST_SETTINGS:
            raise ValueError(f"{method.name!r} tries {len(settings)} settings: expected {MOST_SETTINGS} at most.")
        kinds = [kind for kind in self.config["validation_kinds"] if shots_of(kind) == shots]
        tasks = [split.tasks(kind, VALIDATION_SEED, self.sizes.validation_episodes) for kind in kinds]
        tried = []
        for setting in settings:
            found = [method.accuracies(split, fold, own, fold.generator.seeds[0], setting) for own in tasks]
            tried.append({"setting": setting, "accuracy": float(np.mean(sum(found, [])))})
        best = max(tried, key=lambda one: one["accuracy"], default={"setting": None})
        return {"best": best["setting"], "tried": tried}

    @property
    def _time_kind(self) -> str:
        """The validation kind whose tasks are timed: the first of as many shots as the first kind has."""
        kinds = self.config["validation_kinds"]
        return next(kind for kind in kinds if shots_of(kind) == shots_of(self.config["kinds"][0]))

    @property
    def _plans(self) -> list[tuple[Generator, int, str]]:
        """What is measured one after the other: a fold, a training seed, a kind of tasks."""
        return [(own, seed, kind) for own in self.generators for seed in own.seeds for kind in self.config["kinds"]]

    def _test(self, generator: Generator, sealed: Sealed) -> None:
        """Draw the test tasks of every seed and kind of a fold, once, and judge all methods on them."""
        plans = [plan for plan in self._plans if plan[0] is generator and plan_name(*plan) not in sealed.results]
        fold = Fold(generator, self.config, self.sizes, self.args) if plans else None
        for _, seed, kind in tqdm(plans, desc=f"{self.name}, {generator.fold}: test"):
            sealed.measure(
                plan_name(generator, seed, kind),
                lambda: fold.split("test").tasks(kind, TEST_SEED + seed, self.sizes.episodes),
                lambda tasks: self._judge(fold, tasks, seed, kind, sealed),
            )

    def _judge(self, fold: Fold, tasks: list[Task], seed: int, kind: str, sealed: Sealed) -> dict:
        """The accuracies of every method on the tasks that it sees, and what was memorised."""
        split, accuracy, shots, own_fold = fold.split("test"), {}, shots_of(kind), fold.generator.fold
        for name, method in self._fitting(fold, seed).items():
            if own := tasks[: method.episodes(self.sizes, tasks[0])]:
                found = method.accuracies(split, fold, own, seed, setting_of(sealed, name, shots, own_fold))
                accuracy[name] = [round(one, 4) for one in found]
        found = {"accuracy": accuracy, "memorisation": {}}
        if NOISED.name in accuracy:
            scale = setting_of(sealed, NOISED.name, shots, own_fold)
            found["memorisation"] = memorised(split, fold, tasks[:16], seed, scale)
        found["chain"] = along_chain(split, fold, tasks[: self.sizes.chain_episodes], seed)
        return found

    def _fitting(self, fold: Fold, seed: int) -> dict[str, Method]:
        return {name: method for name, method in self.methods.items() if method.fits(fold, seed)}

    def _results(self, sealed: Sealed) -> dict:
        """What the result file holds."""
        accuracy, memorisation, chain = {name: {} for name in self.methods}, {}, {}
        for generator, seed, kind in self._plans:
            found = sealed.results[plan_name(generator, seed, kind)]
            for name, own in found["accuracy"].items():
                accuracy[name].setdefault(kind, {})[f"{generator.fold}-{seed}"] = own
            for objective, steps in found["chain"].items():
                for step, own in steps.items():
                    kinds = chain.setdefault(objective, {}).setdefault(step, {})
                    kinds.setdefault(kind, {})[f"{generator.fold}-{seed}"] = own
            for name, own in found["memorisation"].items():
                groups = memorisation.setdefault(name, {})
                if name == BETWEEN:  # distances between training adapters are a fold's, whatever the tasks
                    groups[generator.fold] = own
                else:
                    groups.setdefault(f"{generator.fold}-{seed}", []).extend(own)
        choices = {
            name: {"best": one["best"], "tried": len(one["tried"])}
            for name, one in sealed.choices.items()
            if one.get("tried")
        }
        command = (
            f"python examples/benchmark/run.py --config examples/benchmark/configs/{self.name}.json --data_root DATA"
        )
        threads = torch.get_num_threads()
        return {
            "experiment": self.name,
            "title": self.config["title"],
            "kinds": self.config["kinds"],
            "command": command,
            "machine": f"{os.cpu_count()} CPU cores, {threads} thread{'s' if threads > 1 else ''} a process",
            "versions": {name: version(name) for name in PACKAGES},
            "sizes": asdict(self.sizes),
            "seal": sealed.seal,
            "accuracy": {name: kinds for name, kinds in accuracy.items() if kinds},
            "seconds": sealed.choices["times"],
            "time_kind": self._time_kind,
            "choices": choices,
            "memorisation": memorisation,
            "chain": chain,
            "spent": {stage: round(seconds, 1) for stage, seconds in self.spent.items()},
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add up the seconds of a stage, those of interrupted runs included."""
        path = self.folder / "seconds.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        began = time.perf_counter()
        try:
            yield
        finally:
            kept[stage] = kept.get(stage, 0.0) + time.perf_counter() - began
            write_json(path, kept)
            self.spent |= kept


def choice_name(method: str, shots: int, fold: str) -> str:
    return f"{method}, {shots}-shot, {fold}"


def setting_of(sealed: Sealed, method: str, shots: int, fold: str) -> Any:
    """What a fold's validation tasks chose for a method, for tasks of so many shots."""
    return sealed.choices.get(choice_name(method, shots, fold), {"best": None})["best"]


def plan_name(generator: Generator, seed: int, kind: str) -> str:
    """The name of a file with the results of some test tasks."""
    return re.sub(r"[:/ ]", "_", f"{generator.fold}-{seed}-{kind}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="an experiment, as in examples/benchmark/configs")
    what.add_argument("--smoke", action="store_true", help="tiny data, a tiny backbone, every method, in a minute")
    data = "a folder that holds the data sets; --smoke keeps all it makes in its folder smoke, or in a temporary one"
    parser.add_argument("--data_root", type=Path, help=data)
    parser.add_argument("--backbones_root", type=Path, help="a folder that holds the backbones; by default DATA_ROOT")
    parser.add_argument("--runs_root", type=Path, default=Path("runs"), help="where all that is made is kept")
    parser.add_argument("--cache_dir", type=Path, help="keep what the frozen lower layers make here, not in memory")
    output_dir = ROOT / "examples" / "benchmark" / "results"
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="where the results are written")
    args = parser.parse_args()
    if args.smoke:
        own = ("backbones_root", "runs_root", "output_dir")
        if given := [name for name in own if getattr(args, name) != parser.get_default(name)]:
            parser.error(f"--smoke keeps all it makes below --data_root: take away {given}.")
        args.data_root = args.data_root / "smoke" if args.data_root else Path(tempfile.mkdtemp(prefix="mcdi-smoke-"))
        args.config = write_smoke(args.data_root)
        args.runs_root, args.output_dir = args.data_root / "runs", args.data_root / "results"
        print(f"All that the smoke run makes is in {args.data_root}.")
    elif args.data_root is None:
        parser.error("--config needs --data_root.")
    args.backbones_root = args.backbones_root or args.data_root
    return args


def main() -> None:
    args = arguments()
    results = Experiment(args.config, args).run()
    path = args.output_dir / f"{results['experiment']}.json"
    write_json(path, results, indent=None)  # thousands of numbers
    print(f"The results are in {path}; examples/benchmark/report.py makes tables of them.")


if __name__ == "__main__":
    main()
