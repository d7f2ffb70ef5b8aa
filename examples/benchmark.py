"""The benchmark: generated adapters beside every free rival and every control, on four families of tasks.

    python examples/benchmark.py --family few_shot --data_root DATA --backbones_root BACKBONES

makes the family's generators (trajectories, then Mc-Di and its ablations for every training seed), chooses the rivals'
settings on validation tasks, seals all choices, and only then draws the test tasks, each once. An interrupted run goes on
where it stopped. It writes OUTPUT_DIR/FAMILY.json with the accuracy of every episode, FAMILY.md with the tables, and the
pictures. `--smoke` runs the same with tiny data and backbones of its own, in a minute, to see that everything works.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from benchmark_choices import Choices
from benchmark_contest import Contest
from benchmark_fold import Fold, Sizes, shots_of
from benchmark_measures import TEST_SEED, measure, shown
from benchmark_pictures import save_pictures
from benchmark_report import family_page
from benchmark_seal import Sealed
from benchmark_smoke import smoke_family
from benchmark_tables import BETWEEN
from benchmark_texts import FAMILIES
from benchmark_ways import WAYS
from data import write_whole
from families import ROOT, fingerprint
from generators import generators_of


CONFIGS = ROOT / "examples" / "configs" / "benchmark"
PACKAGES = ("mcdi_hf", "torch", "transformers", "diffusers", "peft", "datasets", "setfit")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--data_root", type=Path, help="a folder that holds the data sets")
    parser.add_argument("--backbones_root", type=Path, help="a folder that holds the backbones, but the wheel's")
    parser.add_argument("--runs_root", type=Path, default=Path("runs"), help="where generators and choices are kept")
    parser.add_argument("--cache_dir", type=Path, help="keep what the frozen lower layers make here, not in memory")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--tables", nargs="+", help="measure these tables only now; by default all")
    parser.add_argument("--smoke", action="store_true", help="tiny data, tiny backbones, seconds")
    args = parser.parse_args()
    if not args.smoke and args.data_root is None:
        parser.error("--data_root is needed: the folder that holds the data sets.")
    return args


class Benchmark:
    """One family's benchmark.

    Args:
        name (`str`): The family's.
        family (`dict`): The content of its file in `examples/configs/benchmark`.
        args (`argparse.Namespace`): The command's.
    """

    def __init__(self, name: str, family: dict, args: argparse.Namespace) -> None:
        self.name, self.family, self.args = name, family, args
        self.generators = generators_of(family, args.runs_root, args.backbones_root)
        known = [table["name"] for table in family["tables"]]
        if unknown := sorted(set(args.tables or []) - set(known)):
            raise ValueError(f"There are no tables {unknown}: expected some of {known}.")

    def run(self) -> dict:
        """Measure the tables wanted, and put together all that were measured so far."""
        for table in self.family["tables"]:
            if self.args.tables is None or table["name"] in self.args.tables:
                self.measure(table)
        paths = {table["title"]: self.folder(table) / "table.json" for table in self.family["tables"]}
        found = [json.loads(path.read_text()) for path in paths.values() if path.exists()]
        return self.results(found, [title for title, path in paths.items() if not path.exists()])

    def folder(self, table: dict) -> Path:
        return self.args.runs_root / "benchmark" / self.name / table["name"]

    def results(self, tables: list[dict], missing: list[str]) -> dict:
        """What docs/results/FAMILY.json holds of tables, and the titles of those that were not measured yet."""
        stages = {}
        made = set()  # several tables may be about one generator, which was trained once
        for table in tables:
            for stage, seconds in table.pop("stages").items():
                if stage in Clock.STAGES or table["generator"] not in made:
                    stages[stage] = stages.get(stage, 0.0) + seconds
            made.add(table.pop("generator"))
        shown = {name: [table.pop(name) for table in tables][0] for name in ("steps", "chain")}
        command = f"python examples/benchmark.py --family {self.name} --data_root DATA"
        if any(own[fold].backbone for own in self.generators.values() for fold in own):
            command += " --backbones_root BACKBONES"
        return {
            "family": self.name,
            "command": command,
            "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread a process",
            "versions": {name: version(name) for name in PACKAGES},
            "seal": hashlib.sha256("".join(table.pop("seal") for table in tables).encode()).hexdigest()[:16],
            "seconds": stages,
            "tables": tables,
            "missing": missing,
            **shown,
        }

    def measure(self, table: dict) -> None:
        """Measure one table, unless an earlier run did."""
        path = self.folder(table) / "table.json"
        if not path.exists():
            result = self._measured(table, path.parent)
            write_whole(path, lambda part: part.write_text(json.dumps(result)))

    def _measured(self, table: dict, folder: Path) -> dict:
        generators = self.generators[table["generator"]]
        stages = [own.make(self.args.data_root, self.args.cache_dir) for own in generators.values()]
        sizes = Sizes(**self.family.get("sizes", {}) | table.get("sizes", {}))
        settings = {"table": table, "sizes": dataclasses.asdict(sizes), "test_seed": TEST_SEED}
        settings["generators"] = {
            f"{fold}, {objective}, seed {seed}": fingerprint(own.pipeline(objective, seed))
            for fold, own in generators.items()
            for objective, seed in own.trained()
        }
        sealed, clock = Sealed(folder, settings), Clock(folder / "seconds.json")
        with clock.timed(Clock.STAGES[0]):
            folds = [Fold(table, name, own, sizes, self.args) for name, own in generators.items()]
            if sealed.seal is None:
                contest = Contest(folds[0], "validation", sealed)
                Choices(contest).make()
                sealed.choose("shown", partial(shown, contest))
                sealed.close()
        with clock.timed(Clock.STAGES[1]):
            for fold in folds:
                measure(Contest(fold, "test", sealed), sealed)
        spent = {"trajectories": sum(own.pop("trajectories") for own in stages)}
        spent["meta-training"] = sum(sum(own.values()) for own in stages)
        return {**collected(sealed, table), "stages": spent | clock.spent, "generator": table["generator"]}


class Clock:
    """Seconds by stage, those of an interrupted run included."""

    STAGES = ("choices on validation", "test")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - began
            write_whole(self.path, lambda part: part.write_text(json.dumps(self.spent)))


def collected(sealed: Sealed, table: dict) -> dict:
    """A table's results, as docs/results/FAMILY.json has them."""
    accuracy: dict[str, dict] = {way: {} for way in WAYS}
    memorisation: dict[str, list] = {}
    folds = set()
    for line in sealed.lines:
        group = f"{line['plan']['fold']}-{line['plan']['seed']}"
        for way, own in line["accuracy"].items():
            accuracy[way].setdefault(line["plan"]["kind"], {})[group] = own
        for name, own in line["memorisation"].items():
            # Training adapters are a fold's, whatever the seed and the tasks.
            if name != BETWEEN or line["plan"]["fold"] not in folds:
                memorisation.setdefault(name, []).extend(own)
        folds.add(line["plan"]["fold"])
    own = sealed.choices["shown"]
    shots = shots_of(own["kind"])  # that of the validation task which was timed; its group has no test tasks
    chosen = {name: choice for name, choice in sealed.choices.items() if name != "shown"}
    return {
        "name": table["name"],
        "title": table["title"],
        "note": table.get("note", ""),
        "kinds": table["kinds"],
        "accuracy": {way: kinds for way, kinds in accuracy.items() if kinds},
        "seconds": own["seconds"],
        "time_kind": next(kind for kind in table["kinds"] if shots_of(kind) == shots),
        "choices": {name: choice_text(choice) for name, choice in chosen.items()},
        "memorisation": memorisation,
        "steps": own["steps"],
        "chain": own["chain"],
        "seal": sealed.seal,
    }


def choice_text(choice: dict | int) -> str:
    """What was chosen, and how many options were tried."""
    if isinstance(choice, int):
        return str(choice)
    best = choice["best"]
    text = f"{best[0]} steps, learning rate {best[1]:g}" if isinstance(best, list) else str(best)
    return f"{text}, of {len(choice['tried'])} tried"


def main() -> None:
    args = arguments()
    family = json.loads((CONFIGS / f"{args.family}.json").read_text())
    if args.smoke:
        folder = Path(tempfile.mkdtemp(prefix="mcdi-smoke-")) if args.data_root is None else args.data_root
        family = smoke_family(family, folder)
        args.data_root, args.backbones_root = folder / "data", folder / "backbones"
        args.runs_root, args.output_dir = folder / "runs", folder / "results"
    results = Benchmark(args.family, family, args).run()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(results, args.output_dir)
    path = args.output_dir / f"{args.family}.json"
    write_whole(path, lambda part: part.write_text(json.dumps(results)))
    page = family_page(results, [picture.name for picture in pictures])
    write_whole(path.with_suffix(".md"), lambda part: part.write_text(page))
    print(page)


if __name__ == "__main__":
    main()
