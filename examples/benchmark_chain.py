"""How an adapter comes about: the sampler's chain beside the path of an optimiser, and accuracy by numbers of steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from families import Family
from gradient_rival import GradientSettings, gradient_accuracies
from training_data import episodes

from mcdi_hf import StackedLora, Task, TrajectorySettings, collect_trajectories
from mcdi_hf.adapters.head import class_means, imprint_head
from mcdi_hf.data.episodes import Episodes
from mcdi_hf.training.validation import free_accuracies, generated_accuracies
from mcdi_hf.backbones.layers import EncodedExamples
from mcdi_hf.pipelines.support import SupportBatch
from mcdi_hf.trajectories.dataset import split_weights


ROWS_AT_ONCE = 512  # examples of a pass, of all its adapters together
MARGIN = 0.12  # of the view, beyond what it has to show


@dataclass(frozen=True)
class Plane:
    """A plane in the space of tokens.

    Attributes:
        origin (`torch.Tensor` of shape `(tokens, token_dim)`): A point of it, the mean of what it was fitted to.
        axes (`torch.Tensor` of shape `(2, tokens, token_dim)`): Two orthonormal directions, float64.
        variance_explained (`list[float]`): The share of the variance that lies along each.
    """

    origin: torch.Tensor
    axes: torch.Tensor
    variance_explained: list[float]

    @classmethod
    def through(cls, path: torch.Tensor) -> "Plane":
        """The first two principal components of a path `(points, tokens, token_dim)` of three points or more.

        The path's end has no negative coordinate: signs of principal components are arbitrary otherwise.
        """
        if len(path) < 3:
            raise ValueError(f"The path has {len(path)} points: expected at least 3, which span a plane.")
        origin = path.double().mean(dim=0)
        rows = (path.double() - origin).flatten(1)
        _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
        axes = directions[:2] * torch.where(directions[:2] @ rows[-1] < 0, -1.0, 1.0).unsqueeze(-1)
        shares = (sizes.square() / sizes.square().sum())[:2].tolist()
        return cls(origin, axes.unflatten(1, origin.shape), shares)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """The coordinates `(..., 2)` of tokens `(..., tokens, token_dim)`; what is off the plane is dropped."""
        return torch.einsum("...kd,akd->...a", tokens.double() - self.origin, self.axes)

    def lift(self, coordinates: torch.Tensor) -> torch.Tensor:
        """The tokens `(n, tokens, token_dim)` at coordinates `(n, 2)`, in float32."""
        return (self.origin + torch.einsum("na,akd->nkd", coordinates.double(), self.axes)).float()


class TokenSpace:
    """The adapters of one task as tokens of a family's pipeline, which sees a few shots of it, and the loss there.

    Tokens say what is added to a head that is imprinted from the shots, so they mean something only beside these. What
    [`MCDiPipeline.complete`] makes of tokens is what they stand for. They are on the CPU here.

    Args:
        family (`Family`): The generator.
        task (`Task`): A validation task; its support may hold more than the generator sees.
        shots (`int`): How many examples of a class the generator sees, the first of the support.
    """

    def __init__(self, family: Family, task: Task, shots: int) -> None:
        if (fewest := min(len(rows) for rows in task.support)) < shots:
            raise ValueError(f"A class of the task has {fewest} examples in its support: expected {shots} shots.")
        few = replace(task, support=tuple(rows[:shots] for rows in task.support))
        self.pipe, self.split, self.task = family.pipe, family.splits["validation"][0], task
        self.episode = Episodes.of([few], self.pipe.stacked.device)

    def batch(self, count: int) -> SupportBatch:
        """The shots, `count` times."""
        episode, features = self.episode, self.split.features[self.episode.support]
        own = SupportBatch(features, episode.labels, episode.class_mask, episode.support, self.split.examples)
        return own.repeat(0, count, episode.labels.expand(count, -1))

    def encode(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tokens `(n, tokens, token_dim)` of adapters, key -> `(n, *shape)`: the inverse of the pipeline's `complete`."""
        count = max(1, ROWS_AT_ONCE // self.episode.support.numel())
        parts = zip(*(tensors[key].split(count) for key in self.pipe.codec.layout.keys))
        tokens = []
        for values in parts:
            part = dict(zip(self.pipe.codec.layout.keys, values))
            tokens.append(self.pipe.codec.encode(part, self._free_head(part, len(values[0]))))
        return torch.cat(tokens).cpu()

    def _free_head(self, tensors: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The head that the pipeline imprints beside the matrices of each adapter."""
        codec, batch = self.pipe.codec, self.batch(count)
        if not codec.layout.head_keys:
            return None
        if self.pipe.config.imprint_from == "generated":
            inputs = batch.examples[batch.rows.flatten()]
            return self.pipe.stacked.imprint(
                tensors, inputs, batch.labels, batch.class_mask, codec.config.imprint_scale
            )
        means = class_means(batch.features, batch.labels, batch.class_mask.shape[1])
        return imprint_head(means, codec.config.imprint_scale, batch.class_mask)

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy on the task's query of the adapters that tokens stand for: `(n,)`."""
        stacked, query = self.pipe.stacked, self.episode.query[0]
        found = []
        for part in tokens.split(max(1, ROWS_AT_ONCE // len(query))):
            tensors = self.pipe.complete(part.to(stacked.device), self.batch(len(part)))
            words = stacked.word_heads([self.task.classes] * len(part))
            logits = stacked.logits(tensors, self.split.examples[query.repeat(len(part))], None, words)
            labels = self.episode.query_labels.expand(len(part), -1)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            found.append(loss.mean(dim=1))
        return torch.cat(found).cpu()

    def chains(self, draws: int, num_inference_steps: int, seed: int) -> torch.Tensor:
        """The states of the sampler at temperature 1, noise first: `(draws, steps + 1, tokens, token_dim)`."""
        generator, batch, codec = torch.Generator().manual_seed(seed), self.batch(draws), self.pipe.codec
        noise = torch.randn(
            draws, codec.num_tokens(len(self.task.classes)), codec.layout.token_dim, generator=generator
        )
        states = [noise * self.pipe.scheduler.init_noise_sigma]

        def keep(pipe, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
            states.append(tensors["latents"].cpu())
            return {}

        self.pipe.sample(
            batch.features,
            batch.labels,
            batch.class_mask,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=noise,
            callback_on_step_end=keep,
        )
        return torch.stack(states, dim=1)

    def passages(self) -> list[int]:
        """After how many steps the chain that was sampled last has left each segment: where it should be at the targets."""
        scheduler = self.pipe.scheduler
        return [int((scheduler.timesteps.cpu() >= tau).sum()) for tau in scheduler.segment_boundaries]


def rich_task(family: Family, kind: str, examples_per_class: int, queries: int, number: int = 0) -> Task:
    """A validation task of a kind, `[GROUP:]WAYSxSHOTS`, with a support of many examples of a class in place of its shots."""
    ways, _, _ = kind.rpartition("x")
    rows = family.splits["validation"][1]
    return episodes(f"{ways}x{examples_per_class}", *rows, queries=queries, seed=100, count=number + 1)[number]


def optimised(family: Family, task: Task) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The path of the optimiser that the family's trajectories were made with, on all of a task's support.

    It starts where they start, and sees no augmented views.

    Returns:
        Key -> `(steps + 1, *shape)`, the start first, with the heads; and the steps at which targets are kept.
    """
    settings = TrajectorySettings(**family.description["settings"])
    layout, stacked = family.codec.layout, family.stacked
    first = family.trajectories[0]
    start = split_weights(torch.from_numpy(first["weights"][:1]), len(first["classes"]), layout)
    start = {key: start[key].to(stacked.device) for key in layout.lora_shapes}
    examples = family.splits["validation"][0].examples.first_view()
    every = replace(settings, num_targets=settings.num_steps)
    features = _features_of(stacked, start, examples, [task])
    (row,) = collect_trajectories(stacked, examples, start, features, [task], [0], every)
    path = split_weights(torch.from_numpy(row["weights"]), len(task.classes), layout)
    return {key: value.to(stacked.device) for key, value in path.items()}, settings.target_steps


def loss_grid(space: TokenSpace, plane: Plane, shown: torch.Tensor, size: int) -> dict:
    """The losses of adapters in a plane, in the box around the points `(n, 2)` to be shown and a little more.

    Returns:
        For JSON: `x` and `y`, `size` coordinates each, and `loss[y][x]`.
    """
    low, high = shown.amin(dim=0), shown.amax(dim=0)
    margin = MARGIN * (high - low)
    ends = zip((low - margin).tolist(), (high + margin).tolist())
    x, y = (torch.linspace(first, last, size, dtype=torch.float64) for first, last in ends)
    losses = space.losses(plane.lift(torch.cartesian_prod(y, x).flip(1)))
    return {"x": x.tolist(), "y": y.tolist(), "loss": losses.unflatten(0, (size, size)).tolist()}


def generation_chain(
    family: Family,
    table: str,
    task: Task,
    shots: int,
    draws: int = 4,
    num_inference_steps: int = 20,
    size: int = 15,
    seed: int = 0,
) -> dict:
    """The paper's figure 1: the chain of the sampler in the plane of the optimiser's path, above the loss.

    The plane is that of the path's first two principal components. The noise at the start of a chain is of another size
    altogether, but has hardly more than 1 along any direction; so the view, the box around all that is drawn and a
    little more, is not stretched by it.

    Args:
        family (`Family`): The generator, and its validation examples.
        table (`str`): What the picture is called.
        task (`Task`): A validation task with a support of many examples, which the optimiser sees, see [`rich_task`].
        shots (`int`): How many of them, of a class, the generator sees.
        draws (`int`, *optional*, defaults to 4): Chains.
        num_inference_steps (`int`, *optional*, defaults to 20): Their steps.
        size (`int`, *optional*, defaults to 15): Points along each side of the grid of losses.
        seed (`int`, *optional*, defaults to 0): Of the chains' noise.

    Returns:
        For JSON, with points as `[x, y]`: `table`, `classes`, `shots`; `trajectory`, the optimiser's path; `targets`
        on it; `chains`, with the noise first; `passages`, their states that should lie at the targets; `free`, where
        all tokens are zero: the mean adapter and the imprinted head; `adapter`, what the pipeline would give for these
        draws: their mean, as far from `free` as its `strength` says; `losses` of `free`, `adapter`, `target 1` and so
        on, where they are and not where the plane shows them; `adapter_in_plane`, the share of the squared distance from
        `free` to `adapter` that the plane shows; `grid` with `x`, `y` and `loss[y][x]`, the query's cross-entropy in the
        plane; `variance_explained` of the path by the two directions.
    """
    space = TokenSpace(family, task, shots)
    tensors, target_steps = optimised(family, task)
    path = space.encode(tensors)
    plane = Plane.through(path)
    states = space.chains(draws, num_inference_steps, seed)
    trajectory, chains = plane.project(path), plane.project(states)
    generated = states[:, -1].mean(dim=0) * family.pipe.config.strength
    ends = torch.stack([torch.zeros_like(generated), generated])
    free, adapter = plane.project(ends)
    there = generated * family.codec.token_mask(space.episode.class_mask)[0].cpu()  # the rest means nothing
    shown = torch.cat([trajectory, chains.flatten(0, 1), free[None], adapter[None]])
    names = ["free", "adapter", *(f"target {number}" for number in range(1, len(target_steps) + 1))]
    own = space.losses(torch.cat([ends, path[target_steps]])).tolist()
    return {
        "table": table,
        "classes": list(task.classes),
        "shots": shots,
        "trajectory": trajectory.tolist(),
        "targets": trajectory[target_steps].tolist(),
        "chains": chains.tolist(),
        "passages": space.passages(),
        "free": free.tolist(),
        "adapter": adapter.tolist(),
        "losses": dict(zip(names, own)),
        "adapter_in_plane": float((adapter - free).square().sum() / there.double().square().sum()),
        "grid": loss_grid(space, plane, shown, size),
        "variance_explained": plane.variance_explained,
    }


def accuracy_by_steps(
    family: Family,
    table: str,
    kind: str,
    tasks: list[Task],
    inference_steps: Sequence[int],
    gradient: GradientSettings,
    gradient_steps: Sequence[int],
    imprint_scale: float,
    num_candidates: int = 8,
    seed: int = 0,
) -> dict:
    """What steps of the sampler and steps of gradient descent are worth, on the same validation tasks.

    Args:
        family (`Family`): The generator, and its validation examples.
        table (`str`), kind (`str`): What the tasks are called.
        tasks (`list[Task]`): Validation tasks.
        inference_steps (`Sequence[int]`): Numbers of steps of the sampler; the pipeline's own is left as it was.
        gradient (`GradientSettings`): The rival's head and learning rate; its decay always ends with the last step.
        gradient_steps (`Sequence[int]`): Numbers of its steps.
        imprint_scale (`float`): The sharpness of heads that are imprinted on frozen features, see [`imprint_scale_for`].
        num_candidates (`int`, *optional*, defaults to 8): Draws that a generated adapter is the mean of.
        seed (`int`, *optional*, defaults to 0): Of the draws, the same for every number of steps, and of the rival.

    Returns:
        For JSON: `table`, `kind`, and the accuracies of all tasks: `frozen`, and by number of steps `generated` and
        `gradient`.
    """
    split, pipe, stacked = family.splits["validation"][0], family.pipe, family.stacked
    frozen = _features_of(stacked, family.frozen, split.examples, tasks, query=True)
    own, generated = pipe.config.num_inference_steps, {}
    try:
        for steps in inference_steps:
            pipe.register_to_config(num_inference_steps=steps)
            noise = torch.Generator().manual_seed(seed)
            generated[str(steps)] = generated_accuracies(
                pipe, split.examples, split.features, tasks, num_candidates=num_candidates, generator=noise
            )
    finally:
        pipe.register_to_config(num_inference_steps=own)
    trained = {
        str(steps): gradient_accuracies(
            stacked, split.examples, frozen, tasks, replace(gradient, steps=steps), imprint_scale, seed
        )
        for steps in gradient_steps
    }
    free = free_accuracies(stacked, frozen, imprint_scale, tasks)
    return {"table": table, "kind": kind, "frozen": free, "generated": generated, "gradient": trained}


def _features_of(
    stacked: StackedLora,
    tensors: dict[str, torch.Tensor],
    examples: EncodedExamples,
    tasks: list[Task],
    query: bool = False,
) -> torch.Tensor:
    """What the head reads under one adapter of the tasks' support and, if asked, query; zero for all other examples."""
    groups = [rows for task in tasks for rows in (*task.support, *(task.query if query else ()))]
    used = torch.tensor(sorted({row for rows in groups for row in rows}))
    features = torch.zeros(len(examples), stacked.layout.feature_dim, device=stacked.device)
    features[used] = stacked.features_of_all(tensors, examples, used)
    return features
