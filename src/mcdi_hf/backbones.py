"""A frozen transformers classifier, seen as features: what its linear head reads."""

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .models.mean_pooled import MeanPooledForSequenceClassification


HEAD_NAMES = ("classifier", "score")
POOLINGS = ("mean", "default")


@dataclass
class EncodedExamples:
    """Examples after the frozen lower layers, ready for any number of passes through the adapted upper ones.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(examples, length, hidden)`): Input of the first adapted layer.
        attention_mask (`torch.Tensor` of shape `(examples, length)`): 1 for a token, 0 for padding.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __getitem__(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs of the upper layers for some rows, cut to the longest of them."""
        mask = self.attention_mask[rows]
        length = int(mask.sum(dim=1).max())
        return {"inputs_embeds": self.hidden_states[rows, :length], "attention_mask": mask[:, :length]}


class _Identity(nn.Module):
    """Stands where a layer or an embedding stood, and hands on the states that it is given."""

    def forward(self, hidden_states=None, *args, inputs_embeds=None, **kwargs) -> torch.Tensor:
        return hidden_states if inputs_embeds is None else inputs_embeds


class _Capture(nn.Module):
    """Keeps the states that reach a layer."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.states = hidden_states
        return hidden_states


def _shared_copy(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class FrozenBackbone:
    """A pretrained classifier whose weights never change, cut below its first adapted layer.

    Args:
        model (`PreTrainedModel`):
            A classifier whose head is one `nn.Linear` called `classifier` or `score`.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        name_or_path (`str`):
            What a user loads the backbone by; written into every adapter generated for it.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"` for [`MeanPooledForSequenceClassification`], `"default"` for the Auto class's own.
        max_length (`int`, *optional*, defaults to 64):
            Longer texts are cut to so many tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name_or_path: str,
        pooling: str = "mean",
        max_length: int = 64,
    ) -> None:
        heads = [name for name, child in model.named_children() if name in HEAD_NAMES and isinstance(child, nn.Linear)]
        if len(heads) != 1:
            raise ValueError(
                f"{type(model).__name__} has no head that can be imprinted: expected one nn.Linear named "
                f"{' or '.join(HEAD_NAMES)}, found {heads or 'none'}."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name_or_path = name_or_path
        self.pooling = pooling
        self.max_length = max_length
        self.head_name = heads[0]
        self.feature_dim = getattr(model, self.head_name).in_features

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, pooling: str = "mean", name_or_path: str | None = None, **kwargs
    ) -> "FrozenBackbone":
        """Load a text encoder and its tokenizer.

        Args:
            pretrained_model_name_or_path (`str`):
                A Hub id or a local folder.
            pooling (`str`, *optional*, defaults to `"mean"`):
                `"mean"` or `"default"`, see [`FrozenBackbone`].
            name_or_path (`str`, *optional*):
                The name to remember instead, such as the Hub id of a local copy.
            kwargs:
                Passed on to the model's `from_pretrained`, `revision` for instance.
        """
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path)
        model = classifier_class(pooling)(pretrained_model_name_or_path, **kwargs)
        return cls(model, tokenizer, name_or_path or pretrained_model_name_or_path, pooling)

    @property
    def fingerprint(self) -> str:
        """A hash of the encoder's weights: the same weights under any name have the same one, a revision has another.

        A stride through every tensor is read, not all of it: the answer takes milliseconds.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.base_model.state_dict().items()):
            sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].to(torch.float32).cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def model_class(self) -> str:
        """The name of the class that a user loads the backbone with."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        return self.model.device

    def classifier(self, num_labels: int) -> PreTrainedModel:
        """A copy of the backbone with an untrained head of `num_labels` classes, to train or to load an adapter into."""
        model = copy.deepcopy(self.model)
        head = nn.Linear(self.feature_dim, num_labels, device=model.device, dtype=model.dtype)
        setattr(model, self.head_name, head)
        model.num_labels = model.config.num_labels = num_labels
        return model

    def lower(self, module_names: list[str]) -> "LowerLayers":
        """The layers below the first of the named modules; they never see an adapter, so they run once an example."""
        return LowerLayers(self, module_names)

    def upper(self, module_names: list[str]) -> nn.Module:
        """The layers from the first of the named modules on, with what the head reads as `logits`.

        Takes `inputs_embeds`, the states that [`LowerLayers`] makes, and `attention_mask`. Names of modules stay what
        they were.
        """
        path, first = split_point(self.model, module_names)
        upper = _shared_copy(self.model)
        setattr(upper, self.head_name, nn.Identity())
        layers = upper.get_submodule(path)
        for index in range(first):
            layers[index] = _Identity()
        upper.base_model.embeddings = _Identity()
        return upper


class LowerLayers:
    """The frozen part of a backbone below its adapted layers. See [`FrozenBackbone.lower`]."""

    def __init__(self, backbone: FrozenBackbone, module_names: list[str]) -> None:
        path, first = split_point(backbone.model, module_names)
        self.backbone = backbone
        self.capture = _Capture()
        model = _shared_copy(backbone.model)
        setattr(model, backbone.head_name, nn.Identity())
        parent, _, name = path.rpartition(".")
        layers = nn.ModuleList([*model.get_submodule(path)[:first], self.capture])
        setattr(model.get_submodule(parent), name, layers)
        self.model = model

    @torch.no_grad()
    def __call__(self, texts: list[str], batch_size: int = 64) -> EncodedExamples:
        """Run the lower layers over texts, in batches of similar length.

        Args:
            texts (`list[str]` of length `n`): The examples.
            batch_size (`int`, *optional*, defaults to 64): Texts a pass.

        Returns:
            [`EncodedExamples`] of `n` rows.
        """
        tokenizer = self.backbone.tokenizer
        tokens = tokenizer(texts, truncation=True, max_length=self.backbone.max_length)
        lengths = torch.tensor([len(ids) for ids in tokens["input_ids"]])
        order = lengths.argsort()
        hidden_states = mask = None
        for rows in order.split(batch_size):
            batch = tokenizer.pad(
                {key: [values[row] for row in rows.tolist()] for key, values in tokens.items()},
                padding_side="right",  # rows are cut behind their last token, whatever side the tokenizer prefers
                return_tensors="pt",
            ).to(self.backbone.device)
            self.model.base_model(**batch)
            states, self.capture.states = self.capture.states, None
            if hidden_states is None:
                hidden_states = states.new_zeros(len(texts), int(lengths.max()), states.shape[-1])
                mask = batch["attention_mask"].new_zeros(len(texts), int(lengths.max()))
            hidden_states[rows, : states.shape[1]] = states
            mask[rows, : states.shape[1]] = batch["attention_mask"]
        return EncodedExamples(hidden_states, mask)


def classifier_class(pooling: str):
    """The constructor of a classifier with the given pooling: name or path, `num_labels` -> `PreTrainedModel`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: expected one of {', '.join(map(repr, POOLINGS))}.")
    if pooling == "mean":
        return MeanPooledForSequenceClassification.from_backbone
    return AutoModelForSequenceClassification.from_pretrained


def split_point(model: nn.Module, module_names: list[str]) -> tuple[str, int]:
    """The list of layers that holds the named modules, and the lowest index among them."""
    places = []
    for name in module_names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
                places.append((".".join(parts[:end]), int(parts[end])))
                break
    paths = {path for path, _ in places}
    if len(paths) != 1 or len(places) != len(module_names):
        raise ValueError(f"The LoRA targets must lie in one stack of layers; found {sorted(paths) or 'none'}.")
    return paths.pop(), min(first for _, first in places)
