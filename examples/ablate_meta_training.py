"""The paper's ablation on few-shot tasks: Mc-Di beside Mv-Di, Tw-Di, a single level, and REPTILE on the adapter itself.

    python examples/ablate_meta_training.py --config examples/configs/omniglot_paper.json \
        --pretrained_model_name_or_path runs/omniglot-vit/model --trajectories runs/omniglot/trajectories \
        --dataset_name OMNIGLOT --test_domains Angelic ... --test_split test --output_dir runs/ablation

Every generator is trained by `train_mcdi.py` with the arguments of the config and its own setting, from the same
trajectories, once a seed; a finished one is not trained again. Test adapters are one draw of the ordinary sampler, from
Gaussian noise, as in the paper. Arguments that this script does not know go to `train_mcdi.py`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from config import as_arguments
from data import inputs_of, load_table, sources_of, training_table, write_whole
from reptile_rival import AdapterReptile
from train_arguments import ABLATIONS
from training_data import episodes

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    MCDiPipeline,
    StackedLora,
    Task,
    load_trajectories,
)
from mcdi_hf.training.validation import free_accuracies, generated_accuracies
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import imprint_scale_for, initial_adapter


PAPER = {"REPTILE": 95.39, "single level (OCD)": 95.04, "Mv-Di": 96.65, "Tw-Di": 94.28, "Mc-Di": 97.34}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an argument of train_mcdi.py may begin one of these
    )
    parser.add_argument("--config", type=Path, help="a JSON file of arguments of train_mcdi.py")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="the backbone")
    parser.add_argument("--trajectories", required=True)
    parser.add_argument("--dataset_name", required=True, help="where the trajectories' data set is")
    parser.add_argument("--test_domains", nargs="+", required=True)
    parser.add_argument("--test_split", default="test")
    parser.add_argument("--kind", default="5x1", help="WAYSxSHOTS")
    parser.add_argument("--episodes", type=int, default=200, help="of a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--reptile_steps", type=int, default=100, help="outer steps of REPTILE on the adapter")
    parser.add_argument("--reptile_shots", type=int, default=10, help="examples of a class in a task of REPTILE's")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_known_args()


def train(args: argparse.Namespace, passed: list[str], name: str, seed: int) -> Path:
    """Train one generator, unless that is done already; the folder of its pipeline."""
    folder = args.output_dir / f"{name.split()[0]}-{seed}"
    done = folder / "done"
    if not done.exists():
        command = [
            sys.executable,
            Path(__file__).with_name("train_mcdi.py"),
            *passed,
            *as_arguments(ABLATIONS[name], name),
        ]
        for key in ("pretrained_model_name_or_path", "trajectories", "dataset_name"):
            command += [f"--{key}", getattr(args, key)]
        if args.config:
            command += ["--config", args.config]
        command += ["--seed", seed, "--output_dir", folder]
        if (folder / "checkpoints").exists():
            command += ["--resume_from_checkpoint", "latest"]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        done.touch()
    return folder / "pipeline"


class Results:
    """Accuracies by name and seed, written down as soon as they are known.

    Args:
        path (`Path`): What an earlier run of the same settings found is taken from here.
        settings (`dict`): What the accuracies depend on, beside the seed.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path, self.settings, self.found = path, settings, {}
        if path.exists():
            kept = json.loads(path.read_text())
            there = kept["settings"]
            changed = [
                f"{key} is {there.get(key)!r} there, {settings.get(key)!r} here"
                for key in sorted(there | settings)
                if there.get(key) != settings.get(key)
            ]
            if changed:
                raise ValueError(f"{path} was made with other settings: {'; '.join(changed)}. Take another folder.")
            self.found = kept["accuracy"]

    def measure(self, name: str, seed: int, make: Callable[[], float]) -> None:
        own = self.found.setdefault(name, {})
        if str(seed) not in own:
            own[str(seed)] = make()
            text = json.dumps({"settings": self.settings, "accuracy": self.found}, indent=1)
            write_whole(self.path, lambda part: part.write_text(text))

    def print(self, seeds: list[int]) -> None:
        """The table, and the bar of the paper's order."""
        means = {}
        print(f"{'':<26}{'accuracy':>10}{'(standard deviation)':>22}{'paper, 5x1':>12}")
        for name, own in self.found.items():
            values = [100 * own[str(seed)] for seed in seeds]
            means[name] = np.mean(values)
            paper = f"{PAPER[name]:>12.2f}" if name in PAPER else ""
            print(f"{name:<26}{means[name]:>10.2f}{f'({np.std(values):.2f})':>22}{paper}")
        gap = min(means["Mc-Di"] - means["Mv-Di"], means["Mv-Di"] - means["Tw-Di"]) / 100
        print(f"bar mc_over_mv_over_tw: {gap:.4f} (goal > 0) {'met' if gap > 0 else 'missed'}")


