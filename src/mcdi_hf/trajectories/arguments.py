"""The settings of weight preparation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from ..utils.arguments import check_fields, check_positive, check_range, check_rates
from .collect import LR_SCHEDULERS, TrajectorySettings


@dataclass
class TrajectoryArguments:
    """The arguments of [`TrajectoryCollector`], for Python and for `parse_arguments`; `--help` explains each of them.

    Raises:
        `ValueError`: when a value is of another type, or makes no sense.

    Example: `TrajectoryArguments(output_dir="runs/mine", held_out_domains=["utility"])`
    """

    output_dir: Path = HfArg(help="where the shared start and the folder `trajectories` are written")
    # data and tasks
    train_domains: list[str] | None = HfArg(default=None, help="domains to train on; None: all that are not held out")
    held_out_domains: list[str] = HfArg(default_factory=list, help="the domains of validation and test tasks")
    exclude_texts_of: list[str] = HfArg(
        default_factory=list, help="data sets to test on; equal texts are taken out of the training rows"
    )
    rotations: bool = HfArg(default=False, help="images turned by 90, 180, 270 degrees: more classes")
    num_tasks: int = HfArg(default=300, help="tasks, a trajectory each")
    ways: list[int] = HfArg(default_factory=lambda: [2, 5], help="least and greatest number of classes")
    two_way_share: float = HfArg(default=0.5, help="of stacks with the least number of classes, beside an even draw")
    crossed_share: float = HfArg(default=0.0, help="of twins among 2-way tasks: the same texts under two attributes")
    shots: list[int] = HfArg(default_factory=lambda: [1, 16], help="least and greatest, that heads are made of")
    queries_per_class: int = HfArg(default=8, help="other examples, that adapters are judged on")
    examples_per_class: int = HfArg(default=100, help="the most that a trajectory's optimiser draws from")
    classes_per_task: int = HfArg(default=10, help="the most that it draws from; the ways of a step are fewer")
    num_views: int = HfArg(default=1, help="views of an example, all but the first augmented")
    # backbone and adapters
    pretrained_model_name_or_path: str = HfArg(
        default="sentence-transformers/all-MiniLM-L6-v2", help="the backbone: a Hub id or a folder"
    )
    base_model_name: str | None = HfArg(default=None, help="the name that adapters record it by; None: the same")
    pooling: Literal["mean", "default", "last_token"] | None = HfArg(
        default=None,
        help="what a head reads: default is the class of transformers, as it is; None: what suits the model",
    )
    max_length: int = HfArg(default=64, help="longer texts are cut to so many tokens")
    rank: int = HfArg(default=8, help="LoRA's r")
    lora_alpha: int = HfArg(default=16, help="LoRA's alpha; the update is scaled by alpha / r")
    target_modules: list[str] | None = HfArg(
        default=None,
        help="ends of the names of LoRA's modules in the layers; one with a dot, such as pooler.dense, stands outside, "
        "too; None: all linear ones, and those before the head",
    )
    layers: list[int] | None = HfArg(default=None, help="indices of the adapted layers; None: the upper third")
    cache_dir: Path | None = HfArg(default=None, help="keep what the frozen lower layers make here, not in memory")
    mixed_precision: Literal["no", "bf16"] = HfArg(default="no", help="bf16 runs the backbone in bfloat16")
    # shared start
    shared_steps: int = HfArg(default=1000, help="steps of the shared start")
    tasks_per_step: int = HfArg(default=8, help="tasks of a step, in one stack")
    own_share: float = HfArg(default=0.3, help="of its tasks that are seen through their source's own coefficients")
    proposed_share: float = HfArg(default=0.7, help="of its tasks that are seen through what a task encoder proposes")
    shared_learning_rate: float = HfArg(default=1e-3, help="AdamW's, for the shared start")
    validation_domains: list[str] | None = HfArg(
        default=None, help="held-out domains to choose the shared start on; None: its last step is taken"
    )
    validation_tasks: list[str] = HfArg(
        default_factory=lambda: ["2x5"],
        help="kinds: WAYSxSHOTS, GROUP:WAYSxSHOTS, SOURCE/*:WAYSxSHOTS, crossed:2xSHOTS",
    )
    num_validation_episodes: int = HfArg(default=40, help="validation tasks of each kind")
    validation_steps: int = HfArg(default=200, help="steps from one validation and checkpoint to the next")
    # trajectories
    learning_rate: float = HfArg(default=0.15, help="AdamW's, for the tasks' coefficients")
    adam_weight_decay: float = HfArg(default=0.0, help="AdamW's, for the tasks")
    lr_scheduler: Literal[*LR_SCHEDULERS] = HfArg(default="linear", help="a schedule of transformers")
    lr_warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises from 0")
    max_train_steps: int = HfArg(default=24, help="steps of a task's optimiser")
    num_targets: int = HfArg(default=3, help="local targets kept of a trajectory")
    sam_rho: float = HfArg(default=0.0, help="sharpness-aware minimisation's step; 0 is without")
    stack_size: int = HfArg(default=16, help="tasks that are optimised at once; more are no faster on a CPU")
    # run
    seed: int = HfArg(default=0, help="of everything that is drawn")
    push_to_hub: bool = HfArg(default=False, help="push the trajectories when they are whole; needs hub_dataset_id")
    hub_dataset_id: str | None = HfArg(default=None, help="the data set's repository, user/name")

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "num_tasks", "queries_per_class", "num_views", "rank", "stack_size", "tasks_per_step")
        check_positive(self, "shared_steps", "validation_steps", "num_validation_episodes")
        check_rates(self, "learning_rate", "shared_learning_rate")
        for name in ("ways", "shots"):
            check_range(name, getattr(self, name))
        if self.ways[0] < 2:
            raise ValueError(f"ways is {self.ways}: expected 2 classes or more, of which there is something to tell.")
        if self.examples_per_class < self.min_rows:
            raise ValueError(
                f"examples_per_class is {self.examples_per_class}: expected {self.min_rows} or more, the greatest of "
                "shots and queries_per_class together, which each step draws."
            )
        for name in ("two_way_share", "crossed_share", "own_share", "proposed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a share from 0 to 1.")
        if self.own_share + self.proposed_share > 1:
            raise ValueError(
                f"own_share {self.own_share} and proposed_share {self.proposed_share} are more than 1 together: lower one."
            )
        if self.crossed_share and (self.ways[0] != 2 or self.queries_per_class % 2):
            raise ValueError("crossed_share needs ways from 2 on and an even queries_per_class.")
        if unknown := sorted(set(self.validation_domains or []) - set(self.held_out_domains)):
            raise ValueError(f"validation_domains has {unknown}, which held_out_domains has not: hold them out, too.")
        if self.push_to_hub and not self.hub_dataset_id:
            raise ValueError("push_to_hub needs hub_dataset_id.")
        self.settings()  # refuses what is wrong with the optimiser's

    @property
    def min_rows(self) -> int:
        """The fewest rows that a class can have: its shots and its queries."""
        return self.shots[1] + self.queries_per_class

    def settings(self) -> TrajectorySettings:
        """How a task's adapter is optimised."""
        return TrajectorySettings(
            num_steps=self.max_train_steps,
            num_targets=self.num_targets,
            shots=tuple(self.shots),
            queries=self.queries_per_class,
            learning_rate=self.learning_rate,
            weight_decay=self.adam_weight_decay,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
            sam_rho=self.sam_rho,
            seed=self.seed,
            mixed_precision=self.mixed_precision,
        )
