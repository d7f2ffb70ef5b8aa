"""What each part of weight preparation does to the adapters that it ends on: weight decay, SAM, augmentation.

    python examples/ablate_preparation.py --dataset_name CLINC150 --label_column intent --group_column domain \
        --query_split test --ways 5 5 --examples_per_class 10 10 --num_tasks 60 --max_train_steps 60

Every variant trains the same tasks from the same shared start with the same batches. Accuracy is on held-out rows of
the task, differences are paired with the plain variant, with 95 % intervals over tasks. Sharpness is the Hessian's
eigenvalue of largest magnitude at the last weights, by ten power iterations on 25 rows of a task's support.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from preparation import Collection, add_adapter_arguments, add_data_arguments, add_optimiser_arguments
from tqdm.auto import tqdm

from mcdi_hf import EpisodeSampler, TrajectorySettings, collect_trajectories, train_shared_adapter
from mcdi_hf.trajectories.collect import TaskStack
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.sharpness import largest_eigenvalues


STACK_SIZE, SHARPNESS_ROWS = 12, 25


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser.add_argument_group("data and tasks"))
    add_adapter_arguments(parser.add_argument_group("backbone and adapters"))
    add_optimiser_arguments(parser.add_argument_group("optimiser"))
    parser.add_argument("--weight_decays", type=float, nargs="*", default=[0.1])
    parser.add_argument("--sam_rhos", type=float, nargs="*", default=[0.02, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(num_views=4)
    args = parser.parse_args()
    if args.ways[0] != args.ways[1]:
        parser.error("sharpness is measured on stacks of one number of classes: give --ways the same number twice")
    return args


class Ablation:
    """The tasks, the shared start, and both forms of the examples: as they are, and with augmented views."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.collection = Collection(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.collection.encode(show=True)
        self.views = self.collection.examples
        self.plain = self.views.first_view()
        sampler = EpisodeSampler(self.collection.rows, tuple(args.ways), (1, 5), 5, args.seed)
        bar = tqdm(total=args.shared_steps, desc="shared start")
        self.start, self.scale = train_shared_adapter(
            self.collection.stacked, self.plain, sampler, args.shared_steps, on_step=lambda *_: bar.update()
        )
        bar.close()
        self.features = self.collection.stacked.features_of_all(self.start, self.plain)
        self.tasks = [self.collection.sampler[number] for number in range(args.num_tasks)]

    def run(self, settings: TrajectorySettings, augmented: bool) -> dict[str, np.ndarray]:
        """Train every task; its training and held-out accuracy, its sharpness, and the seconds that it took."""
        stacked = self.collection.stacked
        found = {"training": [], "held out": [], "sharpness": [], "seconds": []}
        for first in range(0, len(self.tasks), STACK_SIZE):
            tasks = self.tasks[first : first + STACK_SIZE]
            numbers = list(range(first, first + len(tasks)))
            examples = self.views if augmented else self.plain
            began = time.perf_counter()
            rows = collect_trajectories(stacked, examples, self.start, self.features, tasks, numbers, settings)
            found["seconds"] += [(time.perf_counter() - began) / len(tasks)] * len(tasks)
            found["training"] += [row["train_accuracy"] for row in rows]
            found["held out"] += [row["accuracy"] for row in rows]
            found["sharpness"] += self.sharpness(tasks, rows)
        return {name: np.array(values) for name, values in found.items()}

    def sharpness(self, tasks: list, rows: list[dict]) -> list[float]:
        stack = TaskStack(self.collection.stacked, self.plain, self.start, self.features, tasks, self.scale)
        batch = stack.draw(SHARPNESS_ROWS, [np.random.default_rng(0)] * len(tasks))
        ends = torch.from_numpy(np.stack([row["weights"][-1] for row in rows])).to(self.collection.stacked.device)
        tensors = split_weights(ends, self.args.ways[0], self.collection.codec.layout)

        def losses(values: list[torch.Tensor]) -> torch.Tensor:
            return stack.losses(dict(zip(tensors, values)), *batch)

        return largest_eigenvalues(losses, list(tensors.values()), num_iterations=10).tolist()


def variants(args: argparse.Namespace, plain: TrajectorySettings) -> dict[str, tuple[TrajectorySettings, bool]]:
    """Name -> settings, and whether the batches are drawn from augmented views."""
    found = {"plain Adam": (plain, False)}
    found |= {f"weight decay {decay:g}": (replace(plain, weight_decay=decay), False) for decay in args.weight_decays}
    found |= {f"SAM {rho:g}": (replace(plain, sam_rho=rho), False) for rho in args.sam_rhos}
    found[f"{args.num_views} views"] = (plain, True)
    return found


def main() -> None:
    args = parse_args()
    ablation = Ablation(args)
    results = {}
    for name, (settings, augmented) in variants(args, ablation.collection.settings(ablation.scale)).items():
        results[name] = ablation.run(settings, augmented)
    base = results["plain Adam"]
    shots = "-".join(map(str, dict.fromkeys(args.examples_per_class)))
    print(f"{len(ablation.tasks)} tasks, {args.ways[0]}-way, {shots} examples a class, {args.max_train_steps} steps")
    print(f"{'':<22} {'training':>8} {'held out':>8} {'difference':>16} {'sharpness':>10} {'median':>8} {'s/task':>7}")
    for name, found in results.items():
        difference = found["held out"] - base["held out"]
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        print(
            f"{name:<22} {found['training'].mean():>8.4f} {found['held out'].mean():>8.4f} "
            f"{difference.mean():>+7.4f} +- {half:.4f} {found['sharpness'].mean():>10.3f} "
            f"{np.median(found['sharpness']):>8.3f} {found['seconds'].mean():>7.2f}"
        )


if __name__ == "__main__":
    main()
