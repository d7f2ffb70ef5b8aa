"""The part of the pipeline that sees examples: its frozen backbone."""

import torch

from ..adapters.stacked import StackedLora
from ..backbones import FrozenBackbone
from ..trajectories.augmentation import augmented_views
from .support import Support, SupportBatch, as_support_sets, check_readable


class BackboneMixin:
    """Loads the backbone of a pipeline with a `codec` when it is first needed, and sees support sets through it."""

    _backbone: FrozenBackbone | None = None
    _stacked: StackedLora | None = None

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen backbone, loaded when it is first asked for. Set it to use one that is loaded already."""
        if self._backbone is None:
            self.backbone = FrozenBackbone.of(self.codec.config.base_model, self.config.base_model_name_or_path)
        return self._backbone

    @backbone.setter
    def backbone(self, backbone: FrozenBackbone) -> None:
        self.codec.check_backbone(backbone)
        self._backbone, self._stacked = backbone, None

    @property
    def stacked(self) -> StackedLora:
        """The backbone with room for many adapters, on the pipeline's device."""
        return self._stacked_on(self._execution_device)

    def _stacked_on(self, device: torch.device) -> StackedLora:
        if self._stacked is None or self._stacked.device != device:
            self.backbone.model.to(device)
            self._stacked = StackedLora(self.backbone, self.codec.layout)
        return self._stacked

    @torch.no_grad()
    def embed(self, support: Support) -> dict[str, torch.Tensor]:
        """The features of a support set, to be kept and handed in again in its place.

        Args:
            support (`dict` or `datasets.Dataset`): One task, see [`MCDiPipeline.__call__`].

        Returns:
            Label -> `torch.Tensor` of shape `(shots, feature_dim)`.
        """
        (support,) = self._support_sets(support)
        features = self._embed_batch([support], len(support)).features[0]
        return dict(zip(support, features.split([len(examples) for examples in support.values()])))

    def _support_sets(self, support: Support | list[Support]) -> list[dict]:
        """Support sets in one form, which the backbone can read; ready features need none."""
        supports = as_support_sets(support, self.codec.layout.feature_dim)
        if not isinstance(next(iter(supports[0].values())), torch.Tensor):
            check_readable(supports, self.backbone, self.config.support_views)
        return supports

    def _embed_batch(self, supports: list[dict], ways: int) -> SupportBatch:
        """See some support sets through the mean adapter, padded to `ways` classes."""
        device = self._execution_device
        groups = [examples for support in supports for examples in support.values()]
        if isinstance(groups[0], torch.Tensor):
            return SupportBatch.pad(supports, ways, torch.cat(groups).to(device))
        stacked, num_views = self._stacked_on(device), self.config.support_views
        # a task's views do not depend on its neighbours: each counts its examples from 0
        sets = [[example for group in support.values() for example in group] for support in supports]
        views = [augmented_views(examples, num_views) for examples in sets]
        ordered = [
            example
            for view in range(num_views)
            for examples, own in zip(sets, views)
            for example in own[view * len(examples) : (view + 1) * len(examples)]
        ]
        examples = stacked.encode(ordered, num_views=num_views)
        features = stacked.features_of_all(self.codec.mean_adapter(), examples, torch.arange(len(ordered)))
        return SupportBatch.pad(supports, ways, features.unflatten(0, (num_views, -1)).mean(dim=0), examples)
