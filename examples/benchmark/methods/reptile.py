"""A start for gradient LoRA that REPTILE made on the training tasks."""

from dataclasses import replace

from fold import Fold
from splits import Tensors

from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.pipelines.refinement import train_on_support
from mcdi_hf.trajectories.shared import initial_adapter


INNER_STEPS, INNER_RATE = 5, 5e-3


def reptile_start(fold: Fold) -> Tensors:
    """The matrices that REPTILE (Nichol et al. 2018, arXiv 1803.02999) finds, key -> `(1, *shape)`.

    Each outer step draws tasks of the shared start's sampler, trains a copy on all examples of each for some steps,
    and goes a part of the way to the copies' mean; that part falls from all of it to nothing. There are as many gradient
    steps as the shared start had, on half as many tasks each: an outer step sees all examples of a task five times.
    """

    def make() -> Tensors:
        training, means, head = fold.training, fold.training.shared_start, fold.codec.head
        stacked, matrices = fold.stacked, initial_adapter(fold.codec.layout)
        matrices = {key: value.to(stacked.device) for key, value in matrices.items()}
        outer, count = max(1, means["steps"] // INNER_STEPS), max(1, means["tasks_per_step"] // 2)
        for step in range(outer):
            tasks = [
                replace(task, support=tuple(shots + query for shots, query in zip(task.support, task.query)))
                for task in training.sampler.stack(step, count)
            ]
            support = replace(SupportBatch.from_tasks(tasks, device=stacked.device), examples=training.examples)
            with fold.autocast():
                trained = train_on_support(
                    stacked, fold.whole(matrices, head, support), support, INNER_STEPS, INNER_RATE
                )
            for key, value in matrices.items():
                value.lerp_(trained[key].mean(dim=0, keepdim=True), 1 - step / outer)
        return {key: value.cpu() for key, value in matrices.items()}

    return fold.kept("reptile", make)
