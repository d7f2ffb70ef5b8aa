"""How many adapters fit into a budget of memory."""

import torch

from ..adapters.stacked import StackedLora
from ..data.encoded import EncodedExamples
from ..data.tasks import Task
from .collect import LEAST_ROWS, TaskStack, TrajectorySettings, part_size
from .shared import initial_adapter


# Gradients of the activations on their way back, and what the allocator holds beside: of the order of what is saved.
BACKWARD_FACTOR = 1.5


def blank_stack(stacked: StackedLora, examples: EncodedExamples, tasks: list[Task]) -> TaskStack:
    """A stack of the right sizes at PEFT's own start, with heads of zeros: to measure with, not to train."""
    features = torch.zeros(len(examples), stacked.layout.feature_dim, device=stacked.device)
    return TaskStack(stacked, examples, initial_adapter(stacked.layout), features, tasks, scale=1.0)


def bytes_per_task(stacked: StackedLora, examples: EncodedExamples, task: Task, settings: TrajectorySettings) -> int:
    """The memory that one more task in a stack takes: measured on one pass, not guessed from the architecture.

    The pass is forward only, over a batch of the longest examples; PyTorch tells which tensors it keeps for the
    backward pass. The optimiser's state and the snapshots are added. The task is one with the most classes.
    """
    stack = blank_stack(stacked, examples, [task])
    tensors = {key: value.requires_grad_() for key, value in stack.tensors.items()}
    everything = torch.arange(len(examples))
    longest = everything[examples.lengths(everything).argsort(descending=True)]
    columns = part_size(examples, settings.batch_size, num_tasks=LEAST_ROWS)
    rows = longest[torch.arange(columns) % len(longest)]
    frozen = {value.untyped_storage().data_ptr() for value in stacked.upper.model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = stack.logits(tensors, rows.unsqueeze(0))  # held, so that no address is used twice
    activations = sum(saved.values()) + logits.nbytes
    # weights, gradients, Adam's two moments, SAM's step, its square on the way to a norm; the start and the targets
    copies = 6 + settings.num_targets + 1
    return int(BACKWARD_FACTOR * activations) + copies * sum(value.nbytes for value in tensors.values())


def stack_size_for(budget: int, per_task: int) -> int:
    """The number of tasks that fit into `budget` bytes at `per_task` bytes each, which must be one at least."""
    if budget < per_task:
        raise ValueError(
            f"One task takes {per_task / 2**20:.0f} MiB, more than the budget of {budget / 2**20:.0f} MiB: raise the "
            f"budget or lower the batch size."
        )
    return budget // per_task
