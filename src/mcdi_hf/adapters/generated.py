"""A generated adapter: plain PEFT files, with a card."""

import json
import os
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..backbones.frozen import FrozenBackbone
from ..utils.files import read_json, read_tensors, safetensors_bytes, write_folder
from .card import adapter_card
from .layout import PREFIX, AdapterLayout
from .lora_config import read_lora_config
from .prediction import predict
from .stacked import StackedLora


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
RECORD = "generation.json"  # what else an adapter is: labels, backbone, pooling, length of texts, how it was made


@dataclass(frozen=True)
class GenerationDetails:
    """How an adapter was made.

    Attributes:
        shots (`list[int]`): Examples of each class.
        generator (`str`, *optional*): The pipeline's name or Hub id.
        generator_revision (`str`, *optional*): Its commit, if it is of the Hub.
        seed (`int`, *optional*): Seed of its noise; `generator=[torch.Generator().manual_seed(seed)]` makes it again.
        num_inference_steps (`int`, *optional*): Steps of the sampler.
        num_candidates (`int`, *optional*): How many were drawn; the adapter is their mean unless one was chosen.
        refine_steps (`int`, *optional*, defaults to 0): Gradient steps on the support after it was generated.
        chosen (`str`, *optional*): The option that was selected, if one was.
        support_accuracies (`dict[str, float]`, *optional*): Each option's accuracy on held-out examples of the support;
            the best was chosen.
        support_losses (`dict[str, float]`, *optional*): Each option's mean cross-entropy there, at its best temperature.
        folds (`int`, *optional*): How many folds that is over; 0: with one example of a class nothing can be held out.
    """

    shots: list[int]
    generator: str | None = None
    generator_revision: str | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    num_candidates: int | None = None
    refine_steps: int = 0
    chosen: str | None = None
    support_accuracies: dict[str, float] | None = None
    support_losses: dict[str, float] | None = None
    folds: int | None = None