class Test:
    """The test tasks of every seed, and what a generator or one adapter for all makes of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.trajectories, self.description = load_trajectories(args.trajectories)
        trained = self.description["train_domains"] or args.test_domains  # without a choice all of them
        if shared := sorted(set(args.test_domains) & set(trained)):
            raise ValueError(f"The trajectories were made on the test domains {shared}: take others.")
        self.backbone = FrozenBackbone.of(self.description["base_model"], args.pretrained_model_name_or_path)
        self.layout = AdapterLayout.from_dict(self.description["layout"])
        self.stacked = StackedLora(self.backbone, self.layout)
        sources = sources_of(self.description, args.dataset_name)
        table, spans = load_table(sources, [args.test_split], args.test_domains)
        self.rows = LabelledRows(table, "label", "group", spans[args.test_split], "domain")
        self.examples = self.stacked.encode(inputs_of(table))

    def tasks(self, seed: int) -> list[Task]:
        return episodes(self.args.kind, self.rows, seed=1000 + seed, count=self.args.episodes)

    def generated(self, folder: Path, seed: int) -> float:
        pipe = MCDiPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.backbone = self.backbone
        found = generated_accuracies(
            pipe,
            self.examples,
            self.stacked.features_of_all(pipe.codec.mean_adapter(), self.examples),
            self.tasks(seed),
            strength=1.0,
            temperature=self.args.temperature,
            generator=torch.Generator().manual_seed(seed),
        )
        return float(np.mean(found))

    def imprinted(self, tensors: dict[str, torch.Tensor], seed: int) -> float:
        """Of one adapter for all, heads imprinted."""
        features = self.stacked.features_of_all(tensors, self.examples)
        scale = self.description["settings"]["imprint_scale"]
        return float(np.mean(free_accuracies(self.stacked, features, scale, self.tasks(seed))))

    def shared_start(self) -> dict[str, torch.Tensor]:
        """Where all the trajectories start."""
        row = self.trajectories[0]
        return split_weights(torch.from_numpy(row["weights"][:1]), len(row["classes"]), self.layout)

    def reptile(self, seed: int) -> float:
        """Of a start that REPTILE learns on the training tasks, adapted on each task's shots by ten steps."""
        table, spans = training_table(self.description, self.args.dataset_name)
        rows = LabelledRows(table, "label", "group", spans["train"], "domain")
        shots = (self.args.reptile_shots, self.args.reptile_shots)
        sampler = EpisodeSampler(rows, tuple(self.description["tasks"]["ways"]), shots, 1, seed)
        examples = self.stacked.encode(inputs_of(table))
        scale = imprint_scale_for(self.stacked, initial_adapter(self.layout, seed), examples)
        learnt = AdapterReptile.train(self.stacked, examples, sampler, self.args.reptile_steps, seed, scale)
        features = learnt.features(self.examples)
        return float(np.mean(learnt.accuracies(self.examples, features, self.tasks(seed), num_steps=10)))


def main() -> None:
    args, passed = arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("seeds", "output_dir", "config")}
    # what the file says, not its name: it may be edited between two runs
    settings |= {"config": args.config and json.loads(args.config.read_text()), "train_mcdi.py": passed}
    results = Results(args.output_dir / "accuracy.json", settings)
    test = Test(args)
    for seed in args.seeds:
        frozen, start = initial_adapter(test.layout), test.shared_start()
        results.measure("frozen, imprinted", seed, lambda: test.imprinted(frozen, seed))
        results.measure("shared start, imprinted", seed, lambda: test.imprinted(start, seed))
        for name in ABLATIONS:  # before REPTILE, so that an argument which train_mcdi.py refuses is refused soon
            results.measure(name, seed, lambda: test.generated(train(args, passed, name, seed), seed))
        results.measure("REPTILE", seed, lambda: test.reptile(seed))
    print(f"{args.kind}, {args.episodes} test tasks for each of the seeds {args.seeds}")
    results.print(args.seeds)


if __name__ == "__main__":
    main()
