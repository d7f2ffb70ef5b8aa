"""One fold of an experiment: its generators, its data, and what methods train on the training tasks."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from generators import Generator
from safetensors.torch import load_file, save
from splits import Memory, Sizes, Split, Tensors, sources_below

from mcdi_hf import FrozenBackbone, LabelledRows, MCDiPipeline, Source, load_trajectories
from mcdi_hf.adapters.head import RidgeHead
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.data.episodes import SupportBatch
from mcdi_hf.data.sources import inputs_of, training_table
from mcdi_hf.data.stacks import StackSampler, stack_sampler
from mcdi_hf.trajectories.dataset import local_targets
from mcdi_hf.utils.files import write_file


@dataclass(frozen=True)
class Training:
    """What a generator learnt from, for methods that learn from the same.

    Attributes:
        examples (`EncodedExamples`), rows (`LabelledRows`): The training examples, and the tasks that they make.
        inputs (`Callable`): Rows -> their texts, pairs of texts or images.
        sampler (`StackSampler`): Draws tasks as the shared start saw them.
        supports (`list`): The rows of every training task, by class.
        coefficients (`torch.Tensor`): Of the training adapters: `(training tasks, num_tokens, token_dim)`.
        shared_start (`dict`): The `steps`, `tasks_per_step` and `learning_rate` of the adapter that all start from.
    """

    examples: EncodedExamples
    rows: LabelledRows
    inputs: Callable[[list[int]], list]
    sampler: StackSampler
    supports: list
    coefficients: torch.Tensor
    shared_start: dict


class Fold(Memory):
    """The generators of one fold on the data of one experiment.

    Args:
        generator (`Generator`): What is judged.
        config (`dict`): The experiment's.
        sizes (`Sizes`): See there.
        args (`argparse.Namespace`): The command's `data_root` and `cache_dir`.
    """

    def __init__(self, generator: Generator, config: dict, sizes: Sizes, args: argparse.Namespace) -> None:
        super().__init__()
        self.generator, self.config, self.sizes, self.args = generator, config, sizes, args
        self.backbone_folder = generator.backbone
        pipe = self.pipeline("Mc-Di", generator.seeds[0])
        self.backbone, self.stacked, self.codec = pipe.backbone, pipe.stacked, pipe.codec
        self.frozen = self.codec.frozen_adapter()

    def pipeline(self, objective: str, seed: int) -> MCDiPipeline:
        """A generator, all of them on one backbone."""

        def load() -> MCDiPipeline:
            pipe = MCDiPipeline.from_pretrained(self.generator.pipelines[objective, seed])
            pipe.set_progress_bar_config(disable=True)
            base_model = pipe.codec.config.base_model
            pipe.backbone = self.once("backbone", lambda: FrozenBackbone.of(base_model, self.backbone_folder))
            return pipe

        return self.once((objective, seed), load)

    def split(self, name: str) -> Split:
        """The `"validation"` or the `"test"` examples."""
        return self.once(name, lambda: self._split(name))

    def _split(self, name: str) -> Split:
        config, judged = self.config, getattr(self.generator, f"{name}_domains")
        given = config["sources"]
        if name == "validation":
            given = config.get("validation_sources", given)
        else:
            judged = config.get("test_domains", judged)
        own = config.get(f"{name}_split", config["split"])
        splits = [own, config["query_split"]] if "query_split" in config else [own]
        sources = sources_below(self.args.data_root, given)
        pipe = self.pipeline("Mc-Di", self.generator.seeds[0])
        if self.generator.trajectories is not None:
            self._check_unseen(sources, judged)
        views = pipe.config.support_views
        queries = self.sizes.queries
        return Split(name, pipe.stacked, pipe.codec, views, sources, judged, splits, queries, self.args.cache_dir)

    def _check_unseen(self, sources: list[Source], domains: list[str]) -> None:
        """Refuse domains that were trained on; another data set may call its domains the same."""
        description = self._trajectories()[1]
        known = {one.dataset_name for one in sources_below(self.args.data_root, description["sources"])}
        shared = sorted(set(domains) & set(description["train_domains"]))
        if shared and any(one.dataset_name in known for one in sources):
            raise ValueError(f"The generators of {self.generator.name!r} were trained on {shared}: judge on others.")

    def _trajectories(self) -> tuple:
        return self.once("trajectories", lambda: load_trajectories(str(self.generator.trajectories)))

    @property
    def training(self) -> Training:
        """The training tasks; a generator without trajectories has none to show."""
        return self.once("training", self._training)

    def _training(self) -> Training:
        trajectories, description, codec = self._trajectories()
        sources = sources_below(self.args.data_root, description["sources"])
        own = {"sources": [vars(one) for one in sources]}
        own["exclude_texts_of"] = [
            str(self.args.data_root / Path(one).name) for one in description["exclude_texts_of"]
        ]
        table = training_table(description | own)[0]
        rows = LabelledRows(table, "label", "group", None, "domain", description["tasks"]["min_rows"])
        inputs = inputs_of(table)
        examples = self.stacked.encode(inputs, cache_dir=self.args.cache_dir)
        coefficients = local_targets(trajectories, codec)[:, -1].to(self.stacked.device)
        sampler = stack_sampler(rows, sources, description["tasks"], inputs, description["tasks"]["seed"])
        start, supports = description["shared_start"], trajectories["support"][:]
        return Training(
            examples, rows, lambda own: [inputs[row] for row in own], sampler, supports, coefficients, start
        )

    @property
    def mixed_precision(self) -> str:
        """What the trajectories were made in, and so the rivals that are trained on gradients: `"no"` or `"bf16"`."""
        return self._trajectories()[1]["settings"]["mixed_precision"] if self.generator.trajectories else "no"

    @torch.no_grad()
    def whole(self, matrices: Tensors, head: RidgeHead, support: SupportBatch) -> Tensors:
        """One adapter's matrices, key -> `(1, *shape)`, for each task of a support, with the head in closed form that they
        make of it; a language model needs none."""
        own = {key: value.to(self.stacked.device).repeat(len(support), 1, 1) for key, value in matrices.items()}
        if self.backbone.is_causal_lm:
            return own
        return own | dict(zip(self.codec.layout.head_keys, self.stacked.heads(support, head, own)))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.stacked.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def kept(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors that are made once, and kept in a file beside the generators."""

        def load() -> Tensors:
            path = self.generator.folder / f"{name}.safetensors"
            if not path.exists():
                content = save(make())
                write_file(path, lambda file: file.write(content))
            return load_file(path)

        return self.once(name, load)
