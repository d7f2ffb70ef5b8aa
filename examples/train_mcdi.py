"""Meta-train a generator on a trajectory data set, with REPTILE under Accelerate, and save it as a pipeline.

    accelerate launch examples/train_mcdi.py --config examples/configs/minilm_intents.json \
        --trajectories runs/trajectories/trajectories --dataset_name CLINC150 --output_dir runs/mcdi

Every draw depends on the seed and the step's number only. So a run that is interrupted and continued with
`--resume_from_checkpoint latest`, or spread over several processes, gives the same generator. The best generator on
tasks of the validation domains is kept in OUTPUT_DIR/pipeline, and what was measured on the way in
OUTPUT_DIR/curve.json: accuracy, the same with another task's condition, and the health of the network.
"""

import argparse
import copy
import json
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from data import write_whole
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from output_folder import hold_folder, latest_checkpoint, save_checkpoint
from tqdm.auto import tqdm
from train_arguments import arguments
from training_data import Data

from mcdi_hf import LocalConsistencyScheduler, MCDiDenoiser, MCDiPipeline, TaskEncoder
from mcdi_hf.training.validation import generated_accuracies
from mcdi_hf.training.diagnostics import health
from mcdi_hf.training.objective import OBJECTIVES, ConditionalDenoiser, local_consistency_loss
from mcdi_hf.training.reptile import reptile_step
from mcdi_hf.training.task_loss import TaskLoss
from mcdi_hf.data.augmentation import draw_views


LARGEST_NORM = 100  # times that of the true weights: nothing comes back from there


class Draw(IntEnum):
    """What a random stream is for. It comes first in the stream's seed: NumPy pads seeds with zeros behind."""

    TRAJECTORIES = 1
    INNER_STEP = 2
    SAMPLER_STEP = 3
    VIEWS = 4
    NOISE = 5
    HEALTH = 6