@dataclass(repr=False)
class GeneratedAdapter:
    """One LoRA adapter with a classification head, or, for a causal language model, without one.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): Key as in PEFT's files -> tensor.
        lora_config (`dict`): `LoraConfig.to_dict()`.
        base_model (`dict`): `name_or_path`, `revision`, `fingerprint`, `pooling` and `model_class` of the backbone.
        labels (`list[str]`): The class names, in the order of the logits.
        details ([`GenerationDetails`]): How it was made.
        support (`dict[str, list]`, *optional*): Label -> texts or pairs of texts that it was generated from. They are
            written nowhere unless asked for.

    Example: `GeneratedAdapter.from_pretrained("me/my-adapter").predict(["my parcel is late"])`
    """

    tensors: dict[str, torch.Tensor]
    lora_config: dict
    base_model: dict
    labels: list[str]
    details: GenerationDetails
    support: dict[str, list] | None = None

    def __repr__(self) -> str:
        shots = ", ".join(f"{label!r} ({count})" for label, count in zip(self.labels, self.details.shots))
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        base = self.base_model["name_or_path"]
        return f"GeneratedAdapter({numbers} numbers for {base!r}; labels (shots): {textwrap.shorten(shots, 400)})"

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None
    ) -> Self:
        """Read what [`GeneratedAdapter.save_pretrained`] or [`GeneratedAdapter.push_to_hub`] wrote. The texts that it was
        generated from are in no file.

        Args:
            name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
            revision (`str`, *optional*): A branch, tag or commit of the Hub.
            token (`str`, *optional*): For a private repository; the saved one by default.

        Raises:
            `FileNotFoundError`: when a file is missing, as `generation.json` is in adapters that others made.
            `ValueError`: when a file is damaged, or the files do not fit each other.

        Example: `pipe.predict(GeneratedAdapter.from_pretrained("my-adapter"), ["my parcel is late"])`
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            files = [CONFIG, WEIGHTS, RECORD]
            folder = Path(snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=files))
        record, config = read_json(folder / RECORD), read_json(folder / CONFIG)
        tensors, _ = read_tensors(folder / WEIGHTS, "id2label")
        try:
            adapter = cls(tensors, read_lora_config(config).to_dict(), **record)
            adapter.details = GenerationDetails(**adapter.details)
            adapter.peft_config  # a record without its backbone has none
            labels = [label for label in adapter.labels if isinstance(label, str)]
            heads = {len(adapter.labels), *(len(tensor) for key, tensor in tensors.items() if "lora_" not in key)}
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no generated adapter: {type(error).__name__}: {error}.") from error
        if len(heads) > 1 or labels != adapter.labels or not labels:
            raise ValueError(
                f"{folder / RECORD} has the labels {adapter.labels}, {folder / WEIGHTS} a head of others."
            )
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(f"{folder / WEIGHTS} holds NaN or inf: get the adapter again.")
        return adapter

    @property
    def peft_config(self) -> LoraConfig:
        """The adapter's config, for inference and with the name and the commit of its backbone."""
        config = read_lora_config(self.lora_config)
        if self.kind == "mean":
            # By their whole names, which the plain classifier of transformers does not have: it refuses the adapter.
            names = [key.removeprefix(PREFIX).split(".lora_")[0] for key in self.tensors if ".lora_A." in key]
            config.target_modules, config.layers_to_transform = set(names), None
        config.base_model_name_or_path = self.base_model["name_or_path"]
        config.revision = self.base_model.get("revision")
        config.inference_mode = True
        return config

    @property
    def kind(self) -> str:
        """What uses the adapter: the backbone's pooling for texts, or `"images"`."""
        if self.base_model["model_class"].endswith("ForImageClassification"):
            return "images"
        return self.base_model["pooling"]

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {label: index for index, label in enumerate(self.labels)}

    def load_into(self, model: nn.Module, adapter_name: str = "default") -> PeftModel:
        """Put the adapter into a live model, without a file.

        The model is the backbone's classifier with as many labels as the adapter, or the causal language model; a
        `PeftModel` gets one more adapter. Returned is the `PeftModel`, with this adapter active under
        `adapter_name`. A `ValueError` says that the model is of another class or has another number of labels, or
        that a tensor of the adapter has no place in it.
        """
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if type(inner).__name__ != self.base_model["model_class"]:
            raise ValueError(
                f"The adapter is for a {self.base_model['model_class']}, the model is a {type(inner).__name__}."
            )
        if self.kind != "last_token" and inner.config.num_labels != len(self.labels):
            raise ValueError(
                f"The model has {inner.config.num_labels} labels, the adapter {len(self.labels)}: load the model with "
                f"num_labels={len(self.labels)}."
            )
        config = self.peft_config
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            config.base_model_name_or_path = None  # PEFT takes the name off the model, which may be a local path
            model = get_peft_model(model, config, adapter_name=adapter_name)
            model.peft_config[adapter_name].base_model_name_or_path = self.base_model["name_or_path"]
        expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False).keys()
        if expected != self.tensors.keys():
            missing, unexpected = sorted(expected - self.tensors.keys()), sorted(self.tensors.keys() - expected)
            raise ValueError(f"The adapter does not fit the model: missing {missing}, unexpected {unexpected}.")
        set_peft_model_state_dict(model, dict(self.tensors), adapter_name=adapter_name)  # PEFT 0.18 changes its dict
        model.set_adapter(adapter_name)
        model.requires_grad_(False)  # PEFT 0.18 has no `inference_mode` in `set_adapter`
        inner.config.id2label, inner.config.label2id = self.id2label, self.label2id
        return model.eval()

    def predict(
        self, examples: list[Any], backbone: FrozenBackbone | None = None, top_k: int | None = 1
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Classify examples, see [`predict`] for what is returned. A pipeline whose backbone is loaded does it without
        loading it again, [`MCDiPipeline.predict`].

        Args:
            examples (`list`): Texts, pairs of texts or PIL images.
            backbone ([`FrozenBackbone`], *optional*): A loaded one; by default it is loaded by its name in every call.
            top_k (`int`, *optional*, defaults to 1): How many labels of each to return; `None` for all.

        Example: `GeneratedAdapter.from_pretrained("me/my-adapter").predict(["my parcel is late"])`
        """
        backbone = backbone or FrozenBackbone.of(self.base_model)
        backbone.check(self.base_model)
        layout = AdapterLayout.from_model(backbone.model, read_lora_config(self.lora_config), backbone.head_name)
        return predict(StackedLora(backbone, layout), self.tensors, self.labels, examples, top_k)

    def save_pretrained(self, save_directory: str | os.PathLike, **card: Any) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and `README.md`, as PEFT does, and `generation.json`: the
        labels, the backbone with its pooling and the length that texts are cut to, and how the adapter was made.

        All files are made beside the folder and moved in when they are on the disk, `adapter_config.json` last: without
        it no loader takes the folder for an adapter. `card` are arguments of [`GeneratedAdapter.card`].
        """
        folder = Path(save_directory)
        self._write(folder, self.card(folder.resolve().name, **card))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str = "Upload generated adapter",
        create_pr: bool = False,
        token: str | None = None,
        **card: Any,
    ) -> str:
        """Push the adapter and its card to the Hub, and return the commit's address.

        Args:
            repo_id (`str`): `user/name`; the repository is made if need be.
            private (`bool`, *optional*): Whether a new repository is private.
            commit_message (`str`, *optional*, defaults to `"Upload generated adapter"`): The commit's.
            create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of pushing to `main`.
            token (`str`, *optional*): A token with write access; the saved one by default.
            card: Arguments of [`GeneratedAdapter.card`].
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), self.card(repo_id, **card))
            settings = {"commit_message": commit_message, "create_pr": create_pr}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **settings).commit_url

    def card(self, place: str, license: str | None = None, include_support: bool = False) -> ModelCard:
        """The model card. Labels are in it; the examples are only if asked for, because they may be private.

        Args:
            place (`str`): The folder or the Hub id that the adapter is loaded from.
            license (`str`, *optional*): The adapter's licence as the Hub names it.
            include_support (`bool`, *optional*, defaults to `False`): Put the texts that it was generated from on it.
        """
        if include_support and self.support is None:
            raise ValueError(
                "The adapter was not generated from texts in this process, so they cannot be put on its card: leave "
                "include_support out."
            )
        support = self.support if include_support else None
        return adapter_card(place, self.kind, self.labels, self.base_model, asdict(self.details), license, support)

    def _write(self, folder: Path, card: ModelCard) -> None:
        metadata = {"format": "pt", "id2label": json.dumps(self.id2label)}
        config = self.peft_config
        record = {"labels": self.labels, "base_model": self.base_model, "details": asdict(self.details)}

        def write(beside: Path) -> None:
            config.save_pretrained(beside)
            # PEFT writes its sets in an order that is another in every process; see `safetensors_bytes`.
            path = beside / CONFIG
            values = json.loads(path.read_text())
            values |= {key: sorted(value) for key, value in values.items() if isinstance(getattr(config, key, 0), set)}
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            (beside / WEIGHTS).write_bytes(safetensors_bytes(self.tensors, metadata))
            (beside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            card.save(beside / "README.md")

        write_folder(folder, write, last=CONFIG)


def as_adapter(adapter: GeneratedAdapter | str | os.PathLike) -> GeneratedAdapter:
    """An adapter as it is, or read from its folder or the Hub, see [`GeneratedAdapter.from_pretrained`]."""
    return adapter if isinstance(adapter, GeneratedAdapter) else GeneratedAdapter.from_pretrained(adapter)
