"""What diffusers is told of this package, and what is said when it cannot be told."""

import diffusers
import pytest
from diffusers.pipelines import pipeline_loading_utils

from mcdi_hf import LocalConsistencyScheduler, MCDiPipeline
from mcdi_hf._registration import register


def test_diffusers_knows_the_classes_by_their_names() -> None:
    assert diffusers.MCDiPipeline is MCDiPipeline
    assert diffusers.LocalConsistencyScheduler is LocalConsistencyScheduler
    assert LocalConsistencyScheduler in LocalConsistencyScheduler().compatibles
    classes = pipeline_loading_utils.LOADABLE_CLASSES
    assert classes["mcdi_hf"] == classes["diffusers"]


@pytest.mark.parametrize("left", [None, {}], ids=["no registry", "a registry of other keys"])
def test_a_diffusers_that_keeps_its_registry_elsewhere(monkeypatch: pytest.MonkeyPatch, left: dict | None) -> None:
    if left is None:
        monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    else:
        monkeypatch.setattr(pipeline_loading_utils, "LOADABLE_CLASSES", left)
    with pytest.raises(ImportError, match=f"diffusers {diffusers.__version__} has no .*LOADABLE_CLASSES.*setup.cfg"):
        register(MCDiPipeline, LocalConsistencyScheduler)
    assert not left


def test_a_diffusers_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcdi_hf._registration.LOADABLE", "diffusers.pipelines.moved")
    with pytest.raises(ImportError, match=r"has no diffusers\.pipelines\.moved\.LOADABLE_CLASSES"):
        register(MCDiPipeline, LocalConsistencyScheduler)
