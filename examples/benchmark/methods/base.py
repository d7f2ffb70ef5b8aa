"""What a method of the benchmark is."""

from dataclasses import dataclass
from typing import Any, ClassVar

from fold import Fold
from splits import Sizes, Split

from mcdi_hf import Task


GROUPS = ("baselines", "ceiling", "generated", "controls")


@dataclass(frozen=True)
class Method:
    """A method that makes a classifier of each task's support. It keeps nothing: what it trains is its fold's.

    Attributes:
        name (`str`): What it is called in tables and results.
        about (`str`): What it is, in a line.
        group (`str`): One of `GROUPS`.
        needs_training (`bool`): Whether it learns from the generator's training tasks, which a pipeline without
            trajectories cannot show.
        reads_encoded (`bool`): Whether it starts from what the frozen lower layers make of the examples.
    """

    name: str
    about: str
    group: ClassVar[str] = "baselines"
    needs_training: ClassVar[bool] = False
    reads_encoded: ClassVar[bool] = True

    def fits(self, fold: Fold, seed: int) -> bool:
        """Whether the method can do anything with a fold's generators of a seed."""
        return not self.needs_training or fold.generator.trajectories is not None

    def episodes(self, sizes: Sizes, task: Task) -> int:
        """How many test tasks it is judged on, the first of all; `task` is one of them."""
        return sizes.episodes

    def settings(self, split: Split, fold: Fold, shots: int) -> list[Any]:
        """What validation chooses among for tasks of so many shots: at most four JSON values, or none."""
        return []

    def accuracies(self, split: Split, fold: Fold, tasks: list[Task], seed: int, setting: Any) -> list[float]:
        """The share of right answers on the query of each task.

        Args:
            split (`Split`): Where the tasks' examples are.
            fold (`Fold`): The generators, and all that is trained beside them.
            tasks (`list[Task]`): Tasks of as many classes and shots each.
            seed (`int`): Of the generators, and of all that is drawn.
            setting: What validation chose among [`Method.settings`], if there are any.
        """
        raise NotImplementedError


class SlowMethod(Method):
    """A method that trains for each task: it sees the first test tasks only, fewer where a task has many examples."""

    def episodes(self, sizes: Sizes, task: Task) -> int:
        slow, examples = sizes.slow_episodes, sum(map(len, task.support))
        return min(sizes.episodes, max(min(4, slow), min(slow, 200 // examples)))
