"""What a pipeline does with adapters that it generated: choose, classify, train further."""

import os
from typing import Any

import torch

from ..adapters.codec import AdapterCodec
from ..adapters.generated import GeneratedAdapter, as_adapter
from ..adapters.prediction import predict
from ..adapters.stacked import StackedLora
from ..backbones.frozen import FrozenBackbone
from .checks import check_continues
from .pipeline_output import MCDiPipelineOutput
from .refinement import refine_adapters
from .selection import Selector


class AdapterUseMixin:
    """For a pipeline with a `codec`, a `backbone` and a stack of adapters on it, whose call generates."""

    codec: AdapterCodec
    backbone: FrozenBackbone
    stacked: StackedLora

    @torch.no_grad()
    def select(self, output: MCDiPipelineOutput) -> MCDiPipelineOutput:
        """Choose for each task among its candidates, their mean, the shared adapter and the frozen backbone, all with
        heads in closed form. It is the recommended call. A refinement is dropped.

        From two examples of a class on the choice goes by cross-validation on the support set: by the number of right
        answers, and where these are as many, by the loss at each option's best temperature. For a fold the candidates
        are generated anew without it, from the same noise. With one example of a class the mean of the candidates is
        kept. `output` is that of a call with `output_type="peft"`; the `details` of the adapters say what was chosen.

        Example: `pipe.select(pipe(support, num_candidates=8)).adapters[0]`
        """
        check_continues(output, "select")
        selector = Selector(self.stacked, self.codec, self)
        return MCDiPipelineOutput(adapters=selector.select(output), draws=output.draws)

    def predict(
        self, adapter: GeneratedAdapter | str | os.PathLike, examples: list[Any], top_k: int | None = 1
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Classify texts, pairs of texts or PIL images by an adapter, or that of a folder or a Hub id, on the pipeline's
        backbone. Returned is what transformers' `pipeline("text-classification")` returns, see [`predict`]. A `ValueError`
        says that the adapter is for another backbone or of another layout.

        Example: `pipe.predict(pipe(support).adapters[0], ["my parcel is late"])` gives `[{"label": ..., "score": ...}]`
        """
        adapter = as_adapter(adapter)
        self.backbone.check(adapter.base_model)
        self.codec.layout.check({key: value.unsqueeze(0) for key, value in adapter.tensors.items()})
        return predict(self.stacked, adapter.tensors, adapter.labels, examples, top_k)

    def refine(
        self, output: MCDiPipelineOutput, num_steps: int = 5, learning_rate: float = 1e-3
    ) -> MCDiPipelineOutput:
        """Train adapters further on their support sets, by `num_steps` steps of Adam, each on the whole support, with
        a linear decay to zero. `output` is that of a call with `output_type="peft"`, of
        [`MCDiPipeline.select`], or of this.

        Example: `pipe.refine(pipe(support), num_steps=5).adapters[0]`
        """
        check_continues(output, "refine")
        adapters = refine_adapters(self.stacked, output, num_steps, learning_rate)
        return MCDiPipelineOutput(adapters=adapters, draws=output.draws)
