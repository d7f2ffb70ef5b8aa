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
from pathlib import Path

import numpy as np
import torch
from data import inputs_of, load_table, sources_of, training_table, write_whole
from tqdm.auto import tqdm
from training_data import Split, episodes

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    MCDiPipeline,
    StackedLora,
    Task,
    TrajectorySettings,
    collect_trajectories,
    load_trajectories,
)
from mcdi_hf.evaluation.episodes import generated_accuracies, imprinted_accuracies
from mcdi_hf.layers import EncodedExamples
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import imprint_scale_for, initial_adapter


# Each is a setting of train_mcdi.py. On a single level the gradient is taken as it is, so its optimizer is Adam.
SETTINGS = {
    "Mc-Di": ["--objective", "mc"],
    "Mv-Di": ["--objective", "mv"],
    "Tw-Di": ["--objective", "tw"],
    "single level (OCD)": ["--objective", "mv", "--inner_steps", "1", "--outer_optimizer", "adam"],
}
TASKS_PER_STEP = 4  # of REPTILE on the adapter
PAPER = {"REPTILE": 95.39, "single level (OCD)": 95.04, "Mv-Di": 96.65, "Tw-Di": 94.28, "Mc-Di": 97.34}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_known_args()


def train(args: argparse.Namespace, passed: list[str], name: str, seed: int) -> Path:
    """Train one generator, unless that is done already; the folder of its pipeline."""
    folder = args.output_dir / f"{name.split()[0]}-{seed}"
    done = folder / "done"
    if not done.exists():
        command = [sys.executable, Path(__file__).with_name("train_mcdi.py"), *passed, *SETTINGS[name]]
        for key in ("pretrained_model_name_or_path", "trajectories", "dataset_name"):
            command += [f"--{key}", getattr(args, key)]
        command += ["--seed", seed, "--output_dir", folder]
        if (folder / "checkpoints").exists():
            command += ["--resume_from_checkpoint", "latest"]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        done.touch()
    return folder / "pipeline"


