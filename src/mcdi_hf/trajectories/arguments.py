"""The settings of weight preparation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from ..utils.arguments import check_fields, check_positive, check_range
from .collect import LR_SCHEDULERS, TrajectorySettings


@dataclass
class TrajectoryArguments:
    """The arguments of [`TrajectoryCollector`], for Python and for `parse_arguments`; `--help` explains each of them.

    Raises:
        `ValueError`: when a value is of another type, or makes no sense.
    """

    output_dir: Path = HfArg(help="where the shared start and the folder `trajectories` are written")
    # data and tasks
    train_domains: list[str] | None = HfArg(default=None, help="domains to train on; None: all that are not held out")
    held_out_domains: list[str] = HfArg(default_factory=list, help="the domains of validation and test tasks")
    rotations: bool = HfArg(default=False, help="images turned by 90, 180, 270 degrees: more classes")
    query_split: str | None = HfArg(default=None, help="where tasks are judged; None: rows that their support leaves")
    num_tasks: int = HfArg(default=300, help="tasks, a trajectory each")
    ways: list[int] = HfArg(default_factory=lambda: [5, 15], help="least and greatest number of classes")
    examples_per_class: list[int] = HfArg(default_factory=lambda: [100, 100], help="least and greatest, to train on")
    queries_per_class: int = HfArg(default=10, help="examples that an adapter is judged on")
    num_views: int = HfArg(default=1, help="views of an example, all but the first augmented")
    # backbone and adapters
    pretrained_model_name_or_path: str = HfArg(
        default="sentence-transformers/all-MiniLM-L6-v2", help="the backbone: a Hub id or a folder"
    )
    base_model_name: str | None = HfArg(default=None, help="the name that adapters record it by; None: the same")
    pooling: Literal["mean", "default", "last_token"] = HfArg(default="mean", help="what a head reads")
    max_length: int = HfArg(default=64, help="longer texts are cut to so many tokens")
    rank: int = HfArg(default=4, help="LoRA's r")
    lora_alpha: int = HfArg(default=4, help="LoRA's alpha; the update is scaled by alpha / r")
    target_modules: list[str] = HfArg(default_factory=lambda: ["query", "value"], help="LoRA's modules")
    layers: list[int] = HfArg(default_factory=lambda: [4, 5], help="indices of the adapted layers")
    token_dim: int = HfArg(default=768, help="width of a weight token")
    cache_dir: Path | None = HfArg(default=None, help="keep what the frozen lower layers make here, not in memory")
    # optimiser
    shared_steps: int = HfArg(default=200, help="episodes that the shared start is trained on")
    shared_shots: list[int] = HfArg(default_factory=lambda: [1, 5], help="examples a class of their support")
    shared_learning_rate: float = HfArg(default=1e-3, help="Adam's, for the shared start")
    train_batch_size: int = HfArg(default=16, help="examples a task and a step")
    learning_rate: float = HfArg(default=1e-3, help="AdamW's, for the tasks")
    adam_weight_decay: float = HfArg(default=0.0, help="AdamW's, for the tasks")
    lr_scheduler: Literal[*LR_SCHEDULERS] = HfArg(default="linear", help="a schedule of transformers")
    lr_warmup_steps: int = HfArg(default=0, help="steps in which the learning rate rises from 0")
    max_train_steps: int = HfArg(default=24, help="steps of a task's optimiser")
    num_targets: int = HfArg(default=3, help="local targets kept of a trajectory")
    sam_rho: float = HfArg(default=0.0, help="sharpness-aware minimisation's step; 0 is without")
    # run
    memory_budget: float = HfArg(default=0.5, help="GiB that a stack of tasks may take")
    max_stack_size: int = HfArg(default=16, help="more tasks at once are no faster on a CPU")
    seed: int = HfArg(default=0, help="of everything that is drawn")
    push_to_hub: bool = HfArg(default=False, help="push the trajectories when they are whole; needs hub_dataset_id")
    hub_dataset_id: str | None = HfArg(default=None, help="the data set's repository, user/name")

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(
            self, "num_tasks", "queries_per_class", "num_views", "rank", "train_batch_size", "max_stack_size"
        )
        for name in ("ways", "examples_per_class", "shared_shots"):
            check_range(name, getattr(self, name))
        if self.push_to_hub and not self.hub_dataset_id:
            raise ValueError("push_to_hub needs hub_dataset_id.")
        self.settings(imprint_scale=10.0)  # refuses what is wrong with the optimiser's

    def settings(self, imprint_scale: float) -> TrajectorySettings:
        """How a task's adapter is optimised, from a head of this sharpness."""
        return TrajectorySettings(
            num_steps=self.max_train_steps,
            num_targets=self.num_targets,
            batch_size=self.train_batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.adam_weight_decay,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
            sam_rho=self.sam_rho,
            imprint_scale=imprint_scale,
            seed=self.seed,
        )
