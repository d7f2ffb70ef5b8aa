"""Many LoRA adapters on one frozen backbone, in one forward and backward pass."""

from contextlib import ExitStack

import torch

from ..backbones import FrozenBackbone
from ..layers import EncodedExamples
from .head import class_means, head_logits, imprint_head
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
        self.backbone = backbone
        self.layout = layout
        self.device = backbone.device
        self.encode = backbone.lower(names)
        self.upper = backbone.upper(names)

    def features(self, tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What each adapter's head reads.

        Args:
            tensors (`dict[str, torch.Tensor]`): Key on disk -> `(N, *shape)`; the heads, if given, are not used.
            inputs (`dict[str, torch.Tensor]`): The upper layers' inputs, each of `N * b` rows.

        Returns:
            `torch.Tensor` of shape `(N, b, feature_dim)`, in the adapters' dtype.
        """
        lora_a = tensors[self.layout.modules[0].key("lora_A")]
        with ExitStack() as hooks:
            for module in self.layout.modules:
                hook = self._hook(module, tensors[module.key("lora_A")], tensors[module.key("lora_B")])
                hooks.enter_context(self.upper.model.get_submodule(module.name).register_forward_hook(hook))
            features = self.upper(inputs)
        return features.unflatten(0, (len(lora_a), -1)).to(lora_a.dtype)

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
        order = examples.lengths(rows).argsort()  # texts of like length waste no padding
        found = torch.cat([self.features(tensors, examples[chunk])[0] for chunk in rows[order].split(64)])
        return found[order.argsort()]

    def logits(
        self,
        tensors: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        class_mask: torch.Tensor | None = None,
        words: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Each adapter's logits on its rows.

        Args:
            tensors, inputs: As in [`StackedLora.features`], with the heads, if the layout has one.
            class_mask (`torch.Tensor` of shape `(N, classes)`, *optional*): False marks classes that are padding; their
                logits are minus infinity.
            words (`tuple` of `(N, classes, feature_dim)` and `(N, classes)`, *optional*): What stands in for the heads
                if the layout has none, see [`StackedLora.word_heads`].

        Returns:
            `torch.Tensor` of shape `(N, b, classes)`.
        """
        return self.apply_head(tensors, self.features(tensors, inputs), class_mask, words)

    def apply_head(
        self,
        tensors: dict[str, torch.Tensor],
        features: torch.Tensor,
        class_mask: torch.Tensor | None = None,
        words: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The logits of features that are at hand already. See [`StackedLora.logits`]."""
        if (words is None) != bool(self.layout.head_keys):
            raise ValueError("Expected words for adapters without a head, and none for those that have one.")
        weight, bias = words or (tensors[key] for key in self.layout.head_keys)
        return head_logits(features, weight, bias, class_mask)

    def word_heads(self, classes: list[tuple[str, ...]]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What classifies the tasks of some class names in place of a head: words, see [`FrozenBackbone.word_heads`].

        Returns:
            The weights `(N, classes, feature_dim)` and the biases `(N, classes)`; `None` if the layout has a head.
        """
        return None if self.layout.head_keys else self.backbone.word_heads(classes)

    def imprint(
        self,
        tensors: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        class_mask: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads that are free once there are LoRA matrices: imprinted from what each adapter makes of its support.

        Args:
            tensors (`dict[str, torch.Tensor]`): Key on disk -> `(N, *shape)`, without heads.
            inputs (`dict[str, torch.Tensor]`): The upper layers' inputs, of `N * b` support examples, or of several views:
                each adapter's examples, then other views of all of them.
            labels (`torch.Tensor` of shape `(N, b)`): Their classes; -1 marks padding.
            class_mask (`torch.Tensor` of shape `(N, classes)`): False marks padding.
            scale (`float`): See [`imprint_head`].

        Returns:
            The weights `(N, classes, feature_dim)` and the biases `(N, classes)`.
        """
        features = self.features(tensors, inputs)
        labels = labels.repeat(1, features.shape[1] // labels.shape[1])
        return imprint_head(class_means(features, labels, class_mask.shape[1]), scale, class_mask)

    @staticmethod
    def _hook(module: LoraModule, lora_a: torch.Tensor, lora_b: torch.Tensor):
        def add_low_rank(_, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            rows = args[0].reshape(len(lora_a), -1, module.in_features).to(lora_a.dtype)
            low = torch.bmm(rows, lora_a.transpose(1, 2))
            base = output.view(len(lora_a), -1, module.out_features).to(lora_b.dtype)
            added = torch.baddbmm(base, low, lora_b.transpose(1, 2), alpha=module.scaling)
            return added.view_as(output).to(output.dtype)

        return add_low_rank
