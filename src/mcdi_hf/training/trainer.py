"""Meta-training of a generator on a trajectory data set, with REPTILE under Accelerate."""

import copy
import json
from enum import IntEnum
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, get_scheduler
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from ..backbones.frozen import FrozenBackbone
from ..data.augmentation import draw_views
from ..data.kinds import CROSSED
from ..data.sources import Source
from ..models.denoiser import MCDiDenoiser
from ..pipelines.pipeline_mcdi import MCDiPipeline
from ..schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from ..trajectories.folder import TrajectoryFolder
from ..utils.files import write_file
from ..utils.run_folder import hold_folder, latest_checkpoint, save_checkpoint
from .arguments import MCDiTrainingArguments
from .batches import TrajectoryBatches
from .diagnostics import diagnose
from .objective import OBJECTIVES, ConditionalDenoiser, local_consistency_loss
from .pipeline_card import pipeline_card
from .reptile import reptile_step
from .task_loss import TaskLoss
from .training_data import TrainingData
from .validation import Condition, generated_accuracies


LARGEST_NORM = 100  # times that of the true weights: nothing comes back from there


class Draw(IntEnum):
    """What a random stream is for. It comes first in the stream's seed: NumPy pads seeds with zeros behind."""

    TRAJECTORIES = 1
    INNER_STEP = 2
    SAMPLER_STEP = 3
    VIEWS = 4
    NOISE = 5
    DIAGNOSTICS = 6


class _Flow(DefaultFlowCallback):
    """Validates and saves every so many steps; whatever is logged is logged at every step."""

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        control.should_log = True
        control.should_evaluate |= state.global_step % state.eval_steps == 0 or state.global_step == state.max_steps
        control.should_save |= state.global_step % state.save_steps == 0


class _Progress:
    """What a checkpoint keeps beside weights: the step, the best validation, the curve, and what callbacks count."""

    def __init__(self, state: TrainerState, callbacks: list[TrainerCallback]) -> None:
        self.state = state
        self.callbacks = {type(one).__name__: one for one in callbacks if isinstance(one, ExportableState)}

    def state_dict(self) -> dict:
        kept = {name: getattr(self.state, name) for name in ("global_step", "best_metric", "log_history")}
        return kept | {"callbacks": {name: one.state()["attributes"] for name, one in self.callbacks.items()}}

    def load_state_dict(self, kept: dict) -> None:
        for name, callback in self.callbacks.items():
            vars(callback).update(kept["callbacks"].get(name, {}))
        vars(self.state).update({name: kept[name] for name in self.state_dict() if name != "callbacks"})


