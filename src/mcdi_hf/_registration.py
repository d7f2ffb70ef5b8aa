"""What diffusers must know of this package: the only module that touches its internals."""

import importlib
import logging

import diffusers


LOADABLE = "diffusers.pipelines.pipeline_loading_utils"


def register(pipeline_class: type, scheduler_class: type) -> None:
    """Make diffusers load our classes by their names, or raise an `ImportError` where it keeps its registry somewhere
    else.

    Saved pipelines then name their components as `["mcdi_hf", "MCDiDenoiser"]`, whatever file the class lives in,
    and load from the Hub; `DiffusionPipeline.from_pretrained` finds the pipeline, and `scheduler.compatibles` the
    scheduler.
    """
    try:
        classes = importlib.import_module(LOADABLE).LOADABLE_CLASSES
        classes["mcdi_hf"] = classes["diffusers"]
    except (ImportError, AttributeError, KeyError) as error:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {LOADABLE}.LOADABLE_CLASSES, which mcdi_hf registers its classes "
            "in: install a version of diffusers that this version of mcdi_hf was tested with, see its setup.cfg."
        ) from error
    # diffusers warns of an empty list whenever a pipeline changes its dtype.
    logging.getLogger("diffusers.models.modeling_utils").addFilter(
        lambda record: "kept in float32: []" not in record.getMessage()
    )
    for one in (pipeline_class, scheduler_class):
        setattr(diffusers, one.__name__, one)
