"""mcdi_hf: LoRA adapters without training, by local consistency diffusion."""

import diffusers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  (diffusers looks the base classes up in this namespace)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .adapters.codec import AdapterCodec
from .adapters.generated import GeneratedAdapter
from .adapters.layout import AdapterLayout
from .adapters.mixed import MixedAdapters, MixedAdaptersOutput
from .adapters.slot import AdapterSlot
from .adapters.stacked import StackedLora
from .backbones import FrozenBackbone
from .models.denoiser import MCDiDenoiser
from .models.mean_pooled import MeanPooledConfig, MeanPooledForSequenceClassification
from .models.task_encoder import TaskEncoder
from .pipelines.pipeline_mcdi import MCDiPipeline
from .pipelines.pipeline_output import MCDiPipelineOutput
from .schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .tasks import EpisodeSampler, LabelledRows, Task, rotate_classes
from .trajectories.collect import TrajectorySettings, collect_trajectories
from .trajectories.dataset import load_trajectories
from .trajectories.description import package_versions
from .trajectories.folder import TrajectoryFolder, append_trajectories
from .trajectories.shared import train_shared_adapter


__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterCodec",
    "AdapterLayout",
    "AdapterSlot",
    "EpisodeSampler",
    "FrozenBackbone",
    "GeneratedAdapter",
    "LabelledRows",
    "LocalConsistencyScheduler",
    "MCDiDenoiser",
    "MCDiPipeline",
    "MCDiPipelineOutput",
    "MeanPooledConfig",
    "MeanPooledForSequenceClassification",
    "MixedAdapters",
    "MixedAdaptersOutput",
    "StackedLora",
    "Task",
    "TaskEncoder",
    "TrajectoryFolder",
    "TrajectorySettings",
    "append_trajectories",
    "collect_trajectories",
    "load_trajectories",
    "package_versions",
    "rotate_classes",
    "train_shared_adapter",
]

# Saved pipelines then name their components as ["mcdi_hf", "MCDiDenoiser"], whatever file the class lives in, and load
# from the Hub; `DiffusionPipeline.from_pretrained` finds the pipeline, and `scheduler.compatibles` the scheduler.
LOADABLE_CLASSES["mcdi_hf"] = LOADABLE_CLASSES["diffusers"]
diffusers.MCDiPipeline = MCDiPipeline
diffusers.LocalConsistencyScheduler = LocalConsistencyScheduler