class Progress:
    """The position of the run, the best validation so far, and the curve up to it; kept with every checkpoint."""

    def __init__(self) -> None:
        self.step, self.best, self.curve = 0, -1.0, []

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


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
    pipe = MCDiPipeline(
        denoiser,
        task_encoder,
        codec,
        scheduler,
        num_inference_steps=args.num_inference_steps,
        imprint_from=args.imprint_from,
        support_views=args.support_views,
        trained_ways=data.description["tasks"]["ways"],
        trained_shots=args.shots,
    )
    pipe.backbone = data.stacked.backbone
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Run:
    """Meta-training, with all that a checkpoint must hold.

    Args:
        args (`argparse.Namespace`): Those of the script.
        data (`Data`, *optional*): That of an earlier run on the same trajectories; it is loaded without.
    """

    def __init__(self, args: argparse.Namespace, data: Data | None = None) -> None:
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=str(args.output_dir)
        )
        self.lock = hold_folder(args.output_dir, self.accelerator)
        self.checkpoints = args.output_dir / "checkpoints"
        if args.task_loss_weight and args.task_loss_tasks < self.accelerator.num_processes:
            raise ValueError(f"--task_loss_tasks {args.task_loss_tasks} leaves a process without a task.")
        self.data = Data(args, self.accelerator.device) if data is None else data
        self.tasks = self.data.fresh_tasks(tuple(args.shots), args.queries_per_class, args.seed + 3)
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
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(args.num_inference_steps)
        self.task_loss = TaskLoss(
            self.data.stacked,
            self.pipe.codec,
            scheduler,
            self.data.train.examples,
            self.data.train.features,
            args.imprint_from,
            self.data.batches.noise,
        )

    def resume(self, checkpoint: str) -> None:
        """Go on from a checkpoint's folder, or from the `"latest"`; a run that was killed before its first has none."""
        folder = latest_checkpoint(self.checkpoints) if checkpoint == "latest" else Path(checkpoint)
        if folder is not None:
            self.accelerator.load_state(str(folder))

    def train(self) -> None:
        args, progress = self.args, self.progress
        if progress.step == 0:
            self.report({"strength": 0.0} | self.validate(strength=0.0))
        bar = tqdm(
            total=args.max_train_steps,
            initial=progress.step,
            desc=args.objective,
            disable=not self.accelerator.is_main_process,
        )
        while progress.step < args.max_train_steps:
            inner, outer = self.outer_step()
            progress.step += 1
            bar.update()
            bar.set_postfix(weights=f"{inner:.4f}", task=f"{outer:.4f}", best=f"{progress.best:.4f}")
            losses = {"weight loss": inner, "task loss": outer, "lr": self.schedule.get_last_lr()[0]}
            self.accelerator.log(losses, step=progress.step)
            if progress.step % args.validation_steps == 0 or progress.step == args.max_train_steps:
                self.keep_if_best()
            if progress.step % args.checkpointing_steps == 0:
                number = progress.step // args.checkpointing_steps - 1
                save_checkpoint(self.accelerator, self.checkpoints, number, args.checkpoints_total_limit)
        bar.close()
        self.lock.release()

    def outer_step(self) -> tuple[float, float]:
        """One REPTILE step on tasks that are the same on any number of processes."""
        args, step = self.args, self.progress.step
        order = np.random.default_rng((Draw.TRAJECTORIES, args.seed, step)).choice(
            len(self.data.batches), args.tasks_per_step
        )

        def weight_loss(clone: torch.nn.Module, task: int, inner_step: int) -> torch.Tensor:
            random = np.random.default_rng((Draw.INNER_STEP, args.seed, step, task, inner_step))
            generator = torch.Generator().manual_seed(int(random.integers(2**62)))
            batch = self.data.batches.draw(int(order[task]), random).to(self.accelerator.device)
            return local_consistency_loss(clone, self.pipe.scheduler, batch, generator, args.segment_weights)

        found = reptile_step(
            self.accelerator,
            self.model,
            self.optimizer,
            args.tasks_per_step,
            weight_loss,
            args.inner_steps,
            args.inner_learning_rate,
            args.max_grad_norm,
            self.fresh_tasks if args.task_loss_weight else None,
        )
        self.schedule.step()
        self.ema.step(self.model.parameters())
        return found

    def fresh_tasks(self, model: torch.nn.Module) -> torch.Tensor:
        """This process's share of the weighted task loss on tasks that no step before had."""
        args, step, count = self.args, self.progress.step, self.args.task_loss_tasks
        own = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        examples, random = self.data.train.examples, np.random.default_rng
        tasks = [
            draw_views(
                self.tasks[step * count + number],
                len(examples),
                args.num_views,
                random((Draw.VIEWS, args.seed, step, number)),
            )
            for number in own
        ]
        seeds = [random((Draw.NOISE, args.seed, step, number)).integers(2**62) for number in own]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        steps = int(random((Draw.SAMPLER_STEP, args.seed, step)).integers(args.num_inference_steps))
        rise = min(1.0, (step + 1) / max(1, args.task_loss_warmup_steps))
        return args.task_loss_weight * rise * self.task_loss(model, tasks, steps, generators).sum() / count

    def validate(self, strength: float) -> dict[str, float]:
        """Mean accuracy on each kind of held-out tasks, generated without noise, and with another task's condition;
        strength 0 is what is free, and sees no condition."""
        scores = {}
        for kind, tasks in self.data.validation.items():
            ways = {kind: None} | ({f"{kind}, shuffled": [*tasks[1:], tasks[0]]} if strength else {})
            for name, conditions in ways.items():
                found = generated_accuracies(
                    self.pipe,
                    self.data.held_out.examples,
                    self.data.held_out.features,
                    tasks,
                    conditions,
                    strength=strength,
                    temperature=0.0,
                )
                scores[name] = float(np.mean(found))
        return scores

    def keep_if_best(self) -> None:
        """Validate the averaged weights, and save them as a pipeline if they are the best so far."""
        progress = self.progress
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        random = np.random.default_rng((Draw.HEALTH, self.args.seed))
        batches = [
            self.data.batches.draw(number, random).to(self.accelerator.device)
            for number in range(min(4, len(self.data.batches)))
        ]
        state = health(self.pipe, batches)
        for strength in self.args.strengths:
            scores = self.validate(strength)
            mean = float(np.mean([scores[kind] for kind in self.data.validation]))
            self.report({"strength": strength} | scores | state)
            if mean > progress.best and self.accelerator.is_main_process:
                self.pipe.register_to_config(strength=strength)
                write_whole(self.args.output_dir / "pipeline", self.pipe.save_pretrained)
            progress.best = max(progress.best, mean)
        self.model.train()
        self.ema.restore(self.model.parameters())
        if largest := {name: norm for name, norm in state.items() if not norm < LARGEST_NORM}:
            raise FloatingPointError(
                f"Meta-training diverged at step {progress.step}: {largest}. Lower the learning rates, or clip with "
                f"--max_grad_norm; --resume_from_checkpoint goes on from before."
            )

    def report(self, found: dict[str, float]) -> None:
        """Print one point of the curve, hand it to the tracker, and write the curve anew."""
        step = self.progress.step
        self.accelerator.log({f"{name}, strength {found['strength']}": one for name, one in found.items()}, step=step)
        self.progress.curve.append({"step": step} | {name: round(value, 4) for name, value in found.items()})
        if self.accelerator.is_main_process:
            tqdm.write(json.dumps(self.progress.curve[-1]))
            text = json.dumps(self.progress.curve, indent=1)
            write_whole(self.args.output_dir / "curve.json", lambda path: path.write_text(text))


def train(args: argparse.Namespace) -> None:
    if not args.resume_from_checkpoint and latest_checkpoint(args.output_dir / "checkpoints"):
        raise OSError(
            f"{args.output_dir} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, or "
            "choose another --output_dir."
        )
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


def main() -> None:
    args = arguments(__doc__)
    try:
        train(args)
    except OSError as error:  # a disk that is full or a folder that cannot be written is no bug of ours
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
