"""A sequence classifier that reads the mean of the token states, where sentence encoders keep their meaning."""

from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PretrainedConfig):
    """Configuration of [`MeanPooledForSequenceClassification`].

    `backbone_config` is its encoder's, an object or a `dict` with a `model_type`; by default that of BERT.

    Example: `MeanPooledConfig(backbone_config={"model_type": "bert"}, num_labels=3)`
    """

    model_type = "mean_pooled"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config: PretrainedConfig | dict | None = None, **kwargs: Any) -> None:
        if not isinstance(backbone_config, PretrainedConfig):
            settings = {"model_type": "bert"} if backbone_config is None else backbone_config
            backbone_config = AutoConfig.for_model(**settings)
        self.backbone_config = backbone_config
        super().__init__(**kwargs)


class MeanPooledForSequenceClassification(PreTrainedModel):
    """An encoder with a linear head on its mean-pooled, unit-length token states, as sentence-transformers pools.

    Transformers' own classifier reads the first token, which a sentence encoder was never trained to fill. The encoder
    lives in `backbone`, so that the plain classifier refuses an adapter made for this class.

    Example: `MeanPooledForSequenceClassification.from_backbone("sentence-transformers/all-MiniLM-L6-v2",
    num_labels=3)`
    """

    config_class = MeanPooledConfig
    base_model_prefix = "backbone"

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = _without_pooler(AutoModel.from_config(config.backbone_config))
        self.classifier = nn.Linear(config.backbone_config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str, num_labels: int = 2, output_loading_info: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict]:
        """Put a new head on a pretrained encoder. `kwargs` go to `AutoModel.from_pretrained`. With `output_loading_info`
        the weights of the encoder that were missing are returned, too, as transformers tells them."""
        backbone, found = AutoModel.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model = cls(MeanPooledConfig(backbone_config=backbone.config, num_labels=num_labels)).to(backbone.dtype)
        model.backbone = _without_pooler(backbone)
        model.name_or_path = pretrained_model_name_or_path
        found["missing_keys"] = [key for key in found["missing_keys"] if not key.startswith("pooler.")]
        return (model.eval(), found) if output_loading_info else model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify a batch.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(batch, length)`): The tokenizer's.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*): In place of `input_ids`.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes, for the cross-entropy as `loss`.
        """
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        states = self.backbone(**kwargs).last_hidden_state
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask.to(states.dtype)
        mask = mask.unsqueeze(-1)
        features = nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _without_pooler(backbone: PreTrainedModel) -> PreTrainedModel:
    """The mean does not read the pooler, whose weights a checkpoint may lack: they would be another's in every process."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledForSequenceClassification)
