"""One fold of an experiment: its generators, its data, and what methods train on the training tasks."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from generators import Generator
from safetensors.torch import load_file, save
from splits import Memory, Sizes, Split, Tensors, sources_below

from mcdi_hf import EpisodeSampler, FrozenBackbone, LabelledRows, MCDiPipeline, Source, load_trajectories
from mcdi_hf.data.encoded import EncodedExamples
from mcdi_hf.data.sources import inputs_of, training_table
from mcdi_hf.trajectories.dataset import final_adapters
from mcdi_hf.trajectories.shared import imprint_scale_for, initial_adapter
from mcdi_hf.utils.files import write_file


@dataclass(frozen=True)
class Training:
    """What a generator learnt from, for methods that learn from the same.

    Attributes:
        examples (`EncodedExamples`), rows (`LabelledRows`): The training examples, and the tasks that they make.
        ways (`tuple[int, int]`): The least and the greatest number of classes.
        supports (`list`): The rows of every training task, by class.
        adapters (`dict[str, torch.Tensor]`): The training adapters' LoRA matrices, key -> `(training tasks, *shape)`.
        shared_start (`dict`): The `steps`, `shots` and `learning_rate` of the adapter that all of them start from.
    """

    examples: EncodedExamples
    rows: LabelledRows
    ways: tuple[int, int]
    supports: list
    adapters: Tensors
    shared_start: dict

    def sampler(self, shots: tuple[int, int], queries: int, seed: int) -> EpisodeSampler:
        return EpisodeSampler(self.rows, self.ways, shots, queries, seed)


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
        self.frozen = initial_adapter(self.codec.layout)  # does nothing: lora_B is zero
        self.frozen_scale = imprint_scale_for(self.stacked, self.frozen, self.split("validation").examples)

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
        return Split(name, pipe.stacked, pipe.codec, views, sources, judged, splits, self.args.cache_dir)

    def _check_unseen(self, sources: list[Source], domains: list[str]) -> None:
        """Refuse domains that were trained on; another data set may call its domains the same."""
        description = self._trajectories()[1]
        known = {one.dataset_name for one in sources_below(self.args.data_root, description["sources"])}
        shared = sorted(set(domains) & set(description["train_domains"]))
        if shared and any(one.dataset_name in known for one in sources):
            raise ValueError(f"The generators of {self.generator.name!r} were trained on {shared}: judge on others.")

    def _trajectories(self) -> tuple:
        layout = self.pipeline("Mc-Di", self.generator.seeds[0]).codec.layout
        return self.once("trajectories", lambda: load_trajectories(str(self.generator.trajectories), layout))

    @property
    def training(self) -> Training:
        """The training tasks; a generator without trajectories has none to show."""
        return self.once("training", self._training)

    def _training(self) -> Training:
        trajectories, description = self._trajectories()
        sources = sources_below(self.args.data_root, description["sources"])
        table, spans = training_table(description | {"sources": [vars(one) for one in sources]})
        rows = LabelledRows(table, "label", "group", spans["train"], "domain")
        examples = self.stacked.encode(inputs_of(table), cache_dir=self.args.cache_dir)
        ends = final_adapters(trajectories, self.codec.layout)
        adapters = {key: torch.cat([end[key] for end in ends]) for key in self.codec.layout.lora_shapes}
        ways, supports = tuple(description["tasks"]["ways"]), trajectories["support"][:]
        return Training(examples, rows, ways, supports, adapters, description["shared_start"])

    def kept(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors that are made once, and kept in a file beside the generators."""

        def load() -> Tensors:
            path = self.generator.folder / f"{name}.safetensors"
            if not path.exists():
                content = save(make())
                write_file(path, lambda file: file.write(content))
            return load_file(path)

        return self.once(name, load)
