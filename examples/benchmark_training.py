"""Generated adapters on tasks that no part of the generator ever saw, beside all that is free.

    python examples/benchmark_training.py --families examples/configs/benchmark.json --data_root DATA --output runs/training.jsonl

A family is a generator, its trajectories, and domains for validation and for test. Every seed draws its own episodes and
noise, and trains its own shared adapter on the training tasks of the family. Gradient LoRA's settings are chosen on
validation domains. Every row of a table is one line of the output file, so an interrupted run goes on where it stopped.
The last lines are the bars.
"""

import argparse
import json
import operator
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from families import ROOT, Family, fingerprint, read_families, shared_adapter
from gradient_rival import GradientSettings, choose_settings, gradient_accuracies
from tqdm.auto import tqdm

from mcdi_hf import EpisodeSampler, Task
from mcdi_hf.training.validation import free_accuracies, generated_accuracies
from mcdi_hf.evaluation.logistic import logistic_accuracies
from mcdi_hf.trajectories.dataset import final_adapters
from mcdi_hf.trajectories.shared import imprint_scale_for


FROZEN, SHARED, FREE = "frozen + imprinted head", "one shared adapter", "mean adapter, imprinted head"
FROZEN_VIEWS = "frozen + head imprinted from views"
NEAREST, GRADIENT = "nearest training adapter", "gradient LoRA on the same shots"
LOGISTIC = "frozen + logistic regression"
GENERATED, SHUFFLED = "generated, mean of 8", "generated, another task's condition"
ONE_DRAW = "generated, one draw"

# Name -> what it is called behind the family's name, its value from the mean accuracy of every way, and its goal.
BARS = {
    "paper": ("accuracy", lambda found: found[GENERATED], ">=", 0.9734),
    "half_of_frozen_error": (
        "error_over_frozen_error",
        lambda found: (1 - found[GENERATED]) / (1 - found[FROZEN]),
        "<=",
        0.5,
    ),
    "five_points_over_frozen": ("over_frozen", lambda found: found[GENERATED] - found[FROZEN], ">=", 0.05),
    "over_shared": ("over_shared", lambda found: found[GENERATED] - found[SHARED], ">", 0),
    "three_points_over_shared": ("over_shared", lambda found: found[GENERATED] - found[SHARED], ">=", 0.03),
    "shuffling_costs_five_points": ("over_shuffled", lambda found: found[GENERATED] - found[SHUFFLED], ">=", 0.05),
    "best_free_rival": (
        "over_best_free_rival",
        lambda found: found[GENERATED] - max(found[way] for way in (FROZEN, SHARED, LOGISTIC, FREE, NEAREST)),
        ">=",
        0,
    ),
}
SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}


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


def shots_of(kind: str) -> int:
    return int(kind.split("x")[-1])


def check_families(families: list[dict]) -> None:
    """Refuse families with which a run could not come to its end."""
    for values in families:
        if unknown := sorted(set(values["bars"]) - set(BARS)):
            raise ValueError(f"The family {values['name']!r} has the bars {unknown}: expected some of {sorted(BARS)}.")
        shots, tuned = ({shots_of(kind) for kind in values[key]} for key in ("kinds", "validation_kinds"))
        if missing := sorted(shots - tuned):
            raise ValueError(
                f"The family {values['name']!r} has test tasks of {missing} shots but no validation_kinds to choose "
                f"gradient LoRA's settings on."
            )


