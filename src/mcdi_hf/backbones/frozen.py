"""A frozen transformers model, seen as features: what its linear head reads."""

import copy
import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging as transformers_logging

from .mean_pooled import MeanPooledForSequenceClassification


logger = logging.getLogger(__name__)

HEAD_NAMES = ("classifier", "score", "lm_head")
POOLINGS = ("mean", "default", "last_token")
ANSWER_PROMPT = "\nLabel:"


class FrozenBackbone:
    """A pretrained model whose weights never change: a text or image classifier, or a causal language model.

    A language model classifies by the word that it would say next: the text is followed by a prompt for the label,
    and the logits are those of the first tokens of the class names.

    Args:
        model (`PreTrainedModel`): Its head is one `nn.Linear` called `classifier`, `score` or, for a language model,
            `lm_head`.
        processor (`PreTrainedTokenizerBase` or `BaseImageProcessor`): Its tokenizer or image processor.
        name_or_path (`str`): What a user loads the backbone by; written into every adapter generated for it.
        pooling (`str`, *optional*, defaults to `"mean"`): What the head reads: `"mean"` for
            [`MeanPooledForSequenceClassification`], `"default"` for the Auto classifier's own, `"last_token"` for a
            causal language model.
        max_length (`int`, *optional*, defaults to 64): Longer texts are cut to so many tokens.
        revision (`str`, *optional*): The commit of the Hub that the weights are of.

    Example: `FrozenBackbone.suited("sentence-transformers/all-MiniLM-L6-v2").inputs(["a text"])`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | BaseImageProcessor,
        name_or_path: str,
        pooling: str = "mean",
        max_length: int = 64,
        revision: str | None = None,
    ) -> None:
        heads = [name for name, child in model.named_children() if name in HEAD_NAMES and isinstance(child, nn.Linear)]
        if len(heads) != 1:
            raise ValueError(
                f"{type(model).__name__} has no linear head: expected one nn.Linear named "
                f"{' or '.join(HEAD_NAMES)}, found {heads or 'none'}."
            )
        if alike := [name for name, _ in model.named_modules() if name.endswith(heads[0]) and name != heads[0]]:
            raise ValueError(
                f"PEFT takes {alike} of {type(model).__name__} for its head, too: expected another pooling."
            )
        self.model = model.eval().requires_grad_(False)
        self.model_class = type(model).__name__  # what a user loads it with
        self.processor = processor
        self.name_or_path = name_or_path
        self.pooling = pooling
        self.max_length = max_length
        self.revision = revision
        self.head_name = heads[0]
        self.feature_dim = getattr(model, self.head_name).in_features
        self.is_causal_lm = pooling == "last_token"
        self._told_of_cuts = False
        self.reads_images = isinstance(processor, BaseImageProcessor)
        if self.is_causal_lm and processor.pad_token is None:
            processor.pad_token = processor.eos_token  # padding is masked; any token will do

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        pooling: str = "mean",
        name_or_path: str | None = None,
        max_length: int = 64,
        revision: str | None = None,
        **kwargs,
    ) -> "FrozenBackbone":
        """Load a model with its tokenizer or image processor from a Hub id or a local folder.

        `name_or_path` is the name to remember instead, such as the Hub id of a local copy; `revision` is a branch,
        tag or commit of the Hub, of which the commit is remembered; `kwargs` go to the model's `from_pretrained`,
        `dtype` for instance. The rest is that of the class; images need `pooling="default"`.
        """
        name = pretrained_model_name_or_path
        config = AutoConfig.from_pretrained(name, revision=revision)
        reads_images = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        # The untrained head draws from the global stream, which may be the caller's generator.
        load, told = classifier_class(pooling, reads_images), transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a missing head is no news: it is what is generated
        try:
            with torch.random.fork_rng(devices=[]):
                model, found = load(name, revision=revision, output_loading_info=True, **kwargs)
        finally:
            transformers_logging.set_verbosity(told)
        if missing := sorted(key for key in found["missing_keys"] if key.split(".")[0] not in HEAD_NAMES):
            raise ValueError(
                f"{name} has no weights {missing}, which a {type(model).__name__} reads: they would be random. Expected a "
                f"checkpoint that has them{'' if reads_images else ', or another pooling, such as mean'}."
            )
        processor = (AutoImageProcessor if reads_images else AutoTokenizer).from_pretrained(name, revision=revision)
        commit = None
        if not Path(name).is_dir():
            commit = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
        return cls(model, processor, name_or_path or name, pooling, max_length, commit)

    @classmethod
    def suited(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> "FrozenBackbone":
        """Load a model with the pooling that suits it: a causal language model says the label, images and whatever
        transformers' own classifier reads whole have `"default"`, and other encoders the mean. `kwargs` are those of
        [`FrozenBackbone.from_pretrained`]."""
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or []):
            return cls.from_pretrained(pretrained_model_name_or_path, "last_token", **kwargs)
        try:
            return cls.from_pretrained(pretrained_model_name_or_path, "default", **kwargs)
        except ValueError:  # no linear head, or no weights for what stands before it
            if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
                raise  # images have no other pooling
            return cls.from_pretrained(pretrained_model_name_or_path, "mean", **kwargs)

    @classmethod
    def of(cls, base_model: dict[str, Any], pretrained_model_name_or_path: str | None = None) -> "FrozenBackbone":
        """Load the backbone that adapters were made for, in float32, in which they were made, by its record in the
        config of [`AdapterCodec`]. From another place its main branch is loaded."""
        name = base_model["name_or_path"]
        place = pretrained_model_name_or_path or name
        revision = base_model.get("revision") if place == name else None  # early records have none
        return cls.from_pretrained(
            place, base_model["pooling"], name, base_model["max_length"], revision, dtype=torch.float32
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of a stride through every weight of the encoder: the same weights under any name have the same
        one."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.base_model.state_dict().items()):
            sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].to(torch.float32).cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """What generators and adapters remember of it; [`FrozenBackbone.of`] loads it again."""
        names = ("name_or_path", "revision", "fingerprint", "pooling", "max_length", "model_class")
        return {name: getattr(self, name) for name in names}

    def check(self, wanted: dict[str, Any]) -> None:
        """Refuse a record of other weights, pooling or class, naming both. A commit of the Hub with the same
        weights is the same backbone."""
        found = self.record
        if any(wanted[key] != found[key] for key in ("fingerprint", "pooling", "model_class")):
            of = "{model_class} {name_or_path!r} (revision {revision}, weights {fingerprint}, pooling {pooling!r})"
            raise ValueError(
                f"The adapters are for the {of.format(**{'revision': None} | wanted)}, but the backbone is the "
                f"{of.format(**found)}. Load the backbone and the revision that they were made for."
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def classifier(self, num_labels: int) -> PreTrainedModel:
        """A copy of the backbone with an untrained head of `num_labels` classes, to train or to load an adapter into.

        A language model keeps its head, which has words for all classes.
        """
        model = copy.deepcopy(self.model)
        if not self.is_causal_lm:
            head = nn.Linear(self.feature_dim, num_labels, device=model.device, dtype=model.dtype)
            setattr(model, self.head_name, head)
            model.num_labels = model.config.num_labels = num_labels
        return model

    def tokens(self, examples: list[Any]) -> dict[str, Any]:
        """Examples as the model's inputs, texts not yet padded.

        Args:
            examples (`list`): Texts, pairs of texts, or PIL images. For a language model a pair is two lines, and the
                prompt for the label stands behind every text. An empty text, to which a decoder's tokenizer adds
                nothing, is its first special token alone, that of the beginning or else of the end.
        """
        if self.reads_images:
            images = [image.convert("RGB") for image in examples]
            # Said, because transformers guesses it from the sizes: wrongly where an image is 1 or 3 pixels high.
            return dict(self.processor(images, return_tensors="pt", input_data_format="channels_last"))
        room, suffix = self.max_length, {}
        if self.is_causal_lm:
            examples = ["\n".join(example) if isinstance(example, tuple) else example for example in examples]
            suffix = self.processor(ANSWER_PROMPT, add_special_tokens=False)
            room -= len(suffix["input_ids"])
        tokens = [self._tokens_of(example, room) for example in examples]
        if not self._told_of_cuts:
            self._tell_of_cuts(examples, tokens, room)
        return {key: [one[key] + suffix.get(key, []) for one in tokens] for key in tokens[0]}

    def _tokens_of(self, example: str | tuple[str, str], room: int) -> dict[str, list[int]]:
        """One example as `room` tokens at most."""
        texts = example if isinstance(example, tuple) else (example,)
        tokens = self.processor(*texts, truncation=True, max_length=room)
        if tokens["input_ids"]:
            return tokens
        # No token has no hidden state, and the mean of none is NaN.
        return self.processor(self.processor.bos_token or self.processor.eos_token)

    def _tell_of_cuts(self, examples: list[Any], tokens: list[dict[str, list[int]]], room: int) -> None:
        """Warn, once, of texts that do not fit into `room` tokens; only those that fill it can be such."""
        full = [example for example, own in zip(examples, tokens) if len(own["input_ids"]) == room]
        full = [example if isinstance(example, tuple) else (example,) for example in full]
        cut = sum(len(self.processor(*texts, verbose=False)["input_ids"]) > room for texts in full)
        if cut:
            self._told_of_cuts = True
            logger.warning(
                f"{cut} of {len(examples)} texts are longer than {self.max_length} tokens: what follows was not read, as in "
                "the generator's training. This is said once."
            )

    def pad(self, tokens: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Put what [`FrozenBackbone.tokens`] made into one batch on the backbone's device."""
        if not self.reads_images:
            # rows are cut behind their last token, whatever side the tokenizer prefers
            tokens = self.processor.pad(tokens, padding_side="right", return_tensors="pt")
        return {key: value.to(self.device) for key, value in tokens.items()}

    def inputs(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        """Examples as one batch of the model's inputs."""
        return self.pad(self.tokens(examples))

    def verbalizer(self, classes: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The verbalizer of a task: the rows `(classes, feature_dim)` of a language model's head for the first
        tokens of the class names, which must differ, and a bias of zeros `(classes,)`."""
        if not self.is_causal_lm:
            raise ValueError(
                f"{self.name_or_path!r} is no language model, so it has no words to classify by: its adapters need a head."
            )
        words = [self.processor(f" {name}", add_special_tokens=False)["input_ids"][0] for name in classes]
        if len(set(words)) < len(words):
            alike = [name for name, word in zip(classes, words) if words.count(word) > 1]
            raise ValueError(
                f"The class names {alike} begin with the same token, so the language model cannot tell them apart: "
                f"rename the classes."
            )
        weight = getattr(self.model, self.head_name).weight[words].float()
        return weight, weight.new_zeros(len(words))

    def verbalizers(self, classes: list[tuple[str, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The verbalizers of `N` tasks: weights `(N, classes, feature_dim)` and biases `(N, classes)`, zero for
        padding."""
        weights, biases = zip(*map(self.verbalizer, classes))
        return pad_sequence(weights, batch_first=True), pad_sequence(biases, batch_first=True)


def classifier_class(pooling: str, reads_images: bool = False):
    """The constructor of a model with the given pooling: name or path, keyword arguments -> `PreTrainedModel`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: expected one of {', '.join(map(repr, POOLINGS))}.")
    if reads_images and pooling != "default":
        raise ValueError(f"pooling is {pooling!r}: a backbone for images has its own, expected 'default'.")
    if pooling == "mean":
        return MeanPooledForSequenceClassification.from_backbone
    if pooling == "last_token":
        return AutoModelForCausalLM.from_pretrained
    return (AutoModelForImageClassification if reads_images else AutoModelForSequenceClassification).from_pretrained
