"""A frozen backbone: what it loads, how it names itself, and what it makes of examples."""

import shutil
from collections.abc import Callable

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import create_repo, upload_folder
from scripts import save_backbone
from tiny import frozen_features, tiny_backbone, tiny_backbone_folder, tiny_image_backbone, tiny_language_model
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from mcdi_hf import FrozenBackbone, MeanPooledForSequenceClassification


TEXTS = ["a b c d e f", "x", "m n", "q r s t"]


@pytest.mark.parametrize("causal", [True, False])
def test_an_empty_text_has_a_token(causal: bool) -> None:
    """A decoder's tokenizer adds no token of its own, and data sets do hold empty texts."""
    backbone = tiny_language_model()
    backbone.is_causal_lm = causal  # a classifier on a decoder has no prompt behind its texts
    prompt = backbone.tokens(["a"])["input_ids"][0][1:]
    (ids,) = backbone.tokens([""])["input_ids"]
    assert ids == [backbone.processor.eos_token_id, *prompt] and bool(prompt) == causal
    backbone.processor.bos_token = "[UNK]"
    assert backbone.tokens([""])["input_ids"][0][0] == backbone.processor.bos_token_id


def test_fingerprint_is_of_the_weights_and_not_of_the_name() -> None:
    folder = tiny_backbone_folder()
    named = FrozenBackbone.from_pretrained(folder, name_or_path="somebody/else")
    assert named.fingerprint == tiny_backbone().fingerprint != tiny_backbone(seed=1).fingerprint
    changed = tiny_backbone()
    changed.model.backbone.encoder.layer[0].output.dense.bias.data += 1e-3
    assert changed.fingerprint != named.fingerprint


def test_mean_pooled_classifier_is_the_mean_of_the_tokens_and_loads_by_its_auto_class(tmp_path) -> None:
    backbone = tiny_backbone()
    inputs = backbone.inputs(TEXTS)
    states = AutoModel.from_pretrained(tiny_backbone_folder())(**inputs).last_hidden_state
    for row, (own, mask) in enumerate(zip(states, inputs["attention_mask"])):
        mean = own[mask.bool()].mean(dim=0)
        torch.testing.assert_close(frozen_features(backbone, TEXTS)[row], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    model = backbone.classifier(num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, MeanPooledForSequenceClassification) and loaded.config.num_labels == 3
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    loss = model(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss
    expected = nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(loss, expected)


def test_a_backbone_remembers_the_commit_that_it_is_of(hub: FakeHub) -> None:
    create_repo("tester/encoder")
    commits = []
    for seed in (0, 1):
        commits.append(upload_folder(repo_id="tester/encoder", folder_path=tiny_backbone_folder(seed)).oid)
    newest, first = (FrozenBackbone.from_pretrained("tester/encoder", revision=one) for one in (None, commits[0]))
    assert newest.revision == commits[1] != commits[0] == first.revision
    assert newest.fingerprint == tiny_backbone(seed=1).fingerprint and first.fingerprint == tiny_backbone().fingerprint
    assert tiny_backbone().revision is None
    record = {"name_or_path": "tester/encoder", "revision": commits[0], "pooling": "mean", "max_length": 32}
    again = FrozenBackbone.of(record)
    assert (again.revision, again.fingerprint, again.max_length) == (commits[0], first.fingerprint, 32)
    moved = FrozenBackbone.of(record, tiny_backbone_folder(1))  # no commit of the Hub is in a folder
    assert moved.revision is None and moved.name_or_path == "tester/encoder"


def test_the_backbone_of_adapters_is_in_float32_as_they_are(tmp_path) -> None:
    language_model = tiny_language_model()
    language_model.model.to(torch.bfloat16)
    place = str(save_backbone(language_model, tmp_path))
    assert FrozenBackbone.from_pretrained(place, "last_token").model.dtype == torch.bfloat16
    record = {"name_or_path": place, "revision": None, "pooling": "last_token", "max_length": 32}
    assert FrozenBackbone.of(record).model.dtype == torch.float32


def test_images_have_a_pooling_of_their_own(tmp_path) -> None:
    backbone = tiny_image_backbone()
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    loaded = FrozenBackbone.from_pretrained(str(tmp_path), pooling="default")
    assert loaded.reads_images and loaded.fingerprint == backbone.fingerprint
    with pytest.raises(ValueError, match="'mean': a backbone for images has its own"):
        FrozenBackbone.from_pretrained(str(tmp_path))


def test_bad_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="'max'.*'mean'"):
        FrozenBackbone.from_pretrained(tiny_backbone_folder(), pooling="max")
    folder = tiny_backbone_folder()
    with pytest.raises(ValueError, match="has no linear head"):
        FrozenBackbone(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder)


def test_the_verbalizer_of_a_task_is_rows_of_the_head() -> None:
    backbone = tiny_language_model()
    ids = backbone.processor.convert_tokens_to_ids
    weight, bias = backbone.verbalizer(("b a", "c"))
    assert weight.equal(backbone.model.lm_head.weight[ids(["b", "c"])]) and bias.equal(torch.zeros(2))
    weights, biases = backbone.verbalizers([("b a", "c"), ("a", "b", "c")])
    assert weights.shape == (2, 3, 16) and biases.shape == (2, 3)
    assert weights[0, :2].equal(weight) and not weights[0, 2].any()
    with pytest.raises(ValueError, match=r"\['b a', 'b c'\] begin with the same token.*rename"):
        backbone.verbalizer(("b a", "x", "b c"))
    with pytest.raises(ValueError, match="no language model.*need a head"):
        tiny_backbone().verbalizer(("a", "b"))


def test_a_pooler_that_the_checkpoint_lacks(tmp_path) -> None:
    """Without one the mean is the same in every process; the plain classifier, which reads it, is refused."""
    folder = str(shutil.copytree(tiny_backbone_folder(), tmp_path / "bert"))
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    first, again = (FrozenBackbone.from_pretrained(folder) for _ in range(2))
    assert first.fingerprint == again.fingerprint == tiny_backbone().fingerprint
    with pytest.raises(ValueError, match=r"has no weights \['bert.pooler.dense.bias'.*pooling, such as mean"):
        FrozenBackbone.from_pretrained(folder, pooling="default")


def test_loading_leaves_the_callers_random_numbers_alone_and_reports_no_missing_head(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    tiny_backbone("default")
    assert torch.rand(1).equal(expected) and not caplog.records


@pytest.mark.parametrize("make", [tiny_backbone, tiny_language_model])
def test_cut_texts_are_told_once(make: Callable, caplog: pytest.LogCaptureFixture) -> None:
    backbone = make()
    backbone.max_length = 8
    prompt = 2 if backbone.is_causal_lm else -2  # a language model's prompt takes room, BERT adds two tokens
    fits = " ".join("abcdefgh"[: backbone.max_length - abs(prompt)])
    backbone.tokens([fits, "a"])
    assert not caplog.records
    backbone.tokens([fits + " z", fits + " y", fits])
    backbone.tokens([fits + " z"])
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 texts are longer than 8 tokens")
