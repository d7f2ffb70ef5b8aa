"""Every tensor of a PEFT adapter: its key on disk, its shape, and the tokens that it is written as."""

import copy
import math
import re
from dataclasses import asdict, dataclass
from statistics import mode

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from .lora_config import read_lora_config


PREFIX = "base_model.model."
MATRICES = ("lora_A", "lora_B")
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear module.

    Attributes:
        name (`str`): Its name in the backbone.
        rank, in_features, out_features (`int`): `lora_A` is `(rank, in_features)`, `lora_B` `(out_features, rank)`.
        scaling (`float`): What PEFT multiplies `lora_B @ lora_A` with.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    scaling: float

    def key(self, matrix: str) -> str:
        return f"{PREFIX}{self.name}.{matrix}.weight"

    def shape(self, matrix: str) -> tuple[int, int]:
        return (self.rank, self.in_features) if matrix == "lora_A" else (self.out_features, self.rank)


@dataclass(frozen=True)
class TokenCoordinates:
    """Where a token lies in the backbone: layer index, kind of module, and its rank, the filled width."""

    layer: int
    module: int
    width: int


class AdapterLayout:
    """The tensors of a LoRA adapter, with a linear head or without. A module has one token, see [`AdapterCodec`].

    Args:
        modules (`list[LoraModule]`): The adapted modules, in the backbone's order.
        head_name (`str`, *optional*): The linear head that the adapter replaces; without one it is LoRA only.
        feature_dim (`int`): The width that the backbone's head reads.

    Example: `AdapterLayout.from_model(model, LoraConfig(task_type="SEQ_CLS",
    target_modules=["query"])).shapes(ways=3)`
    """

    def __init__(self, modules: list[LoraModule], head_name: str | None, feature_dim: int) -> None:
        self.modules = modules
        self.head_name = head_name
        self.feature_dim = feature_dim

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        lora_config: LoraConfig,
        head_name: str = "classifier",
    ) -> "AdapterLayout":
        """Read the layout off a live backbone, which is not changed, and a `LoraConfig`; PEFT itself says which
        tensors there are.

        The config may have any rank, `rank_pattern`, `alpha_pattern` and targets. The adapter has a head if PEFT
        saves one: `task_type="SEQ_CLS"` or `modules_to_save` ask for it. `head_name` is the module that is the
        backbone's linear head. A `ValueError` says that the config adapts anything but linear modules, or adds
        tensors other than LoRA matrices and the head.
        """
        if lora_config.bias != "none":
            raise ValueError(
                f"The LoraConfig has bias={lora_config.bias!r}: expected 'none', an adapter holds no biases."
            )
        empty = {
            id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
            for tensor in model.parameters()
        }
        config = copy.deepcopy(lora_config)
        # Wherever the backbone was loaded from: PEFT would warn that it is not the place that the config names.
        config.base_model_name_or_path = None
        with torch.random.fork_rng(devices=[]):  # PEFT initialises what is only counted here
            peft_model = get_peft_model(copy.deepcopy(model, empty), config)
        modules = []
        for name, module in peft_model.base_model.model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if not isinstance(module.get_base_layer(), nn.Linear):
                raise ValueError(f"{name} is a {type(module.get_base_layer()).__name__}: only nn.Linear is supported.")
            modules.append(
                LoraModule(
                    name, module.r["default"], module.in_features, module.out_features, module.scaling["default"]
                )
            )
        expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
        trained = any(key.startswith(f"{PREFIX}{head_name}.") for key in expected)
        feature_dim = model.get_submodule(head_name).in_features
        layout = cls(modules, head_name if trained else None, feature_dim)
        if expected != set(layout.keys):
            raise ValueError(
                f"The LoraConfig makes tensors that a layout does not hold: {sorted(expected ^ set(layout.keys))}. "
                f"Expected LoRA matrices, and in modules_to_save the head {head_name!r} or nothing."
            )
        return layout

    def check_lora_config(self, model: nn.Module, lora_config: dict, head_name: str) -> None:
        """Refuse a LoRA config, as `to_dict` gives it, that adapts or scales other modules of a backbone than this
        layout; PEFT itself is asked."""
        try:
            found = AdapterLayout.from_model(model, read_lora_config(lora_config), head_name)
        except Exception as error:  # a forged config can go wrong in any way, and each of them is the config's fault
            raise ValueError(f"The LoraConfig makes no adapter: {type(error).__name__}: {error}") from error
        if found.to_dict() != self.to_dict():
            differing = sorted({module.name for module in set(found.modules) ^ set(self.modules)})
            raise ValueError(
                f"The LoraConfig adapts or scales other modules than the layout: {differing}. Expected the same rank, "
                "lora_alpha and targets."
            )

    @property
    def head_keys(self) -> tuple[str, ...]:
        """The keys of the head's weight `(classes, feature_dim)` and bias `(classes,)`; none without a head."""
        if self.head_name is None:
            return ()
        return f"{PREFIX}{self.head_name}.weight", f"{PREFIX}{self.head_name}.bias"

    @property
    def lora_shapes(self) -> dict[str, tuple[int, int]]:
        """Key on disk -> shape, of every LoRA matrix in order."""
        return {module.key(matrix): module.shape(matrix) for module in self.modules for matrix in MATRICES}

    def shapes(self, ways: int) -> dict[str, tuple[int, ...]]:
        """Key on disk -> shape, of every tensor of an adapter for `ways` classes, the head last."""
        return self.lora_shapes | dict(zip(self.head_keys, [(ways, self.feature_dim), (ways,)]))

    @property
    def keys(self) -> list[str]:
        return [*self.lora_shapes, *self.head_keys]

    @property
    def numel(self) -> int:
        """How many numbers the LoRA matrices hold, without the head."""
        return sum(math.prod(shape) for shape in self.lora_shapes.values())

    @property
    def token_dim(self) -> int:
        """The width of a token: the greatest rank of a module."""
        return max(module.rank for module in self.modules)

    @property
    def tokens(self) -> list[TokenCoordinates]:
        """The coordinates of every token, one a module, in order."""
        kinds = list(dict.fromkeys(_LAYER_INDEX.sub(".", module.name) for module in self.modules))
        tokens = []
        for module in self.modules:
            index = _LAYER_INDEX.search(module.name)
            kind = kinds.index(_LAYER_INDEX.sub(".", module.name))
            tokens.append(TokenCoordinates(int(index.group(1)) if index else 0, kind, module.rank))
        return tokens

    def scaled(self, shared: dict[str, torch.Tensor], coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """The LoRA matrices `lora_B` and `diag(z) lora_A`, key on disk -> `(n, *shape)`, of one adapter, key -> `(1,
        *shape)`, and coefficients z `(n, modules, token_dim)`."""
        tensors = {}
        for module, own in zip(self.modules, coefficients.unbind(dim=1)):
            tensors[module.key("lora_A")] = own[:, : module.rank].unsqueeze(-1) * shared[module.key("lora_A")]
            tensors[module.key("lora_B")] = shared[module.key("lora_B")].expand(len(own), -1, -1)
        return tensors

    def check(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse adapters, key on disk -> `(adapters, *shape)`, of another layout, by the tensor that does not fit."""
        keys = dict.fromkeys(self.keys)
        missing = [key for key in keys if key not in tensors]
        extra = [key for key in tensors if key not in keys]
        if missing or extra:
            raise ValueError(f"The adapter does not fit the layout: missing {missing}, unexpected {extra}.")
        classes = tensors[self.head_keys[0]].shape[1] if self.head_keys else 0
        count = mode(len(tensors[key]) for key in keys)
        for key, shape in self.shapes(classes).items():
            if tuple(tensors[key].shape[1:]) != shape:
                raise ValueError(f"{key} has shape {tuple(tensors[key].shape[1:])} an adapter; expected {shape}.")
            if len(tensors[key]) != count:
                raise ValueError(f"{key} holds {len(tensors[key])} adapters, the others {count}.")

    def stack(self, adapters: list[dict[str, torch.Tensor]], ways: int) -> dict[str, torch.Tensor]:
        """Bring single adapters, key -> `shape`, into one stack, key -> `(n, *shape)`, their heads padded to `ways`."""
        tensors = {key: torch.stack([one[key] for one in adapters]) for key in self.lora_shapes}
        for key in self.head_keys:
            heads = [one[key] for one in adapters]
            tensors[key] = torch.stack([torch.cat([h, h.new_zeros(ways - len(h), *h.shape[1:])]) for h in heads])
        return tensors

    def unstack(self, tensors: dict[str, torch.Tensor], ways: list[int]) -> list[dict[str, torch.Tensor]]:
        """Cut a stack into single adapters on the CPU, each with the head of its own number of classes."""
        tensors, layout = {key: value.cpu() for key, value in tensors.items()}, torch.contiguous_format
        return [
            {
                key: value[index, : classes if key in self.head_keys else None].clone(memory_format=layout)
                for key, value in tensors.items()
            }
            for index, classes in enumerate(ways)
        ]

    def to_dict(self) -> dict:
        """A JSON form, for a config. [`AdapterLayout.from_dict`] reads it."""
        return {
            "modules": [asdict(module) for module in self.modules],
            "head_name": self.head_name,
            "feature_dim": self.feature_dim,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "AdapterLayout":
        """Read what [`AdapterLayout.to_dict`] wrote, and refuse anything else."""
        try:
            modules = [LoraModule(**module) for module in values["modules"]]
            layout = cls(**{**values, "modules": modules})
            sizes = [layout.feature_dim]
            sizes += [size for one in modules for size in (one.rank, one.in_features, one.out_features)]
            names = [layout.head_name or "", *(one.name for one in modules)]
        except (TypeError, KeyError) as error:
            raise ValueError(f"It is no layout of adapters: {type(error).__name__}: {error}.") from error
        if not modules or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError(f"It is no layout of adapters: its modules are {names}, expected different names.")
        if wrong := [size for size in sizes if type(size) is not int or size < 1]:
            raise ValueError(f"It is no layout of adapters: its sizes hold {wrong}, expected whole numbers from 1 on.")
        if wrong := [one.scaling for one in modules if type(one.scaling) not in (int, float)]:
            raise ValueError(f"It is no layout of adapters: its scalings hold {wrong}, expected numbers.")
        return layout