class MCDiTrainer:
    """Meta-trains a generator and saves the best one on validation tasks as a pipeline.

    Every draw depends on the seed and the step's number only: a run that was interrupted and resumed, or spread over
    several processes, gives the same generator.

    Args:
        args ([`MCDiTrainingArguments`]): The settings.
        trajectories (`str`, `Path` or [`TrajectoryFolder`], *optional*): In place of `args.trajectories`.
        sources (`list[Source]`, *optional*): Where the trajectories' data sets are now; by default as they record it.
        backbone ([`FrozenBackbone`], *optional*): A loaded one; by default it is loaded by its name.
        callbacks (`list[TrainerCallback]`, *optional*): As those of `transformers.Trainer`: they see every step, log,
            validation (with `metrics["eval_accuracy"]`) and checkpoint, on every process, and may stop the training.

    Attributes:
        accelerator (`Accelerator`): The run's.
        state (`TrainerState`): The step, the best accuracy, and the curve as `log_history`.
        pipe ([`MCDiPipeline`]): What is trained.

    Example: `MCDiTrainer(MCDiTrainingArguments(output_dir="runs/mine/generator"),
    "runs/mine/trajectories").train()`
    """

    def __init__(
        self,
        args: MCDiTrainingArguments,
        trajectories: str | Path | TrajectoryFolder | None = None,
        sources: list[Source] | None = None,
        backbone: FrozenBackbone | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.args = args
        self._latest = latest_checkpoint(args.output_dir / "checkpoints")
        if self._latest and not args.resume_from_checkpoint:
            raise OSError(
                f"{args.output_dir} holds checkpoints of an earlier run: go on with resume_from_checkpoint latest, or "
                "choose another output_dir."
            )
        place = (
            trajectories.folder if isinstance(trajectories, TrajectoryFolder) else trajectories or args.trajectories
        )
        if place is None:
            raise ValueError("There are no trajectories: give a folder or a Hub id, here or in the arguments.")
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=str(args.output_dir)
        )
        if args.task_loss_weight and args.task_loss_tasks < self.accelerator.num_processes:
            raise ValueError(f"task_loss_tasks is {args.task_loss_tasks}: expected one for each process at least.")
        self.data = TrainingData(args, str(place), sources, backbone, self.accelerator)
        if args.validation_domains is None:
            self.accelerator.print(f"The checkpoint is chosen on all that no trajectory is of: {self.data.domains}")
        self.pipe = build_pipeline(args, self.data).to(self.accelerator.device)
        if args.gradient_checkpointing:
            self.pipe.denoiser.enable_gradient_checkpointing()
        # evaluation_mode: no DDP, which would average the gradients of different tasks
        model = ConditionalDenoiser(self.pipe.task_encoder, self.pipe.denoiser)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False).train()
        outer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[args.outer_optimizer]
        optimizer = outer(self.model.parameters(), lr=args.learning_rate)
        # Accelerate's schedule steps once for each process.
        steps = [count * self.accelerator.num_processes for count in (args.lr_warmup_steps, args.max_train_steps)]
        schedule = get_scheduler(args.lr_scheduler, optimizer, *steps)
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, schedule)
        self.ema = EMAModel(self.model.parameters(), decay=args.ema_decay)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(args.num_inference_steps)
        self.task_loss = TaskLoss(self.data.stacked, self.pipe.codec, scheduler, self.data.train)
        with self.accelerator.autocast():
            drawn = self.data.description["tasks"]["ways"], args.shots, args.num_conditions
            self.batches = TrajectoryBatches(self.data, *drawn, args.train_batch_size, args.seed)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_train_steps,
            logging_steps=1,
            eval_steps=args.validation_steps,
            save_steps=args.checkpointing_steps,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        own = [_Flow(), *(callbacks or [])]
        self.callbacks = CallbackHandler(own, self.model, None, self.optimizer, self.schedule)
        self.accelerator.register_for_checkpointing(_Progress(self.state, self.callbacks.callbacks), self.ema)

    def train(self) -> Path:
        """Train to the end, or until a callback stops it, and return the folder of the best pipeline. To be called on
        every process.

        An `OSError` says that the output folder holds an earlier run that is not resumed, that another run writes
        to it, or that it cannot be written; a `FloatingPointError` that the training diverged.
        """
        args, folder = self.args, self.args.output_dir / "pipeline"
        with hold_folder(args.output_dir, self.accelerator):
            # A run that was killed before its first checkpoint has no latest one, and begins anew.
            checkpoint = self._latest if args.resume_from_checkpoint == "latest" else args.resume_from_checkpoint
            if checkpoint:
                self.accelerator.load_state(str(checkpoint))
            if args.report_to:
                self.accelerator.init_trackers("mcdi", config={key: str(value) for key, value in vars(args).items()})
            self._loop()
            if args.push_to_hub and self.accelerator.is_main_process:
                api = HfApi()
                api.create_repo(args.hub_model_id, exist_ok=True)
                # with the card, in whose place diffusers would push one of its own
                api.upload_folder(repo_id=args.hub_model_id, folder_path=folder, commit_message="Upload pipeline")
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.wait_for_everyone()
        return folder

    def _loop(self) -> None:
        args, state = self.args, self.state
        self._call("on_train_begin")
        if state.global_step == 0:
            self._note({"strength": 0.0} | self.validate(strength=0.0))
            self.keep_if_best()  # what the encoder proposes; training has to be better than that
        show = self.accelerator.is_main_process
        bar = tqdm(total=state.max_steps, initial=state.global_step, desc=args.objective, disable=not show)
        while state.global_step < state.max_steps and not self.control.should_training_stop:
            self._call("on_step_begin")
            inner, outer = self.outer_step()
            state.global_step += 1
            bar.update()
            self._call("on_step_end")
            if self.control.should_log:
                losses = {"weight loss": inner, "task loss": outer, "lr": self.schedule.get_last_lr()[0]}
                self.accelerator.log(losses, step=state.global_step)
                self._call("on_log", logs=losses)
            if self.control.should_evaluate or self.control.should_training_stop:
                self.keep_if_best()
            if self.control.should_save:
                save_checkpoint(
                    self.accelerator, args.output_dir / "checkpoints", state.global_step, args.checkpoints_total_limit
                )
                self._call("on_save")
            bar.set_postfix(weights=f"{inner:.4f}", task=f"{outer:.4f}", best=state.best_metric)
        bar.close()
        self._call("on_train_end")

    def outer_step(self) -> tuple[float, float]:
        """One REPTILE step on tasks that are the same on any number of processes: the weight loss and the task loss."""
        args, step, batches = self.args, self.state.global_step, self.batches
        random = np.random.default_rng((Draw.TRAJECTORIES, args.seed, step))
        order = random.choice(len(batches), args.tasks_per_step)

        def weight_loss(clone: torch.nn.Module, task: int, inner_step: int) -> torch.Tensor:
            random = np.random.default_rng((Draw.INNER_STEP, args.seed, step, task, inner_step))
            generator = torch.Generator().manual_seed(int(random.integers(2**62)))
            batch = batches.draw(int(order[task]), random).to(self.accelerator.device)
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
            self._own_task_loss if args.task_loss_weight else None,
        )
        self.schedule.step()
        self.ema.step(self.model.parameters())
        return found

    def validate(self, strength: float) -> dict[str, float]:
        """Mean accuracy on each kind of held-out tasks, generated without noise; the same with shuffled labels and with
        another task's condition; and `label_reading`, what shuffled labels cost on crossed kinds, whose tasks differ in
        nothing else. Strength 0 is the shared adapter, which sees no condition."""
        scores = {}
        for kind, tasks in self.data.validation.items():
            for condition in get_args(Condition) if strength else ("own",):
                name = kind if condition == "own" else f"{kind}, {condition}"
                settings = {"strength": strength, "temperature": 0.0}
                with self.accelerator.autocast():
                    found = generated_accuracies(self.pipe, self.data.held_out, tasks, condition, **settings)
                scores[name] = float(np.mean(found))
        crossed = [kind for kind in self.data.validation if kind.startswith(CROSSED)]
        if crossed and strength:
            costs = [scores[kind] - scores[f"{kind}, shuffled labels"] for kind in crossed]
            scores["label_reading"] = float(np.mean(costs))
        return scores

    def keep_if_best(self) -> None:
        """Validate the averaged weights at every strength, and save them as a pipeline if they are the best so far: by the
        mean accuracy of all kinds and half of what reading labels brings, see [`MCDiTrainer.validate`]."""
        args, state = self.args, self.state
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()
        random, batches = np.random.default_rng((Draw.DIAGNOSTICS, args.seed)), self.batches
        draws = [batches.draw(number, random).to(self.accelerator.device) for number in range(min(4, len(batches)))]
        diagnostics = diagnose(self.pipe, draws)
        found = {}
        for strength in args.strengths:
            scores = self.validate(strength)
            accuracy = float(np.mean([scores[kind] for kind in self.data.validation]))
            found[strength] = accuracy + scores.get("label_reading", 0.0) / 2, scores
            self._note({"strength": strength} | scores | diagnostics)
        points = dict(zip(args.strengths, state.log_history[-len(args.strengths) :]))
        best = max(found, key=lambda strength: found[strength][0])
        accuracy, scores = found[best]
        improved = state.best_metric is None or accuracy > state.best_metric
        points[best]["kept"] = improved
        if improved and self.accelerator.is_main_process:
            self.pipe.register_to_config(strength=best)
            self.pipe.save_pretrained(args.output_dir / "pipeline")
            self._write("curve.json", json.dumps(state.log_history, indent=1))
            card = pipeline_card(args.hub_model_id or "pipeline", args, self.data, state.log_history)
            self._write("pipeline/README.md", card.content)
        metrics = {"accuracy": accuracy, "strength": best} | scores | diagnostics
        self._call("on_evaluate", metrics={f"eval_{name}": value for name, value in metrics.items()})
        if improved:  # after the callbacks, which hold what was found against the best before
            state.best_metric = accuracy
        self.model.train()
        self.ema.restore(self.model.parameters())
        largest = {name: norm for name, norm in diagnostics.items() if not norm < LARGEST_NORM}
        if largest and state.global_step:  # before training they are those of the proposals
            raise FloatingPointError(
                f"Meta-training diverged at step {state.global_step}: {largest}. Lower the learning rates, or clip with "
                f"max_grad_norm; resume_from_checkpoint goes on from before."
            )

    def _call(self, event: str, **values) -> None:
        self.control = getattr(self.callbacks, event)(self.args, self.state, self.control, **values)

    def _note(self, found: dict[str, float]) -> None:
        """Print one point of the curve, hand it to the tracker, and write the curve anew."""
        step = self.state.global_step
        self.accelerator.log({f"{name}, strength {found['strength']}": one for name, one in found.items()}, step=step)
        self.state.log_history.append({"step": step} | {name: round(value, 4) for name, value in found.items()})
        if self.accelerator.is_main_process:
            tqdm.write(json.dumps(self.state.log_history[-1]))
            self._write("curve.json", json.dumps(self.state.log_history, indent=1))

    def _write(self, name: str, text: str) -> None:
        write_file(self.args.output_dir / name, lambda file: file.write(text.encode()))

    def _own_task_loss(self, model: torch.nn.Module) -> torch.Tensor:
        """This process's share of the weighted task loss on tasks that no step before had."""
        args, step, random = self.args, self.state.global_step, np.random.default_rng
        drawn = self.data.sampler.stack(step, args.task_loss_tasks)
        tasks, generators = [], []
        for number in range(self.accelerator.process_index, len(drawn), self.accelerator.num_processes):
            views, noise = (random((draw, args.seed, step, number)) for draw in (Draw.VIEWS, Draw.NOISE))
            tasks.append(draw_views(drawn[number], len(self.data.train), args.num_views, views))
            generators.append(torch.Generator().manual_seed(int(noise.integers(2**62))))
        steps = int(random((Draw.SAMPLER_STEP, args.seed, step)).integers(args.num_inference_steps))
        rise = min(1.0, (step + 1) / max(1, args.task_loss_warmup_steps))
        return args.task_loss_weight * rise * self.task_loss(model, tasks, steps, generators).sum() / len(drawn)


def build_pipeline(args: MCDiTrainingArguments, data: TrainingData) -> MCDiPipeline:
    """A pipeline with an untrained denoiser, which answers with what the task encoder proposes."""
    torch.manual_seed(args.seed)
    sizes = {"cond_dim": data.task_encoder.config.dim, "dim": args.dim, "num_layers": args.num_layers}
    residual = args.prediction_type == "sample"
    denoiser = MCDiDenoiser.from_layout(data.codec.layout, residual=residual, **sizes)
    segments = {"num_segments": data.description["settings"]["num_targets"]} | OBJECTIVES[args.objective]
    kept = ("num_train_timesteps", "prediction_type", "loss_weighting")
    scheduler = LocalConsistencyScheduler(**{name: getattr(args, name) for name in kept}, **segments)
    pipe = MCDiPipeline(
        denoiser,
        data.task_encoder,
        copy.deepcopy(data.codec),  # the batches are made on the CPU, wherever the pipeline is
        scheduler,
        **{name: getattr(args, name) for name in ("num_inference_steps", "support_views")},
        trained_ways=data.description["tasks"]["ways"],
        trained_shots=args.shots,
    )
    pipe.backbone = data.stacked.backbone
    pipe.set_progress_bar_config(disable=True)
    return pipe
