"""How fast a stack of adapters trains beside the loop that a person writes with peft, on the same tasks.

    python examples/benchmark_preparation.py --clinc150 CLINC150 --omniglot OMNIGLOT

Both run the same 5-way tasks from the same start with the same batches, and must end on the same weights. The loop is
a good one: examples are tokenised or made into pixels beforehand, and one PEFT model serves all tasks. What a stack
takes only once for thousands of tasks, the frozen lower layers and the start's features, is printed apart. Times of
the loop and of the stacks are taken in turn, so that whatever else the machine does falls on both.
"""

import argparse
import time

import numpy as np
import torch
from data import Source, inputs_of, installed_backbone, load_table
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from mcdi_hf import (
    AdapterLayout,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    StackedLora,
    Task,
    TrajectorySettings,
    collect_trajectories,
)
from mcdi_hf.data.episodes import rows_and_labels
from mcdi_hf.trajectories.collect import TaskStack
from mcdi_hf.trajectories.dataset import split_weights
from mcdi_hf.trajectories.shared import initial_adapter


GOALS = {"MiniLM-L6": 2, "small ViT": 5}
GPU_GOAL = 20
# How a pass is spent, by the name of PyTorch's operation.
KINDS = {
    "frozen matrix products": ("aten::addmm", "aten::mm"),
    "LoRA and heads": ("aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product",),
    "optimiser": ("aten::_fused_adamw", "aten::lerp", "aten::addcmul", "aten::addcdiv", "aten::sqrt"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clinc150", required=True, help="a folder or Hub id with the columns text, intent, domain")
    parser.add_argument("--omniglot", required=True, help="a folder or Hub id with image, character, alphabet")
    parser.add_argument("--pretrained_model_name_or_path", help="by default the wheel's all-MiniLM-L6-v2")
    parser.add_argument("--stack_sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[5, 16], help="examples a task and a step")
    parser.add_argument("--sequential_tasks", type=int, default=4, help="tasks of the loop in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Case:
    """One backbone with 5-way tasks on real data, LoRA in its two last layers or in all of them."""

    def __init__(
        self,
        name: str,
        backbone: FrozenBackbone,
        source: Source,
        shots: int,
        config: LoraConfig,
        args: argparse.Namespace,
    ) -> None:
        self.name, self.backbone, self.config = name, backbone, config
        backbone.model.to("cuda" if torch.cuda.is_available() else "cpu")
        table, _ = load_table([source], ["train"], None)
        rows = LabelledRows(table, "label", "group")
        sampler = EpisodeSampler(rows, (5, 5), (shots, shots), 5, args.seed)
        self.tasks = [sampler[number] for number in range(max(args.stack_sizes))]
        used = sorted({row for task in self.tasks for part in task.support + task.query for row in part})
        place = {row: index for index, row in enumerate(used)}
        self.tasks = [
            Task(
                task.classes,
                *(tuple(tuple(place[row] for row in part) for part in parts) for parts in (task.support, task.query)),
                task.group,
            )
            for task in self.tasks
        ]
        self.inputs = inputs_of(table.select(used))
        self.layout = AdapterLayout.from_model(backbone.model, config, backbone.head_name)
        self.stacked = StackedLora(backbone, self.layout)
        self.start = initial_adapter(self.layout, args.seed)
        began = time.perf_counter()
        self.examples = self.stacked.encode(self.inputs)
        self.features = self.stacked.features_of_all(self.start, self.examples)
        self.once = (time.perf_counter() - began) / len(used)
        self.tokens = backbone.tokens(self.inputs)
        self.model = get_peft_model(backbone.classifier(5), config).eval()

    def settings(self, args: argparse.Namespace, batch_size: int) -> TrajectorySettings:
        return TrajectorySettings(args.max_train_steps, batch_size=batch_size, seed=args.seed)

    def stack(self, count: int, settings: TrajectorySettings) -> list[dict]:
        return collect_trajectories(
            self.stacked, self.examples, self.start, self.features, self.tasks[:count], list(range(count)), settings
        )

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.backbone.reads_images:
            return {key: value[rows].to(self.backbone.device) for key, value in self.tokens.items()}
        return self.backbone.pad({key: [values[row] for row in rows] for key, values in self.tokens.items()})

    def one_by_one(self, number: int, head: tuple[torch.Tensor, torch.Tensor], settings: TrajectorySettings) -> float:
        """One task as a person trains it with peft; the accuracy on its query."""
        start = self.start | dict(zip(self.layout.head_keys, head))
        set_peft_model_state_dict(self.model, {key: value[0] for key, value in start.items()})
        trained = [value for value in self.model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.num_steps)
        rows, labels = rows_and_labels(self.tasks[number].support)
        random = np.random.default_rng((settings.seed, number))
        for _ in range(settings.num_steps):
            picks = random.choice(len(rows), size=settings.batch_size, replace=False)
            logits = self.model(**self.batch(rows[picks])).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[picks].to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        rows, labels = rows_and_labels(self.tasks[number].query)
        with torch.no_grad():
            logits = self.model(**self.batch(rows)).logits
        return (logits.argmax(dim=-1).cpu() == labels).float().mean().item()

    def heads(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The imprinted heads that both start from."""
        stack = TaskStack(self.stacked, self.examples, self.start, self.features, self.tasks, 10.0)
        return [tuple(part[index : index + 1] for part in stack.head) for index in range(len(self.tasks))]

    def largest_difference(self, settings: TrajectorySettings, head: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Between the weights that the loop and a stack end on, as a share of how far the weights moved."""
        row = self.stack(4, settings)[0]
        found = split_weights(torch.from_numpy(row["weights"]), 5, self.layout)
        self.one_by_one(0, head, settings)
        names = {
            name.replace(".default", "").replace(".modules_to_save", ""): value.detach().cpu()
            for name, value in self.model.named_parameters()
            if value.requires_grad
        }
        moved = max((value[-1] - value[0]).abs().max().item() for value in found.values())
        return max((found[key][-1] - value).abs().max().item() for key, value in names.items()) / moved


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(case: Case, args: argparse.Namespace, batch_size: int) -> float:
    """Print the table of one case; return the best stack's tasks a second over the loop's."""
    settings, heads, count = case.settings(args, batch_size), case.heads(), args.sequential_tasks
    print(f"\n{case.name}, batches of {batch_size}, {settings.num_steps} steps, LoRA of {case.layout.numel} weights")
    print(
        f"  largest difference of the final weights to the loop's: {case.largest_difference(settings, heads[0]):.1e}"
    )
    loop, stacks = [], {size: [] for size in args.stack_sizes}
    for _ in range(args.repeats):
        loop.append(
            seconds(lambda: [case.one_by_one(number, heads[number], settings) for number in range(count)]) / count
        )
        for size, times in stacks.items():
            times.append(seconds(lambda: case.stack(size, settings)) / size)
    base = float(np.median(loop))
    print(f"  {'':<14} {'tasks/s':>8} {'ratio':>6}   (medians of {args.repeats}, spread of the time)")
    print(f"  {'peft loop':<14} {1 / base:>8.2f} {1:>6.2f}   {min(loop) / base:.2f} to {max(loop) / base:.2f}")
    ratios = {}
    for size, times in stacks.items():
        own = float(np.median(times))
        ratios[size] = base / own
        print(
            f"  {f'stack of {size}':<14} {1 / own:>8.2f} {ratios[size]:>6.2f}   {min(times) / own:.2f} to {max(times) / own:.2f}"
        )
    best = max(ratios, key=ratios.get)
    print_shares(case, best, settings)
    return ratios[best]


def print_shares(case: Case, size: int, settings: TrajectorySettings) -> None:
    """Print where the time of a stack goes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        case.stack(size, settings)
    shares = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiled.key_averages():
        kind = next(
            (kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "everything else"
        )
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    parts = ", ".join(f"{kind} {share / total:.0%}" for kind, share in shares.items())
    print(f"  a stack of {size} spends: {parts}")


def small_vit(seed: int) -> FrozenBackbone:
    """A ViT of a million parameters, untrained: how fast it is does not depend on what it knows."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=28,
        patch_size=7,
    )
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28})
    return FrozenBackbone(ViTForImageClassification(config), processor, "small-vit", "default")


def cases(args: argparse.Namespace) -> list[Case]:
    name = args.pretrained_model_name_or_path or installed_backbone()
    found = []
    clinc150 = Source(args.clinc150, "intent", group_column="domain")
    omniglot = Source(args.omniglot, "character", ("image",), "alphabet")
    for where, layers, vit_layers in (("two last layers", [4, 5], [3, 4]), ("all layers", None, None)):
        text = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=4, target_modules=["query", "value"], layers_to_transform=layers
        )
        image = LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=vit_layers,
            modules_to_save=["classifier"],
        )
        backbone = FrozenBackbone.from_pretrained(name)
        found.append(Case(f"MiniLM-L6, {where}", backbone, clinc150, 60, text, args))
        found.append(Case(f"small ViT, {where}", small_vit(args.seed), omniglot, 15, image, args))
    return found


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, PyTorch {torch.__version__}")
    ratios = {}
    for case in cases(args):
        print(f"\n{case.name}: once for the whole data set, {case.once * 1000:.1f} ms an example")
        for batch_size in args.batch_sizes:
            ratios[case.name, batch_size] = measure(case, args, batch_size)
    print()
    for (name, batch_size), ratio in ratios.items():
        goal = GPU_GOAL if torch.cuda.is_available() else GOALS[name.split(",")[0]]
        verdict = "met" if ratio >= goal else "missed"
        label = f"stack_over_peft_loop[{name}, batch {batch_size}]".replace(" ", "_")
        print(f"bar {label}: {ratio:.1f} (goal >= {goal}) {verdict}")


if __name__ == "__main__":
    main()
