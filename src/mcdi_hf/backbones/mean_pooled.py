"""A sequence classifier that reads the mean of the token states, where sentence encoders keep their meaning."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PreTrainedConfig):
    """Configuration of [`MeanPooledForSequenceClassification`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            The configuration of the encoder. A `dict` needs its `model_type`. Without one, a default BERT's.
    """

    model_type = "mean_pooled"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(self, backbone_config: PreTrainedConfig | dict | None = None, **kwargs) -> None:
        if backbone_config is None:
            backbone_config = AutoConfig.for_model("bert")
        elif isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        super().__init__(**kwargs)


class MeanPooledForSequenceClassification(PreTrainedModel):
    """An encoder with a linear head on its mean-pooled, unit-length token states, as sentence-transformers pools.

    `AutoModelForSequenceClassification` reads the first token of a BERT, which a sentence encoder was never trained to
    fill. The encoder lives in `backbone`, so that an adapter made for this class is refused by the plain classifier
    instead of being loaded into features that it does not fit.
    """

    config_class = MeanPooledConfig
    base_model_prefix = "backbone"

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.classifier = nn.Linear(config.backbone_config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_backbone(
        cls, pretrained_model_name_or_path: str, num_labels: int = 2, **kwargs
    ) -> "MeanPooledForSequenceClassification":
        """Put a new head on a pretrained encoder.

        Args:
            pretrained_model_name_or_path (`str`):
                A Hub id or a local folder that `AutoModel.from_pretrained` reads.
            num_labels (`int`, *optional*, defaults to 2):
                The number of classes.
            kwargs:
                Passed on to `AutoModel.from_pretrained`.
        """
        backbone = AutoModel.from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = cls(MeanPooledConfig(backbone_config=backbone.config, num_labels=num_labels)).to(backbone.dtype)
        model.backbone = backbone
        model.name_or_path = pretrained_model_name_or_path
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Classify a batch.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` of shape `(batch, length)`):
                As made by the tokenizer.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden)`, *optional*):
                Embedded tokens, in place of `input_ids`.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*):
                Classes; with them the output has the cross-entropy as its `loss`.
        """
        if token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        ).last_hidden_state
        if attention_mask is None:
            attention_mask = states.new_ones(states.shape[:2])
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        features = nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledForSequenceClassification)
