"""What else makes a head from one shot of each class: nothing learnt, a gradient from a start, and REPTILE itself."""

import copy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import trange

from mcdi_hf.training.reptile import reptile_step

from .conv4 import CHANNELS, Conv4, images_of, split_alphabets
from .heads import ROWS, WAYS, Adam, Episodes, head_gradient
from .runs import EPISODES, episodes_of, features_at, rounded, write_once


STEPS_AT_USE = (1, 2, 5, 10, 20)
VALIDATION_EPISODES = 50


@dataclass(frozen=True)
class Reptile:
    """One training by REPTILE: of what part of the network, with which inner learning rate, for how many outer steps."""

    part: str
    learning_rate: float
    steps: int

    def name(self) -> str:
        return f"reptile-{self.part}-{self.learning_rate:g}-{self.steps}"


def nearest_shot(episodes: Episodes) -> torch.Tensor:
    """The heads `(tasks, 5, 65)` that answer with the class of the nearest shot."""
    bias = -episodes.support.square().sum(dim=-1, keepdim=True) / 2
    return torch.cat([episodes.support, bias], dim=-1)


def gradient_heads(episodes: Episodes, start: torch.Tensor, learning_rate: float, steps: int) -> torch.Tensor:
    """Heads after some steps of Adam on the shots, from `start` `(tasks, 5, 65)`."""
    heads, adam, labels = start, Adam(learning_rate), torch.arange(WAYS)
    for _ in range(steps):
        heads = heads - adam.step(head_gradient(heads, episodes.support, labels))
    return heads


def untrained(part: str) -> nn.Module:
    """A network of PyTorch's own start: the head alone, the last block with the head, or the whole Conv-4 with it."""
    head = nn.Linear(CHANNELS, WAYS)
    if part == "head":
        return head
    if part == "whole":
        return nn.Sequential(Conv4(), head)
    return nn.Sequential(nn.Unflatten(1, (CHANNELS, 3, 3)), Conv4.block(CHANNELS, CHANNELS), nn.Flatten(), head)


def meta_train(setting: Reptile, inputs: torch.Tensor) -> nn.Module:
    """REPTILE on tasks of the classes of `inputs` `(classes, drawers, views, ...)`: five steps on batches of 25, the mean
    difference of five tasks, and a rate that falls from 1 to 0 (Nichol et al. 2018)."""
    torch.manual_seed(0)
    generator, accelerator = torch.Generator().manual_seed(0), Accelerator(cpu=True)
    model = untrained(setting.part)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, setting.steps)
    labels, tasks = torch.arange(WAYS).repeat(ROWS // WAYS), 5
    for _ in trange(setting.steps, desc=setting.name()):
        classes = torch.rand(tasks, len(inputs), generator=generator).topk(WAYS).indices

        def loss(clone: nn.Module, task: int, inner_step: int, classes: torch.Tensor = classes) -> torch.Tensor:
            drawers, views = (torch.randint(inputs.shape[axis], (ROWS,), generator=generator) for axis in (1, 2))
            batch = inputs[classes[task][labels], drawers, views].float()
            with torch.autocast("cpu", torch.bfloat16):
                found = clone(batch).float()
            return nn.functional.cross_entropy(found, labels)

        reptile_step(accelerator, model, optimizer, tasks, loss, 5, setting.learning_rate)
        schedule.step()
    return model


def adapt(model: nn.Module, support: torch.Tensor, learning_rate: float, steps: int) -> nn.Module:
    """A copy after some steps on the shots `(5, ...)`, whose batch norms keep the shots' statistics."""
    clone, labels = copy.deepcopy(model).train(), torch.arange(WAYS)
    optimizer = torch.optim.SGD(clone.parameters(), lr=learning_rate)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(clone(support), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in clone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        clone(support)
    return clone.eval()


def judge(model: nn.Module, episodes: Episodes, learning_rate: float, steps: int) -> list[float]:
    """The accuracy on each task's queries after adapting to its shots."""
    found = []
    for support, query in zip(episodes.support, episodes.query):
        adapted = adapt(model, support.float(), learning_rate, steps)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=query[0].ndim == 3):
            answers = adapted(query.float()).argmax(dim=-1)
        found.append(round(float((answers == episodes.labels).float().mean()), 4))
    return found


def run_reptile(setting: Reptile, dataset: str, output_dir: Path) -> None:
    """Meta-train, choose the number of steps on validation episodes, and judge."""
    write_once(output_dir, setting.name(), _train_and_judge, setting, dataset, output_dir)


def _train_and_judge(setting: Reptile, dataset: str, output_dir: Path) -> dict:
    inputs, validation, test = inputs_of(setting.part, dataset, output_dir)
    model, few = meta_train(setting, inputs), Episodes.draw(validation, VALIDATION_EPISODES, seed=1)
    scores = {steps: sum(judge(model, few, setting.learning_rate, steps)) / len(few.support) for steps in STEPS_AT_USE}
    best = max(scores, key=scores.get)
    found = {"setting": asdict(setting), "validation": scores, "steps at use": best}
    return found | {"accuracy": judge(model, Episodes.draw(test, EPISODES, seed=2), setting.learning_rate, best)}


def inputs_of(part: str, dataset: str, output_dir: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the network reads of the images to train on, to validate and to test on: features for a head, maps for a
    block, pixels for the whole, which is trained on the alphabets of the Conv-4's pretraining, too."""
    if part != "whole":
        features = features_at(output_dir / {"head": "features.safetensors", "block": "maps.safetensors"}[part])
        return features.train, features.validation, features.test
    pretraining, training, validation = split_alphabets(dataset)
    parts = torch.cat([pretraining, training]), validation, images_of(dataset, "test")[0]
    return tuple(images[:, :, None, None] for images in parts)


def run_frozen(output_dir: Path) -> None:
    """What needs no meta-training, on frozen features: the nearest shot, and Adam on the shots from zero and from the
    Gaussian start of the trajectories, as many steps as validation likes best."""
    write_once(output_dir, "frozen", _measure_frozen, output_dir)


def _measure_frozen(output_dir: Path) -> dict:
    validation, test = episodes_of(features_at(output_dir / "features.safetensors"))
    accuracy = {"nearest shot": rounded(test.accuracies(nearest_shot(test)))}
    gaussian = torch.randn(len(test.support), WAYS, CHANNELS + 1, generator=torch.Generator().manual_seed(0))
    for name, scale in {"gradient from zero": 0.0, "gradient from the Gaussian start": 1.0}.items():
        start = scale * gaussian
        few = start[: len(validation.support)]
        tried = {
            how: float(validation.accuracies(gradient_heads(validation, few, *how)).mean())
            for how in product((0.05, 0.2), (5, 20, 60))
        }
        accuracy[name] = rounded(test.accuracies(gradient_heads(test, start, *max(tried, key=tried.get))))
    return {"accuracy": accuracy}
