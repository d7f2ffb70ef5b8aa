"""mcdi_hf: LoRA adapters without training, by local consistency diffusion."""

# diffusers looks the base classes of components up in this namespace.
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401

from ._registration import register
from .adapters.codec import AdapterCodec
from .adapters.generated import GeneratedAdapter, GenerationDetails
from .adapters.layout import AdapterLayout
from .adapters.stacked import StackedLora
from .backbones.frozen import FrozenBackbone
from .backbones.mean_pooled import MeanPooledConfig, MeanPooledForSequenceClassification
from .data.episodes import SupportBatch
from .data.sources import Source, read_mixture
from .data.tasks import EpisodeSampler, LabelledRows, Task, rotate_classes
from .models.denoiser import MCDiDenoiser
from .models.task_encoder import TaskEncoder
from .pipelines.pipeline_mcdi import MCDiPipeline
from .pipelines.pipeline_output import MCDiPipelineOutput
from .schedulers.scheduling_local_consistency import LocalConsistencyScheduler
from .serving.mixed import MixedAdapters, MixedAdaptersOutput
from .serving.slot import AdapterSlot
from .training.arguments import MCDiTrainingArguments
from .training.trainer import MCDiTrainer
from .trajectories.arguments import TrajectoryArguments
from .trajectories.collect import TrajectorySettings, collect_trajectories
from .trajectories.collector import TrajectoryCollector
from .trajectories.dataset import load_trajectories
from .trajectories.folder import TrajectoryFolder
from .trajectories.shared import train_shared_adapter


__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterCodec",
    "AdapterLayout",
    "AdapterSlot",
    "EpisodeSampler",
    "FrozenBackbone",
    "GeneratedAdapter",
    "GenerationDetails",
    "LabelledRows",
    "LocalConsistencyScheduler",
    "MCDiDenoiser",
    "MCDiPipeline",
    "MCDiPipelineOutput",
    "MCDiTrainer",
    "MCDiTrainingArguments",
    "MeanPooledConfig",
    "MeanPooledForSequenceClassification",
    "MixedAdapters",
    "MixedAdaptersOutput",
    "Source",
    "StackedLora",
    "SupportBatch",
    "Task",
    "TaskEncoder",
    "TrajectoryArguments",
    "TrajectoryCollector",
    "TrajectoryFolder",
    "TrajectorySettings",
    "collect_trajectories",
    "load_trajectories",
    "read_mixture",
    "rotate_classes",
    "train_shared_adapter",
]

register(MCDiPipeline, LocalConsistencyScheduler)
