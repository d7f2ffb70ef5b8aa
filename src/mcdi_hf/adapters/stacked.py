"""Many LoRA adapters on one frozen backbone, in one forward and backward pass."""

from contextlib import ExitStack

import torch

from ..backbones import EncodedExamples, FrozenBackbone
from .layout import AdapterLayout, LoraModule


class StackedLora:
    """Runs N adapters at once: the frozen products are shared, each adapter's low-rank product is one batched matmul.

    Rows come adapter by adapter: `N * b` rows are `b` rows for each adapter. Gradients of a summed loss are those of N
    separate runs, since no adapter sees another's rows.

    Args:
        backbone (`FrozenBackbone`): The backbone; its layers below the first adapted one run once an example.
        layout (`AdapterLayout`): Which modules are adapted.
    """

    def __init__(self, backbone: FrozenBackbone, layout: AdapterLayout) -> None:
        names = [module.name for module in layout.modules]
        self.layout = layout
        self.device = backbone.device
        self.encode = backbone.lower(names)
        self.model = backbone.upper(names)

    def features(self, tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What each adapter's head reads.

        Args:
            tensors (`dict[str, torch.Tensor]`): Key on disk -> `(N, *shape)`; the heads, if given, are not used.
            inputs (`dict[str, torch.Tensor]`): The model's inputs, each of `N * b` rows.

        Returns:
            `torch.Tensor` of shape `(N, b, feature_dim)`.
        """
        count = len(next(iter(tensors.values())))
        with ExitStack() as hooks:
            for module in self.layout.modules:
                lora_a, lora_b = tensors[module.key("lora_A")], tensors[module.key("lora_B")]
                hook = self._hook(module, lora_a, lora_b)
                hooks.enter_context(self.model.get_submodule(module.name).register_forward_hook(hook))
            features = self.model(**inputs).logits
        return features.unflatten(0, (count, -1))

    @torch.no_grad()
    def features_of_all(
        self, tensors: dict[str, torch.Tensor], examples: EncodedExamples, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the head of one adapter reads, without gradients and in passes of bounded memory.

        Args:
            tensors (`dict[str, torch.Tensor]`): One adapter, key -> `(1, *shape)`.
            examples (`EncodedExamples`): What [`StackedLora.encode`] made.
            rows (`torch.Tensor` of shape `(n,)`, *optional*): The examples wanted; all of them without it.

        Returns:
            `torch.Tensor` of shape `(n, feature_dim)`.
        """
        rows = torch.arange(len(examples)) if rows is None else rows
        order = examples.attention_mask[rows].sum(dim=1).argsort()  # texts of like length waste no padding
        found = torch.cat([self.features(tensors, examples[chunk])[0] for chunk in rows[order].split(64)])
        return found[order.argsort()]

    def logits(
        self,
        tensors: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        class_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each adapter's logits on its rows.

        Args:
            tensors, inputs: As in [`StackedLora.features`], with the heads.
            class_mask (`torch.Tensor` of shape `(N, classes)`, *optional*): False marks classes that are padding; their
                logits are minus infinity.

        Returns:
            `torch.Tensor` of shape `(N, b, classes)`.
        """
        return self.apply_head(tensors, self.features(tensors, inputs), class_mask)

    def apply_head(
        self, tensors: dict[str, torch.Tensor], features: torch.Tensor, class_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits of features that are at hand already. See [`StackedLora.logits`]."""
        weight, bias = (tensors[key] for key in self.layout.head_keys)
        logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
        return logits if class_mask is None else logits.masked_fill(~class_mask.unsqueeze(1), float("-inf"))

    @staticmethod
    def _hook(module: LoraModule, lora_a: torch.Tensor, lora_b: torch.Tensor):
        def add_low_rank(_, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            rows = args[0].reshape(len(lora_a), -1, module.in_features)
            low = torch.bmm(rows, lora_a.transpose(1, 2))
            return output + module.scaling * torch.bmm(low, lora_b.transpose(1, 2)).view_as(output)

        return add_low_rank