class Rivals:
    """What a family's generator is held against; what is trained or tuned is kept beside the output."""

    def __init__(self, family: Family) -> None:
        self.family, self.args = family, family.args
        stacked, self.test = family.stacked, family.splits["test"][0]
        train, rows = family.training()
        self.frozen_scale = imprint_scale_for(stacked, family.frozen, train)
        self.frozen_features, self.mean_features = self.plain(family.frozen), self.plain(family.codec.mean_adapter())
        several = family.pipe.config.support_views > 1
        self.frozen_views = self.test.features_under(family.frozen) if several else None
        self.shared = {}  # seed -> features of the test examples and of their views, sharpness of the head
        for seed in self.args.seeds:
            name = f"{family.name}-{family.made_from}-shared-{self.args.shared_steps}-{seed}"
            path = self.args.output.with_suffix(f".{name}.safetensors")
            sampler = EpisodeSampler(rows, tuple(family.description["tasks"]["ways"]), (1, 5), 5, seed)
            tensors, scale = shared_adapter(path, stacked, train, sampler, self.args.shared_steps, seed, family.name)
            self.shared[seed] = self.plain(tensors), self.test.features_under(tensors), scale
        self.places = family.places(train)
        self.adapters = final_adapters(family.trajectories, family.codec.layout)
        self.gradient = self._gradient_settings()

    def plain(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the head reads of the test examples, as they are, under one adapter."""
        return self.family.stacked.features_of_all(tensors, self.test.examples)

    def _gradient_settings(self) -> dict[int, GradientSettings]:
        """Gradient LoRA's best settings from an imprinted head for each number of shots, on validation tasks."""
        family, examples = self.family, self.family.splits["validation"][0].examples
        features = family.stacked.features_of_all(family.frozen, examples)

        def score(shots: int, settings: GradientSettings) -> float:
            kinds = [kind for kind in family.values["validation_kinds"] if shots_of(kind) == shots]
            found = []
            for kind in kinds:  # apart: a stack's batches are of its first task's size
                tasks = family.tasks("validation", kind, 100, min(16, self.args.gradient_episodes))
                found += gradient_accuracies(family.stacked, examples, features, tasks, settings, self.frozen_scale)
            return float(np.mean(found))

        best = choose_settings(
            self.args.output.with_suffix(f".{family.name}-{family.made_from}-gradient.jsonl"),
            self.args.gradient_steps,
            self.args.gradient_learning_rates,
            score,
            shots=sorted({shots_of(kind) for kind in family.values["kinds"]}),
            heads=["imprinted"],
        )
        return {shots: settings for (_, shots), settings in best.items()}

    def nearest(self, tasks: list[Task]) -> list[float]:
        """For each task the training adapter whose examples lie nearest to its support, with an imprinted head."""
        found, scale = [], self.family.codec.config.imprint_scale
        features = torch.zeros(len(self.test.examples), self.family.codec.layout.feature_dim)
        support_features = features.clone()  # both of a task's own rows only
        for task in tasks:
            support = torch.tensor([row for members in task.support for row in members])
            query = torch.tensor([row for members in task.query for row in members])
            place = self.test.features[support].mean(dim=0, keepdim=True)
            index = int(torch.nn.functional.cosine_similarity(self.places, place).argmax())
            support_features[support] = self.test.features_under(self.adapters[index], support)
            features[query] = self.family.stacked.features_of_all(self.adapters[index], self.test.examples, query)
            found += free_accuracies(self.family.stacked, features, scale, [task], support_features)
        return found


def measure(family: Family, rivals: Rivals, kind: str, seed: int) -> dict[str, list[float]]:
    """The accuracy of every way on the same test tasks; of the slow ones on the first of them."""
    args, split = family.args, family.splits["test"][0]
    tasks = family.tasks("test", kind, 1000 + seed, args.episodes)
    few, examples, frozen = tasks[: args.gradient_episodes], split.examples, rivals.frozen_features
    settings, (shared, shared_views, shared_scale) = rivals.gradient[shots_of(kind)], rivals.shared[seed]
    scale = family.codec.config.imprint_scale

    def generated(conditions: list[Task] | None = None, num_candidates: int = 8) -> list[float]:
        noise = torch.Generator().manual_seed(seed)  # the same with another task's condition
        return generated_accuracies(
            family.pipe, examples, split.features, tasks, conditions, num_candidates, generator=noise
        )

    free = partial(free_accuracies, family.stacked)
    found = {FROZEN: free(frozen, rivals.frozen_scale, tasks)}
    if rivals.frozen_views is not None:
        found[FROZEN_VIEWS] = free(frozen, rivals.frozen_scale, tasks, rivals.frozen_views)
    return found | {
        SHARED: free(shared, shared_scale, tasks, shared_views),
        LOGISTIC: logistic_accuracies(frozen, tasks),
        FREE: free(rivals.mean_features, scale, tasks, split.features),
        NEAREST: rivals.nearest(tasks),
        GRADIENT: gradient_accuracies(family.stacked, examples, frozen, few, settings, rivals.frozen_scale, seed),
        ONE_DRAW: generated(num_candidates=1),
        GENERATED: generated(),
        SHUFFLED: generated([*tasks[1:], tasks[0]]),
    }


def run(args: argparse.Namespace, families: list[dict]) -> list[dict]:
    """Every kind and seed of every family, those that an earlier run left included."""
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    generators = {values["name"]: fingerprint(ROOT / values["pipeline"]) for values in families}
    lines = [line for line in lines if line["seed"] in args.seeds and line["family"] in generators]
    if other := sorted({one["family"] for one in lines if one.get("generator") != generators[one["family"]]}):
        raise ValueError(f"{args.output} was made with other generators of {other}: take another --output.")
    if other := {len(line["accuracy"][FROZEN]) for line in lines} - {args.episodes}:
        raise ValueError(
            f"{args.output} was made with --episodes {sorted(other)}, not {args.episodes}: take another --output."
        )
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
            line = {"family": family.name, "generator": generators[family.name], "kind": kind, "seed": seed}
            lines.append(line | {"accuracy": accuracy})
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
    """The bars that the families ask for, on means over their kinds."""
    print()
    for values in families:
        name, kinds = values["name"], values["kinds"]
        found = {way: np.mean([means[name, kind][way] for kind in kinds]) for way in means[name, kinds[0]]}
        for wanted in values["bars"]:
            title, value_of, sign, goal = BARS[wanted]
            value = value_of(found)
            met = "met" if SIGNS[sign](value, goal) else "missed"
            print(f"bar {name}_{title}: {value:.4f} (goal {sign} {goal:g}) {met}")


def main() -> None:
    args = arguments()
    families = read_families(args.families, args.only)
    check_families(families)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = run(args, families)
    print_bars(print_tables(lines, families), families)


if __name__ == "__main__":
    main()
