"""Pretrain a small ViT on the classes of some domains, to serve as a frozen backbone, and save it as transformers do.

    python examples/pretrain_vit.py --config examples/configs/omniglot_vit.json --dataset_name OMNIGLOT \
        --output_dir runs/omniglot-vit

The loss is that of prototypical networks (Snell et al. 2017): in every batch some images of each class make its
prototype, and the others are classified by the nearest one. A softmax over all classes did not leave the plateau of
chance in the same time. Images are turned and moved a little; rotations by 90 degrees are classes of their own.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from config import parse_args
from data import write_whole
from datasets import ClassLabel
from output_folder import hold_folder, latest_checkpoint, save_checkpoint
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, get_cosine_schedule_with_warmup

from mcdi_hf.adapters.head import class_means, head_logits, imprint_head
from mcdi_hf.data.augmentation import MAX_DEGREES, MAX_LOG_SCALE, MAX_SHEAR, MAX_SHIFT
from mcdi_hf.data.cached import load_cached_dataset


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="a Hub id or a local folder of images")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--domain_column", required=True, help="its classes say which rows are trained on")
    parser.add_argument("--train_domains", nargs="+", required=True)
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--patch_size", type=int, default=7)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=5)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--classes_per_step", type=int, default=64)
    parser.add_argument("--images_per_class", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--adam_weight_decay", type=float, default=0.05)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=1)
    parser.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or `latest`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parse_args(parser)
    if args.images_per_class < 2:
        parser.error("--images_per_class is at least 2: one for the prototype, one to classify.")
    return args


def load_images(args: argparse.Namespace) -> torch.Tensor:
    """The images of every class and of its rotations, as numbers from 0 to 1: `(classes, images, height, width)`."""
    table = load_cached_dataset(args.dataset_name, split="train")
    names = {}
    for column in (args.label_column, args.domain_column):
        if not isinstance(table.features.get(column), ClassLabel):
            raise ValueError(f"{args.dataset_name} has no ClassLabel column {column!r}; it has {table.features}.")
        names[column] = table.features[column].names
    known = names[args.domain_column]
    if unknown := sorted(set(args.train_domains) - set(known)):
        raise ValueError(f"There are no domains {unknown}: expected some of {known}.")
    domains = np.asarray(table.with_format("numpy")[args.domain_column][:])
    table = table.select(np.flatnonzero(np.isin(domains, [known.index(name) for name in args.train_domains])))
    labels = np.asarray(table.with_format("numpy")[args.label_column][:])
    size = (args.image_size, args.image_size)
    images = np.stack([np.asarray(image.convert("L").resize(size)) for image in table[args.image_column][:]])
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    count = min(len(members) for members in rows)
    if count < args.images_per_class:
        raise ValueError(f"A class has {count} images, fewer than images_per_class ({args.images_per_class}).")
    classes = torch.from_numpy(np.stack([images[members[:count]] for members in rows])).float() / 255
    if 4 * len(classes) < args.classes_per_step:
        raise ValueError(
            f"With rotations there are {4 * len(classes)} classes, fewer than classes_per_step ({args.classes_per_step})."
        )
    return torch.cat([classes.rot90(quarter, dims=(2, 3)) for quarter in range(4)])


def move(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[`random_affine`] for a batch `(n, height, width)`: rotated, sheared, scaled and shifted a little."""
    angle, shear, log_scale, *shift = (2 * torch.rand(5, len(images), generator=generator) - 1).unbind()
    angle, shear = math.radians(MAX_DEGREES) * angle, MAX_SHEAR * shear
    scale = (MAX_LOG_SCALE * log_scale).exp()
    cos, sin = angle.cos() / scale, angle.sin() / scale
    first = torch.stack([cos, shear * cos - sin, 2 * MAX_SHIFT * shift[0]], dim=-1)
    second = torch.stack([sin, shear * sin + cos, 2 * MAX_SHIFT * shift[1]], dim=-1)
    images = images.unsqueeze(1)
    grid = torch.nn.functional.affine_grid(torch.stack([first, second], dim=1), images.shape, align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False)


def prototype_loss(features: torch.Tensor, shots: int, scale: float) -> torch.Tensor:
    """Classify all but the first `shots` images of each class, `(classes, images, dim)`, by the prototypes of these."""
    classes = torch.arange(len(features), device=features.device)
    support, query = features.split([shots, features.shape[1] - shots], dim=1)
    means = class_means(support.flatten(0, 1)[None], classes.repeat_interleave(shots)[None], len(classes))
    logits = head_logits(query.flatten(0, 1)[None], *imprint_head(means, scale))[0]
    return torch.nn.functional.cross_entropy(logits, classes.repeat_interleave(query.shape[1]))


def build(args: argparse.Namespace, images: torch.Tensor) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """The untrained model, and the processor that gives its pixels mean 0 and variance 1."""
    torch.manual_seed(args.seed)
    config = ViTConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=4 * args.hidden_size,
        image_size=args.image_size,
        patch_size=args.patch_size,
        initializer_range=args.hidden_size**-0.5,  # with ViT's own 0.02 all images look alike to so narrow a model
    )
    size = {"height": args.image_size, "width": args.image_size}
    mean, std = [round(images.mean().item(), 3)] * 3, [round(images.std().item(), 3)] * 3
    return ViTForImageClassification(config), ViTImageProcessorPil(size=size, image_mean=mean, image_std=std)


def draw(args: argparse.Namespace, images: torch.Tensor, step: int) -> tuple[torch.Tensor, int]:
    """A step's own batch, `(classes, images, height, width)`, and how many images of a class make its prototype."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    chosen = torch.randperm(len(images), generator=generator)[: args.classes_per_step]
    picks = torch.rand(len(chosen), images.shape[1], generator=generator).argsort(dim=1)[:, : args.images_per_class]
    shots = int(torch.randint(1, args.images_per_class, (), generator=generator))
    batch = move(images[chosen.unsqueeze(1), picks].flatten(0, 1), generator)
    return batch.unflatten(0, picks.shape), shots


def main() -> None:
    args = arguments()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:  # each would train on the same batches
        raise ValueError(f"This script runs in one process, not in {accelerator.num_processes}.")
    lock, checkpoints = hold_folder(args.output_dir, accelerator), args.output_dir / "checkpoints"
    images = load_images(args)
    model, processor = build(args, images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.adam_weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    step = 0
    if args.resume_from_checkpoint:
        latest = args.resume_from_checkpoint == "latest"
        checkpoint = latest_checkpoint(checkpoints) if latest else Path(args.resume_from_checkpoint)
        if checkpoint is not None:  # a run that was killed before its first has none
            accelerator.load_state(str(checkpoint))
            step = schedule.state_dict()["last_epoch"]
    bar = tqdm(total=args.max_train_steps, initial=step, desc="pretraining")
    while step < args.max_train_steps:
        batch, shots = draw(args, images, step)
        pixels = (batch.flatten(0, 1) - processor.image_mean[0]) / processor.image_std[0]
        pixels = pixels.expand(-1, 3, -1, -1).to(accelerator.device)
        features = model.vit(pixels).last_hidden_state[:, 0].unflatten(0, batch.shape[:2])
        loss = prototype_loss(features, shots, scale=8 / features.shape[-1])
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % args.checkpointing_steps == 0:
            number = step // args.checkpointing_steps - 1
            save_checkpoint(accelerator, checkpoints, number, args.checkpoints_total_limit)
    bar.close()

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    write_whole(args.output_dir / "model", save)
    lock.release()


if __name__ == "__main__":
    main()
