"""The methods of the benchmark, in the order of its tables."""

from .base import GROUPS, Method
from .controls import NoisedNearest
from .frozen import Frozen
from .gradient_lora import GradientLora, LoraOnAllData, TimedLora
from .logistic import Logistic, MeanPooledLogistic
from .lorahub import LoraHub
from .mcdi import (
    Generated,
    NoiseCondition,
    OtherAttribute,
    OtherTask,
    Proposed,
    Refined,
    Selected,
    ShuffledLabels,
)
from .metric import LearntMetric
from .nearest import MeanAdapter, NearestAdapter
from .setfit import SetFit
from .shared_adapter import EqualShared, SharedAdapter


__all__ = ["GROUPS", "MAIN", "METHODS", "NOISED", "Method"]

MAIN = Generated("Mc-Di", "local consistency diffusion, the mean of eight draws")
NOISED = NoisedNearest(
    "nearest training adapter + noise", "noise around the nearest training adapter, as much as validation liked best"
)
METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Frozen("frozen + closed-form head", "the backbone as it is, its head by ridge regression on the examples"),
        Logistic(
            "frozen + logistic regression",
            "logistic regression on the same features, scaled by the validation examples",
        ),
        MeanPooledLogistic(
            "frozen, mean-pooled + logistic regression",
            "logistic regression on the mean of the tokens, where the backbone's own class reads CLS; texts only",
        ),
        LearntMetric(
            "learnt metric on frozen features",
            "one matrix on the same features, learnt on the training tasks, with the head in closed form",
        ),
        SharedAdapter(
            "shared adapter", "what the generator starts from, at strength 0, a head made for each test task"
        ),
        EqualShared(
            "equal shared adapter",
            "one adapter for all tasks, with the data, steps, matrices, rank and head of the generator's shared start",
        ),
        MeanAdapter("mean training adapter", "the mean of all training adapters"),
        NearestAdapter(
            "nearest training adapter", "the training adapter whose examples lie nearest to the test task's"
        ),
        LoraHub(
            "mix of training adapters (LoraHub)",
            "a weighted sum of training adapters, the weights searched without gradients on the task's examples",
        ),
        GradientLora("gradient LoRA", "LoRA trained on the task's examples, from PEFT's own start"),
        GradientLora(
            "gradient LoRA, REPTILE start",
            "LoRA trained on the task's examples, from a start that REPTILE made",
            "reptile",
        ),
        GradientLora(
            "gradient LoRA, shared start",
            "LoRA trained on the task's examples, from the equal shared adapter",
            "shared",
        ),
        TimedLora("gradient LoRA, equal time", "as many steps as fit into the time of one generation"),
        TimedLora("gradient LoRA, shared start, equal time", "as many steps from the equal shared adapter", "shared"),
        SetFit("SetFit", "the library, fine-tuning the same encoder, with its documented defaults; texts only"),
        LoraOnAllData(
            "LoRA on all data", "LoRA trained on what no other method may see: many more examples of the classes"
        ),
        Proposed(
            "hypernetwork", "what the task encoder proposes in one pass, trained with the shared start, no diffusion"
        ),
        Generated("single level (OCD)", "Mv-Di without the inner loop of meta-training", "single level (OCD)"),
        Generated("Mv-Di", "vanilla diffusion: only the last adapter of each trajectory is a target", "Mv-Di"),
        Generated("Tw-Di", "every adapter of a trajectory is treated as if it were the last", "Tw-Di"),
        MAIN,
        Selected("Mc-Di, chosen", "one of eight draws, their mean or what is free, by cross-validation on the shots"),
        Refined("Mc-Di, refined", "the mean of eight draws, then five gradient steps on the task's examples"),
        OtherTask("Mc-Di, another task's condition", "shown the examples of another test task"),
        OtherAttribute("Mc-Di, another attribute's condition", "shown the examples of a task about something else"),
        ShuffledLabels("Mc-Di, shuffled labels", "shown the examples with their labels shuffled"),
        NoiseCondition("Mc-Di, a condition of noise", "shown random inputs instead of examples"),
        NOISED,
    ]
}