class Test:
    """The test tasks of every seed, and what one adapter for all makes of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.trajectories, self.description = load_trajectories(args.trajectories)
        base_model = self.description["base_model"]
        self.backbone = FrozenBackbone.from_pretrained(
            args.pretrained_model_name_or_path, base_model["pooling"], base_model["name_or_path"]
        )
        sources = sources_of(self.description, args.dataset_name)
        self.table, spans = load_table(sources, [args.test_split], args.test_domains)
        self.rows = LabelledRows(self.table, "label", "group", spans[args.test_split], "domain")

    def tasks(self, seed: int) -> list[Task]:
        return episodes(self.args.kind, self.rows, seed=1000 + seed, count=self.args.episodes)

    def generated(self, folder: Path, seed: int) -> float:
        pipe = MCDiPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.backbone = self.backbone
        split = Split(self.table, pipe.stacked, pipe.codec)
        generator = torch.Generator().manual_seed(seed)
        found = generated_accuracies(
            pipe,
            split.examples,
            split.features,
            self.tasks(seed),
            strength=1.0,
            temperature=self.args.temperature,
            generator=generator,
        )
        return float(np.mean(found))


class AdapterReptile:
    """REPTILE on the adapter itself (Nichol et al. 2018): a start from which a few gradient steps go far.

    Heads are imprinted under the start, while it is learnt and for test tasks, whose few shots it is adapted on.
    """

    def __init__(self, test: Test, seed: int, steps: int) -> None:
        self.test, self.seed = test, seed
        self.layout = AdapterLayout.from_dict(test.description["layout"])
        self.stacked = StackedLora(test.backbone, self.layout)
        table, spans = training_table(test.description, test.args.dataset_name)
        rows = LabelledRows(table, "label", "group", spans["train"], "domain")
        tasks = EpisodeSampler(rows, tuple(test.description["tasks"]["ways"]), (10, 10), 1, seed)
        examples = self.stacked.encode(inputs_of(table))
        self.start = initial_adapter(self.layout, seed)
        self.scale = imprint_scale_for(self.stacked, self.start, examples)
        for step in tqdm(range(steps), desc=f"REPTILE, seed {seed}"):
            own = [tasks[TASKS_PER_STEP * step + number] for number in range(TASKS_PER_STEP)]
            ends = self.adapted(examples, own, 5)
            zeta = 1 - step / steps
            for key in self.start:
                mean = torch.cat([end[key] for end in ends]).mean(dim=0, keepdim=True)
                self.start[key] = self.start[key] + zeta * (mean - self.start[key])

    def adapted(self, examples: EncodedExamples, tasks: list[Task], steps: int) -> list[dict[str, torch.Tensor]]:
        """The adapters after some steps of Adam on the support of each task."""
        rows = self.trajectories(examples, tasks, steps)
        return [split_weights(torch.from_numpy(row["weights"][-1:]), len(row["classes"]), self.layout) for row in rows]

    def trajectories(self, examples: EncodedExamples, tasks: list[Task], steps: int) -> list[dict]:
        settings = TrajectorySettings(
            num_steps=steps, num_targets=1, batch_size=20, imprint_scale=self.scale, seed=self.seed
        )
        used = sorted({row for task in tasks for rows in task.support for row in rows})
        features = torch.zeros(len(examples), self.layout.feature_dim)
        features[used] = self.stacked.features_of_all(self.start, examples, torch.tensor(used))
        numbers = list(range(len(tasks)))
        return collect_trajectories(self.stacked, examples, self.start, features, tasks, numbers, settings)

    def accuracy(self) -> float:
        """On the test tasks, each adapted on its shots by ten steps."""
        examples = self.stacked.encode(inputs_of(self.test.table))
        tasks, found = self.test.tasks(self.seed), []
        for first in range(0, len(tasks), 16):
            found += [row["accuracy"] for row in self.trajectories(examples, tasks[first : first + 16], 10)]
        return float(np.mean(found))


def free(test: Test, seed: int) -> dict[str, float]:
    """What needs no generator: the plain backbone and the shared start of the trajectories, heads imprinted."""
    layout = AdapterLayout.from_dict(test.description["layout"])
    stacked = StackedLora(test.backbone, layout)
    examples = stacked.encode(inputs_of(test.table))
    row = next(iter(test.trajectories))
    start = split_weights(torch.from_numpy(row["weights"][:1]), len(row["classes"]), layout)
    scale = test.description["settings"]["imprint_scale"]
    found = {}
    for name, tensors in (("frozen, imprinted", initial_adapter(layout)), ("shared start, imprinted", start)):
        found[name] = float(
            np.mean(imprinted_accuracies(stacked.features_of_all(tensors, examples), scale, test.tasks(seed)))
        )
    return found


def main() -> None:
    args, passed = arguments()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "accuracy.json"
    found = json.loads(path.read_text()) if path.exists() else {}

    def keep(name: str, accuracy: float) -> None:
        found.setdefault(name, []).append(accuracy)
        write_whole(path, lambda part: part.write_text(json.dumps(found, indent=1)))

    test = Test(args)
    for position, seed in enumerate(args.seeds):
        if len(found.get("frozen, imprinted", [])) <= position:
            for name, accuracy in free(test, seed).items():
                keep(name, accuracy)
        if len(found.get("REPTILE", [])) <= position:
            keep("REPTILE", AdapterReptile(test, seed, args.reptile_steps).accuracy())
        for name in SETTINGS:
            if len(found.get(name, [])) <= position:
                keep(name, test.generated(train(args, passed, name, seed), seed))
    print(f"{args.kind}, {args.episodes} test tasks for each of the seeds {args.seeds}: accuracy (standard deviation)")
    for name, values in found.items():
        paper = f"{PAPER[name]:>10.2f}" if name in PAPER else ""
        print(f"{name:<26}{100 * np.mean(values):>8.2f} ({100 * np.std(values):.2f}){paper}")
    order = [np.mean(found[name]) for name in ("Mc-Di", "Mv-Di", "Tw-Di")]
    gap = min(order[0] - order[1], order[1] - order[2])
    print(f"bar mc_over_mv_over_tw: {gap:.4f} (goal > 0) {'met' if gap > 0 else 'missed'}")


if __name__ == "__main__":
    main()
