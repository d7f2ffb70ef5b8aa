"""Hidden states of the frozen layers, to the bit: computed, written and read."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone, tiny_image_backbone, tiny_image_dataset
from versions import VIT_MODULE

from mcdi_hf import FrozenBackbone
from mcdi_hf.backbones.layers import LowerLayers
from mcdi_hf.data.encoded import EncodedExamples


TEXTS = ["a b c d e f", "x", "m n", "q r s t", "z y", ("a b", "c")]
ROWS = torch.tensor([3, 0, 0, 5, 1])


def texts_below(backbone: FrozenBackbone, layer: int = 1) -> LowerLayers:
    return LowerLayers(backbone, [f"backbone.encoder.layer.{layer}.attention.self.query"])


def assert_same(one: EncodedExamples, other: EncodedExamples) -> None:
    assert one.hidden_states.dtype == other.hidden_states.dtype and one.hidden_states.equal(other.hidden_states)
    assert len(one) == len(other) and one.lengths(ROWS).equal(other.lengths(ROWS))
    left, right = one[ROWS], other[ROWS]
    assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_the_same_to_the_bit_computed_written_and_read(dtype: torch.dtype, tmp_path: Path) -> None:
    seen = {"computed": [], "written": [], "read": []}
    found = {}
    for name, folder in (("computed", None), ("written", tmp_path / "new"), ("read", str(tmp_path / "new"))):
        backbone = tiny_backbone()
        backbone.model.to(dtype)
        lower = texts_below(backbone)
        found[name] = lower(TEXTS, 4, num_views=2, on_batch=seen[name].append, cache_dir=folder)
    assert seen == {"computed": [4, 2], "written": [4, 2], "read": [6]}
    assert found["read"].hidden_states.dtype == dtype and len(found["read"]) == 3
    assert_same(found["computed"], found["written"])
    assert_same(found["computed"], found["read"])
    (file,) = (tmp_path / "new").glob("*.npy")
    assert file.stat().st_size == 128 + found["read"].hidden_states.nbytes


def test_no_padding_is_kept_and_rows_are_padded_with_zeros() -> None:
    backbone = tiny_backbone()
    examples = texts_below(backbone)(TEXTS, batch_size=2)
    counts = [len(ids) for ids in backbone.tokens(TEXTS)["input_ids"]]
    assert examples.hidden_states.shape == (sum(counts), 16)
    assert examples.lengths(torch.arange(6)).tolist() == counts
    inputs = examples[ROWS]
    assert inputs["inputs_embeds"].shape == (5, max(counts), 16)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [counts[row] for row in ROWS]
    for row, embedded, mask in zip(ROWS, inputs["inputs_embeds"], inputs["attention_mask"]):
        assert mask.tolist() == [1] * counts[row] + [0] * (max(counts) - counts[row])
        assert not embedded[counts[row] :].any()
        own = examples[row.unsqueeze(0)]["inputs_embeds"][0]
        assert embedded[: counts[row]].equal(own) and own.any(dim=1).all()
        (alone,) = texts_below(backbone)([TEXTS[row]])[torch.tensor([0])]["inputs_embeds"]
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-6)


def test_images_are_the_same_to_the_bit(tmp_path: Path) -> None:
    images = tiny_image_dataset()["image"][:]
    names = [VIT_MODULE]
    plain, written, read = (
        LowerLayers(tiny_image_backbone(), names)(images, 5, cache_dir=folder) for folder in (None, tmp_path, tmp_path)
    )
    assert plain.counts is None and read.hidden_states.shape == (12, 5, 16)
    assert_same(plain, written)
    assert_same(plain, read)
    turned = [images[0].rotate(90), *images[1:]]
    LowerLayers(tiny_image_backbone(), names)(turned, 5, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_other_weights_layers_texts_or_batches_are_another_file(tmp_path: Path) -> None:
    first = texts_below(tiny_backbone())(TEXTS, cache_dir=tmp_path)
    changed = [
        texts_below(tiny_backbone(seed=1))(TEXTS, cache_dir=tmp_path),
        texts_below(tiny_backbone(), layer=2)(TEXTS, cache_dir=tmp_path),
        texts_below(tiny_backbone())([*TEXTS[:5], ("a", "b c")], cache_dir=tmp_path),  # the same words
        texts_below(tiny_backbone())(TEXTS, batch_size=3, cache_dir=tmp_path),
    ]
    assert len(list(tmp_path.glob("*.npy"))) == 5
    assert not any(one.hidden_states.equal(first.hidden_states) for one in changed[:3])
    assert_same(texts_below(tiny_backbone())(TEXTS, cache_dir=tmp_path), first)
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_what_was_interrupted_is_made_again(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    lower = texts_below(tiny_backbone())
    with pytest.raises(KeyboardInterrupt):
        lower(TEXTS, 2, on_batch=stop, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    assert_same(lower(TEXTS, 2, cache_dir=tmp_path), lower(TEXTS, 2))


def test_of_several_at_once_one_writes_and_the_others_read(tmp_path: Path) -> None:
    together, seen = threading.Barrier(3), [[], [], []]

    def encode(index: int, lower: LowerLayers) -> EncodedExamples:
        together.wait()
        return lower(TEXTS, 1, on_batch=seen[index].append, cache_dir=tmp_path)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(encode, range(3), [texts_below(tiny_backbone()) for _ in range(3)]))
    assert sorted(seen) == [[1] * 6, [6], [6]]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_who_writes_into_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    lower = texts_below(tiny_backbone())
    lower(TEXTS, cache_dir=tmp_path).hidden_states.zero_()
    assert_same(lower(TEXTS, cache_dir=tmp_path), lower(TEXTS))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        texts_below(tiny_backbone())(TEXTS, cache_dir=tmp_path / "file")
