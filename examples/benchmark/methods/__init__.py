"""The methods of the benchmark, in the order of its tables."""

from .base import GROUPS, Method
from .controls import GaussianSample, NoisedNearest
from .gradient_lora import GradientLora, LoraOnAllData, TimedLora
from .imprinted import Frozen
from .logistic import Logistic
from .lorahub import LoraHub
from .mcdi import Generated, NoiseCondition, OtherTask, Refined, Selected, ShuffledLabels
from .mean_adapter import MeanAdapter
from .nearest import NearestAdapter
from .reptile_start import AdapterReptile
from .setfit import SetFit
from .shared_adapter import SharedAdapter


__all__ = ["GROUPS", "MAIN", "METHODS", "NOISED", "Method"]

MAIN = Generated("Mc-Di", "local consistency diffusion, the mean of eight draws")
NOISED = NoisedNearest(
    "nearest training adapter + noise", "noise around the nearest training adapter, as much as validation liked best"
)
METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Frozen(
            "frozen + imprinted head", "the backbone as it is, its head made of the means of the classes' examples"
        ),
        Logistic(
            "frozen + logistic regression",
            "logistic regression on the same features, scaled by the validation examples (at commit 04766b0 by the test "
            "examples, queries included)",
        ),
        SharedAdapter(
            "one shared adapter",
            "one adapter trained on all training tasks, as long as the generators' shared start was (at commit 04766b0 60 "
            "to 100 steps), a head made for each test task",
        ),
        MeanAdapter(
            "mean of the training adapters", "the mean of all training adapters, a head made for each test task"
        ),
        NearestAdapter(
            "nearest training adapter", "the training adapter whose examples lie nearest to the test task's"
        ),
        LoraHub(
            "mix of training adapters (LoraHub)",
            "a weighted sum of training adapters, the weights searched without gradients on the task's examples",
        ),
        AdapterReptile(
            "REPTILE start + gradient steps",
            "a start meta-learned on the training tasks, then gradient steps on the task's examples",
        ),
        GradientLora("gradient LoRA, equal shots", "LoRA trained on the task's examples"),
        TimedLora("gradient LoRA, equal time", "the same, for as many steps as fit into the time of one generation"),
        SetFit("SetFit", "the library, on the same encoder, with its documented defaults; texts only"),
        LoraOnAllData(
            "LoRA on all data", "LoRA trained on what no other method may see: many more examples of the classes"
        ),
        Generated("single level (OCD)", "Mv-Di without the inner loop of meta-training", "single level (OCD)"),
        Generated("Mv-Di", "vanilla diffusion: only the last adapter of each trajectory is a target", "Mv-Di"),
        Generated("Tw-Di", "every adapter of a trajectory is treated as if it were the last", "Tw-Di"),
        Generated("Mc-Di, one draw", "local consistency diffusion, a single draw", candidates=1),
        Generated("Mc-Di, one draw, one step", "the same in a single step of the sampler", candidates=1, steps=1),
        MAIN,
        Selected("Mc-Di, chosen", "one of eight draws, their mean or what is free, by cross-validation on the shots"),
        Refined("Mc-Di, refined", "the mean of eight draws, then five gradient steps on the task's examples"),
        OtherTask("Mc-Di, another task's condition", "shown the examples of another test task"),
        ShuffledLabels("Mc-Di, shuffled labels", "shown each class's examples under the name of the next class"),
        NoiseCondition("Mc-Di, a condition of noise", "shown random inputs instead of examples"),
        NOISED,
        GaussianSample("PCA sample of training adapters", "drawn from the Gaussian of all training adapters"),
    ]
}
