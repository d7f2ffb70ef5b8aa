"""Pretrain a small ViT on the classes of some domains, to serve as a frozen backbone, and save it as transformers do.

    python examples/reproduce/pretrain_vit.py --config examples/reproduce/configs/omniglot_vit.json \\
        --dataset_name OMNIGLOT --output_dir runs/omniglot-vit

The loss is that of prototypical networks (Snell et al. 2017): in every batch some images of each class make its
prototype, and the others are classified by the nearest one. A softmax over all classes did not leave the plateau of
chance in the same time. Images are turned and moved a little; rotations by 90 degrees are classes of their own.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from mcdi_hf.data.augmentation import MAX_DEGREES, MAX_LOG_SCALE, MAX_SHEAR, MAX_SHIFT
from mcdi_hf.data.cached import load_cached_dataset
from mcdi_hf.utils.arguments import parse_arguments
from mcdi_hf.utils.files import write_folder
from mcdi_hf.utils.run_folder import hold_folder, latest_checkpoint, save_checkpoint


@dataclass
class Arguments:
    """A small ViT, and its pretraining."""

    dataset_name: str = HfArg(help="a Hub id or a local folder of images")
    domain_column: str = HfArg(help="its classes say which rows are trained on")
    train_domains: list[str] = HfArg(help="the domains to train on")
    output_dir: Path = HfArg(help="where the folder `model` and checkpoints are written")
    image_column: str = HfArg(default="image", help="the images")
    label_column: str = HfArg(default="label", help="the classes")
    image_size: int = HfArg(default=28, help="pixels a side that images are scaled to")
    patch_size: int = HfArg(default=7, help="pixels a side of a patch")
    hidden_size: int = HfArg(default=128, help="the ViT's width")
    num_layers: int = HfArg(default=5, help="the ViT's depth")
    num_heads: int = HfArg(default=4, help="attention heads of a layer")
    classes_per_step: int = HfArg(default=64, help="classes of a batch, rotations included")
    images_per_class: int = HfArg(default=4, help="at least 2: one for the prototype, one to classify")
    learning_rate: float = HfArg(default=1e-3, help="AdamW's, at its highest")
    adam_weight_decay: float = HfArg(default=0.05, help="AdamW's")
    lr_warmup_steps: int = HfArg(default=200, help="steps until the learning rate is highest; then a cosine")
    max_train_steps: int = HfArg(default=4000, help="batches in all")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    checkpointing_steps: int = HfArg(default=500, help="steps from one checkpoint to the next")
    checkpoints_total_limit: int = HfArg(default=1, help="how many to keep")
    resume_from_checkpoint: str | None = HfArg(default=None, help="a checkpoint's folder, or `latest`")
    seed: int = HfArg(default=0, help="of the initial weights and of every batch")

    def __post_init__(self) -> None:
        if self.images_per_class < 2:
            raise ValueError("--images_per_class is at least 2: one for the prototype, one to classify.")


def load_images(args: Arguments) -> torch.Tensor:
    """The images of every class and of its rotations, as numbers from 0 to 1: `(classes, images, height, width)`."""
    table = load_cached_dataset(args.dataset_name, split="train")
    check_columns(table, args.dataset_name, [args.label_column, args.domain_column])
    known = table.features[args.domain_column].names
    if unknown := sorted(set(args.train_domains) - set(known)):
        raise ValueError(f"There are no domains {unknown}: expected some of {known}.")
    domains = np.asarray(table.with_format("numpy")[args.domain_column][:])
    table = table.select(np.flatnonzero(np.isin(domains, [known.index(name) for name in args.train_domains])))
    classes = images_by_class(table, args.image_column, args.label_column, args.image_size)
    if (count := classes.shape[1]) < args.images_per_class:
        raise ValueError(f"A class has {count} images, fewer than images_per_class ({args.images_per_class}).")
    if 4 * len(classes) < args.classes_per_step:
        raise ValueError(
            f"With rotations there are {4 * len(classes)} classes, fewer than classes_per_step ({args.classes_per_step})."
        )
    return turned(classes)


def check_columns(table: Dataset, name: str, columns: list[str]) -> None:
    """Refuse a data set without named classes in some columns."""
    for column in columns:
        if not isinstance(table.features.get(column), ClassLabel):
            raise ValueError(f"{name} has no ClassLabel column {column!r}; it has {table.features}.")


def images_by_class(table: Dataset, image_column: str, label_column: str, size: int) -> torch.Tensor:
    """Grey images from 0 to 1 by class, as many of each as the smallest has: `(classes, images, size, size)`."""
    labels = np.asarray(table.with_format("numpy")[label_column][:])
    images = np.stack([np.asarray(image.convert("L").resize((size, size))) for image in table[image_column][:]])
    rows = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    count = min(map(len, rows))
    return torch.from_numpy(np.stack([images[members[:count]] for members in rows])).float() / 255


def turned(images: torch.Tensor) -> torch.Tensor:
    """The classes, and as new ones those turned by one, two and three quarters."""
    return torch.cat([images.rot90(quarter, dims=(2, 3)) for quarter in range(4)])


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
    means = support.mean(dim=1)
    logits = -scale / 2 * torch.cdist(query.flatten(0, 1), means).square()
    return torch.nn.functional.cross_entropy(logits, classes.repeat_interleave(query.shape[1]))


def build(args: Arguments, images: torch.Tensor) -> tuple[ViTForImageClassification, ViTImageProcessor]:
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
    return ViTForImageClassification(config), ViTImageProcessor(size=size, image_mean=mean, image_std=std)


def draw(args: Arguments, images: torch.Tensor, step: int) -> tuple[torch.Tensor, int]:
    """A step's own batch, `(classes, images, height, width)`, and how many images of a class make its prototype."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    chosen = torch.randperm(len(images), generator=generator)[: args.classes_per_step]
    picks = torch.rand(len(chosen), images.shape[1], generator=generator).argsort(dim=1)[:, : args.images_per_class]
    shots = int(torch.randint(1, args.images_per_class, (), generator=generator))
    batch = move(images[chosen.unsqueeze(1), picks].flatten(0, 1), generator)
    return batch.unflatten(0, picks.shape), shots


def train(args: Arguments, accelerator: Accelerator) -> tuple[ViTForImageClassification, ViTImageProcessor]:
    """Pretrain from the start, or from a checkpoint on."""
    images, checkpoints = load_images(args), args.output_dir / "checkpoints"
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
            save_checkpoint(accelerator, checkpoints, step, args.checkpoints_total_limit)
    bar.close()
    return model, processor


def main() -> None:
    (args,) = parse_arguments(Arguments, description=__doc__)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:  # each would train on the same batches
        raise ValueError(f"This script runs in one process, not in {accelerator.num_processes}.")
    with hold_folder(args.output_dir, accelerator):
        parts = train(args, accelerator)

        def save(folder: Path) -> None:
            for part in parts:
                part.save_pretrained(folder)

        write_folder(args.output_dir / "model", save, last="config.json")


if __name__ == "__main__":
    main()
