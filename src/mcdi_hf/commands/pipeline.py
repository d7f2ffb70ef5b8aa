"""The generator that a command was given."""

from ..pipelines.pipeline_mcdi import MCDiPipeline


def load_pipeline(name_or_path: str, base_model_name_or_path: str | None) -> MCDiPipeline:
    """Load a pipeline, quietly, with its backbone from another place if one is named."""
    pipe = MCDiPipeline.from_pretrained(name_or_path)
    if base_model_name_or_path:  # else the pipeline's own config says where
        pipe.register_to_config(base_model_name_or_path=base_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    return pipe
