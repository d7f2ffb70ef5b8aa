"""The settings of meta-training."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from ..trajectories.collect import LR_SCHEDULERS
from ..utils.arguments import check_fields, check_positive, check_range, check_rates


@dataclass
class MCDiTrainingArguments:
    """The arguments of [`MCDiTrainer`], for Python and for `parse_arguments`; `--help` explains each of them.

    Raises:
        `ValueError`: when a value is of another type, or contradicts another one.

    Example: `MCDiTrainingArguments(output_dir="runs/mine/generator", task_loss_weight=10.0)`
    """

    # What callbacks made for `transformers.Trainer` ask for, such as its EarlyStoppingCallback.
    metric_for_best_model: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    load_best_model_at_end: ClassVar[bool] = True
    eval_strategy: ClassVar[str] = "steps"

    output_dir: Path = HfArg(help="where the pipeline, curve.json and checkpoints are written")
    # data
    trajectories: str | None = HfArg(default=None, help="a folder or Hub id that TrajectoryCollector made")
    dataset_name: str | None = HfArg(default=None, help="the trajectories' one data set, if it was moved since")
    pretrained_model_name_or_path: str | None = HfArg(
        default=None, help="the backbone, if it does not lie under the name that the trajectories record"
    )
    cache_dir: Path | None = HfArg(default=None, help="keep what the frozen lower layers make here, not in memory")
    shots: list[int] = HfArg(default_factory=lambda: [1, 16], help="least and greatest number in a condition")
    num_conditions: int = HfArg(default=8, help="support sets that are seen of each trajectory, once")
    num_views: int = HfArg(default=1, help="views of an example in fresh tasks, all but one augmented")
    support_views: int = HfArg(default=1, help="see MCDiPipeline")
    # the generator
    objective: Literal["mc", "mv", "tw"] = HfArg(default="mc", help="Mc-Di, or the paper's ablations Mv-Di and Tw-Di")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = HfArg(default="sample", help="of the scheduler")
    loss_weighting: Literal["local", "unit"] = HfArg(default="unit", help="of the scheduler")
    segment_weights: list[float] | None = HfArg(default=None, help="weights of the segments' losses; None: all 1")
    num_train_timesteps: int = HfArg(default=20, help="of the scheduler")
    num_inference_steps: int = HfArg(default=4, help="the pipeline's default")
    dim: int = HfArg(default=128, help="width of the denoiser")
    num_layers: int = HfArg(default=3, help="of the denoiser")
    # inner loop
    tasks_per_step: int = HfArg(default=4, help="trajectories; 0 for the task loss alone")
    train_batch_size: int = HfArg(default=8, help="draws of an inner step")
    inner_steps: int = HfArg(default=3, help="1 trains on a single level, as OCD does")
    inner_learning_rate: float = HfArg(default=0.005, help="SGD's, the paper's eta")
    # task loss
    task_loss_weight: float = HfArg(default=0.0, help="beside the loss on weights; 0 is without")
    task_loss_warmup_steps: int = HfArg(default=0, help="steps in which the weight rises from 0")
    task_loss_tasks: int = HfArg(default=4, help="fresh tasks a step, in one stack")
    queries_per_class: int = HfArg(default=8, help="examples that a fresh task is judged on")
    # outer loop
    outer_optimizer: Literal["sgd", "adam"] = HfArg(default="adam", help="takes REPTILE's difference as a gradient")
    learning_rate: float = HfArg(default=1e-3, help="the outer one, the paper's zeta")
    lr_scheduler: Literal[*LR_SCHEDULERS] = HfArg(default="cosine", help="a schedule of transformers")
    lr_warmup_steps: int = HfArg(default=50, help="steps in which the learning rate rises from 0")
    max_grad_norm: float | None = HfArg(default=None, help="clip the outer gradient to this norm; None: do not")
    max_train_steps: int = HfArg(default=600, help="outer steps")
    ema_decay: float = HfArg(default=0.99, help="of the averaged weights, which are validated and saved")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = HfArg(default="no", help="Accelerate's")
    seed: int = HfArg(default=0, help="of everything that is drawn")
    # validation
    validation_domains: list[str] | None = HfArg(
        default=None, help="domains to choose the checkpoint on; None: all that no trajectory is of, test domains too"
    )
    validation_steps: int = HfArg(default=100, help="steps from one validation to the next")
    num_validation_episodes: int = HfArg(default=60, help="validation tasks of each kind")
    validation_queries: int = HfArg(default=15, help="examples a class that they are judged on")
    validation_tasks: list[str] = HfArg(
        default_factory=lambda: ["2x1", "2x5"],
        help="kinds: WAYSxSHOTS, GROUP:WAYSxSHOTS, SOURCE/*:WAYSxSHOTS, crossed:2xSHOTS",
    )
    strengths: list[float] = HfArg(default_factory=lambda: [1.0], help="to choose from on validation")
    # output
    report_to: str | None = HfArg(default=None, help="a tracker that Accelerate knows, such as tensorboard")
    checkpointing_steps: int = HfArg(default=100, help="steps from one checkpoint to the next")
    checkpoints_total_limit: int | None = HfArg(default=2, help="how many to keep; None: all")
    resume_from_checkpoint: str | None = HfArg(default=None, help="a checkpoint's folder, or `latest`")
    push_to_hub: bool = HfArg(default=False, help="push the best pipeline at the end; needs hub_model_id")
    hub_model_id: str | None = HfArg(default=None, help="the pipeline's repository, user/name")

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("shots", self.shots)
        check_rates(self, "learning_rate", "inner_learning_rate")
        check_positive(self, "inner_steps", "max_train_steps", "validation_steps", "checkpointing_steps", "num_views")
        check_positive(self, "support_views", "train_batch_size", "queries_per_class", "num_inference_steps")
        check_positive(self, "num_validation_episodes", "validation_queries", "dim", "num_layers", "num_conditions")
        if not self.strengths or not self.validation_tasks:
            raise ValueError("strengths or validation_tasks is empty: expected something to choose the checkpoint by.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id.")
        if not self.tasks_per_step and not self.task_loss_weight:
            raise ValueError("tasks_per_step 0 leaves the task loss alone, but task_loss_weight is 0.")
