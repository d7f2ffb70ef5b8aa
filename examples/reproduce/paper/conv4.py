"""Omniglot, a Conv-4 that is frozen once it is pretrained, and what it makes of every image."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pretrain_vit import check_columns, images_by_class, move, turned
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import trange

from mcdi_hf.data.cached import load_cached_dataset
from mcdi_hf.utils.files import write_file


CHANNELS, SIZE = 64, 28
VIEWS, MAP_VIEWS = 5, 2  # of every image: as it is, and moved a little
# Of the 30 alphabets of the background set, drawn anew by the seed: the first pretrain, the last validate.
PRETRAINING_ALPHABETS, VALIDATION_ALPHABETS = 12, 3


class Conv4(nn.Module):
    """Four blocks of a 3 x 3 convolution of 64 channels, batch norm, ReLU and pooling (Vinyals et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1] + [CHANNELS] * 4
        self.blocks = nn.ModuleList([self.block(*pair) for pair in zip(widths, widths[1:])])
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def block(before: int, after: int) -> nn.Sequential:
        layers = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)
        return nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`(images, 1, 28, 28)` -> `(images, 64)`."""
        states = images.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            states = block(states)
        return states.flatten(1)


@dataclass
class Features:
    """What the frozen Conv-4 makes of the images, `(classes, drawers, views, 64)` for each part, standardised by the
    training part. The first view is the image as it is; test images have no other. Characters of `train` and `validation`
    were turned by quarters, too, as new classes."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


@lru_cache
def images_of(dataset: str, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """All images of a split by character, `(characters, drawers, 28, 28)` from 0 to 1, and each character's alphabet."""
    table = load_cached_dataset(dataset, split=split)
    check_columns(table, dataset, ["character", "alphabet"])
    labels, alphabets = (np.asarray(table.with_format("numpy")[name][:]) for name in ("character", "alphabet"))
    return images_by_class(table, "image", "character", SIZE), alphabets[np.unique(labels, return_index=True)[1]]


def pretrain(images: torch.Tensor, epochs: int, seed: int) -> Conv4:
    """A Conv-4 that learnt to tell all characters of `images` apart, moved a little each time."""
    torch.manual_seed(seed)
    classes, drawers = images.shape[:2]
    network, head = Conv4(), nn.Linear(CHANNELS, classes)
    generator, rows = torch.Generator().manual_seed(seed), 256
    steps = max(2, epochs * classes * drawers // rows)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in trange(steps, desc="Conv-4"):
        chosen = torch.randint(classes * drawers, (rows,), generator=generator)
        batch = move(images.flatten(0, 1)[chosen], generator)
        with torch.autocast("cpu", torch.bfloat16):
            features = network(batch)
        loss = nn.functional.cross_entropy(head(features.float()), chosen // drawers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def see(network: nn.Module, images: torch.Tensor, views: int, generator: torch.Generator) -> torch.Tensor:
    """The features of all images, as they are and moved, `(classes, drawers, views, 64)`."""
    seen = []
    for view in range(views):
        parts = images.flatten(0, 1).split(2048)
        with torch.autocast("cpu", torch.bfloat16):
            features = [network(move(part, generator) if view else part.unsqueeze(1)).float() for part in parts]
        seen.append(torch.cat(features).unflatten(0, images.shape[:2]))
    return torch.stack(seen, dim=2)


def split_alphabets(dataset: str, seed: int = 0) -> list[torch.Tensor]:
    """The background set's characters to pretrain on, to train generators on and to validate on, of other alphabets
    each, with their turned ones: `(classes, drawers, 28, 28)`."""
    background, alphabets = images_of(dataset, "train")
    names = np.random.default_rng(seed).permutation(np.unique(alphabets))
    split = np.split(names, [PRETRAINING_ALPHABETS, -VALIDATION_ALPHABETS])
    return [turned(background[torch.from_numpy(np.isin(alphabets, group))]) for group in split]


def make_network(dataset: str, path: Path, epochs: int) -> Conv4:
    """Pretrain the Conv-4, or read what an earlier run left at `path`."""
    if not path.exists():
        _write(path, pretrain(split_alphabets(dataset)[0], epochs, seed=0).state_dict())
    network = Conv4()
    network.load_state_dict(load_file(path))
    return network.eval()


def make_features(dataset: str, path: Path, network: Conv4) -> None:
    """Run every image through the network and write its [`Features`], unless an earlier run did."""
    if not path.exists():
        seen = _see_all(dataset, network, VIEWS)
        known = seen["train"].flatten(0, 2)
        _write(path, {part: (features - known.mean(dim=0)) / known.std(dim=0) for part, features in seen.items()})


def make_maps(dataset: str, path: Path, network: Conv4) -> None:
    """As [`make_features`], what the first three blocks make of every image: `(classes, drawers, views, 576)` in float16,
    of variance 1 in the training part."""
    if not path.exists():
        lower = nn.Sequential(*network.blocks[:3], nn.Flatten())
        seen = _see_all(dataset, lower, MAP_VIEWS)
        scale = seen["train"].std()
        _write(path, {part: (maps / scale).half() for part, maps in seen.items()})


def _see_all(dataset: str, network: nn.Module, views: int) -> dict[str, torch.Tensor]:
    _, training, validation = split_alphabets(dataset)
    generator = torch.Generator().manual_seed(0)
    shown = {"train": (training, views), "validation": (validation, views), "test": (images_of(dataset, "test")[0], 1)}
    return {part: see(network, images, count, generator) for part, (images, count) in shown.items()}


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda stream: stream.write(save(whole)))
