"""Many LoRA adapters on one frozen backbone, in one forward and backward pass."""

import math
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backbones.frozen import FrozenBackbone
from ..backbones.layers import LowerLayers, UpperLayers
from ..data.encoded import EncodedExamples
from ..data.episodes import SupportBatch
from .head import Head, RidgeHead, head_logits
from .layout import AdapterLayout, LoraModule


ROWS_AT_ONCE = 32  # or more, in one pass on a CPU; examples/reproduce/preparation_speed.py tries others


class StackedLora:
    """Runs N adapters of a layout at once: the frozen products are shared, each adapter's low-rank product is one
    batched matmul.

    Rows come adapter by adapter: `N * b` rows are `b` rows for each adapter. Gradients of a summed loss are those
    of N separate runs, since no adapter sees another's rows. The layers below the first adapted one run once per
    example.

    Example: `StackedLora(backbone, codec.layout).logits(tensors, batch)` for many adapters at once
    """

    def __init__(self, backbone: FrozenBackbone, layout: AdapterLayout) -> None:
        names = [module.name for module in layout.modules]
        self.backbone = backbone
        self.layout = layout
        self.device = backbone.device
        self.encode = LowerLayers(backbone, names)
        self.upper = UpperLayers(backbone, names)

    def features(self, tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What each adapter's head reads of the upper layers' inputs, each of `N * b` rows: `(N, b, feature_dim)`.

        Args:
            tensors (`dict[str, torch.Tensor]`): Key on disk -> `(N, *shape)`; the heads, if given, are not used.
            inputs (`dict[str, torch.Tensor]`): As [`EncodedExamples`] gives them.
        """
        if self.device.type != "cpu" or "attention_mask" not in inputs:
            return self._one_pass(tensors, inputs)
        # A CPU has no need of large passes. In smaller ones a task of short texts is not padded to the longest of all.
        lengths = inputs["attention_mask"].sum(dim=1)
        count = len(tensors[self.layout.modules[0].key("lora_A")])
        rows = len(lengths) // count
        at_once = math.ceil(ROWS_AT_ONCE / rows)
        found = []
        for first in range(0, count, at_once):
            own = slice(first * rows, (first + at_once) * rows)
            longest = int(lengths[own].max())
            part = {key: value[first : first + at_once] for key, value in tensors.items()}
            found.append(self._one_pass(part, {key: value[own, :longest] for key, value in inputs.items()}))
        return torch.cat(found)

    def _one_pass(self, tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        lora_a = tensors[self.layout.modules[0].key("lora_A")]
        with ExitStack() as hooks:
            if self.device.type == "cpu":  # on short texts the fused kernels take half as long again, there and back
                hooks.enter_context(sdpa_kernel(SDPBackend.MATH))
            for module in self.layout.modules:
                hook = self._hook(module, tensors[module.key("lora_A")], tensors[module.key("lora_B")])
                hooks.enter_context(self.upper.model.get_submodule(module.name).register_forward_hook(hook))
            features = self.upper(inputs)
        return features.unflatten(0, (len(lora_a), -1)).to(lora_a.dtype)

    @torch.no_grad()
    def features_of_all(
        self, tensors: dict[str, torch.Tensor], examples: EncodedExamples, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the head of one adapter, key -> `(1, *shape)`, reads of some rows `(n,)`, or of all: `(n, feature_dim)`.

        No gradients are kept, and a pass has at most 64 examples.
        """
        rows = torch.arange(len(examples)) if rows is None else rows
        order = examples.lengths(rows).argsort()  # texts of like length waste no padding
        found = torch.cat([self.features(tensors, examples[chunk])[0] for chunk in rows[order].split(64)])
        return found[order.argsort()]

    def logits(self, tensors: dict[str, torch.Tensor], batch: SupportBatch) -> torch.Tensor:
        """The logits `(N, b, classes)` of N adapters, key on disk -> `(N, *shape)`, each on the examples of its own
        task; they are minus infinity for classes that are padding. Without heads the batch's class names give
        verbalizers.
        """
        features = self.features(tensors, batch.inputs())
        head = tuple(tensors[key] for key in self.layout.head_keys) or self.verbalizers(batch)
        return head_logits(features, *head, batch.class_mask)

    def episode_logits(
        self, tensors: dict[str, torch.Tensor], ridge: RidgeHead, support: SupportBatch, query: SupportBatch
    ) -> torch.Tensor:
        """Classify each task's query by the head that an adapter makes of its support, both seen in one pass.

        Args:
            tensors (`dict[str, torch.Tensor]`): LoRA matrices, key on disk -> `(N, *shape)`: one for each task, or one
                for all of them.
            ridge ([`RidgeHead`]): Makes the heads; a language model's are verbalizers.
            support, query ([`SupportBatch`]): With rows and examples.

        Returns:
            `torch.Tensor` of shape `(tasks, queries, classes)`: Logits, minus infinity for padding classes.
        """
        rows = torch.cat([support.plain_rows, query.plain_rows], dim=1)
        features = self.features(tensors, query.examples[rows.flatten()]).reshape(*rows.shape, -1)
        seen, asked = features.split([support.labels.shape[1], query.labels.shape[1]], dim=1)
        if self.backbone.is_causal_lm:
            head = self.verbalizers(support)
        else:
            head = ridge(seen, support.labels, support.class_mask)
        return head_logits(asked.float(), *head, support.class_mask)

    def heads(self, support: SupportBatch, ridge: RidgeHead, tensors: dict[str, torch.Tensor]) -> Head:
        """The heads of N tasks, weights `(N, classes, feature_dim)` and biases `(N, classes)`, zero for padding, that
        `ridge` makes of what N adapters, key on disk -> `(N, *shape)`, see in their support's examples, all views."""
        features = self.features(tensors, support.inputs(views=True))
        labels = support.labels.repeat(1, features.shape[1] // support.labels.shape[1])
        return ridge(features, labels, support.class_mask)

    def verbalizers(self, support: SupportBatch) -> Head:
        """A language model's heads of N tasks, in place of those of [`StackedLora.heads`]: the rows of the words that
        name the classes."""
        weight, bias = self.backbone.verbalizers(support.classes)
        spare = support.class_mask.shape[1] - weight.shape[1]
        return nn.functional.pad(weight, (0, 0, 0, spare)), nn.functional.pad(bias, (0, spare))

    @staticmethod
    def _hook(module: LoraModule, lora_a: torch.Tensor, lora_b: torch.Tensor):
        def add_low_rank(_, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            kind = output.device.type  # under autocast what is cast to float32 would only be cast back
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lora_a.dtype
            rows = args[0].reshape(len(lora_a), -1, module.in_features).to(dtype)
            low = torch.bmm(rows, lora_a.to(dtype).transpose(1, 2))
            base = output.view(len(lora_a), -1, module.out_features).to(dtype)
            added = torch.baddbmm(base, low, lora_b.to(dtype).transpose(1, 2), alpha=module.scaling)
            return added.view_as(output).to(output.dtype)

        return add_low_rank
