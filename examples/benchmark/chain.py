"""What a generator's adapters are worth while the sampler takes the noise away."""

from typing import Any

import torch
from fold import Fold
from splits import Split

from mcdi_hf import MCDiPipeline, Task


POINTS = 5  # along the chain, its start and its end among them


@torch.no_grad()
def along_chain(split: Split, fold: Fold, tasks: list[Task], seed: int) -> dict[str, dict[str, list[float]]]:
    """The accuracy of single draws after some steps of the whole chain, which has as many as training had.

    Args:
        split (`Split`), fold (`Fold`), tasks (`list[Task]`), seed (`int`): As in [`Method.accuracies`], of one stack.

    Returns:
        Objective of the generator -> steps taken, as text for JSON -> an accuracy a task; empty without tasks.
    """
    support, found = split.support(tasks) if tasks else None, {}
    for objective in [one for one, own in fold.generator.pipelines if own == seed and tasks]:
        pipe = fold.pipeline(objective, seed)
        steps, reached = pipe.scheduler.config.num_train_timesteps, {}
        noise = torch.Generator().manual_seed(seed)
        shape = len(tasks), *pipe.codec.filled.shape
        reached[0] = torch.randn(shape, generator=noise)

        def keep(_: MCDiPipeline, step: int, timestep: Any, tensors: dict, kept: dict = reached) -> dict:
            kept[step + 1] = tensors["latents"]
            return tensors

        pipe(
            support,
            num_inference_steps=steps,
            latents=reached[0],
            generator=noise,
            output_type="latent",
            callback_on_step_end=keep,
        )
        chosen = torch.linspace(0, steps, POINTS).round().int().tolist()
        found[objective] = {
            str(step): split.whole(pipe.decode_adapters(pipe.config.strength * reached[step], support), tasks)
            for step in chosen
        }
    return found
