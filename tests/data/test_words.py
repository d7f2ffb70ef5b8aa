"""Word tasks out of any texts."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from scripts import write_split

from mcdi_hf import Source
from mcdi_hf.data.sources import load_table, training_table
from mcdi_hf.data.words import EXAMPLES_PER_WORD, TOKEN, WINDOW, mask_words


WORDS = ["common", "usual", "rare", "seldom"]


def texts(rows: int = 400, length: int = 60) -> Dataset:
    """Long texts of two labels, in which two words are in nearly all texts and two in few."""
    random, found = np.random.default_rng(0), []
    for row in range(rows):
        own = [f"Filler{number}" for number in random.integers(10**6, size=length)]
        own += [word for word, share in zip(WORDS, (0.9, 0.8, 0.14, 0.13)) if random.random() < share]
        found.append(" ".join(random.permutation(own)))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    return Dataset.from_dict({"text": found, "label": [row % 2 for row in range(rows)]}, features=features)


def test_every_word_has_as_many_windows_without_it() -> None:
    table = texts()
    made = mask_words(table, "text", 4, "[MASK]")
    assert made.features["word"].names == sorted(WORDS) and len(made) == 4 * EXAMPLES_PER_WORD
    counts = np.bincount(made["word"][:])
    assert counts.tolist() == [EXAMPLES_PER_WORD] * 4
    for text, number in zip(made["text"][:], made["word"][:]):
        tokens = text.split()
        assert "[MASK]" in tokens and made.features["word"].int2str(number) not in tokens
        assert len(tokens) <= WINDOW and text.replace("[MASK]", "") == text.replace("[MASK]", "").lower()


def test_the_other_columns_stay_those_of_the_text() -> None:
    table = texts()
    labels = {" ".join(TOKEN.findall(text.lower())): label for text, label in zip(table["text"][:], table["label"][:])}
    made = mask_words(table, "text", 2, "<mask>")
    for text, number, label in zip(made["text"][:], made["word"][:], made["label"][:]):
        whole = text.replace("<mask>", made.features["word"].int2str(number))
        assert any(whole in known and own == label for known, own in labels.items())


def test_words_are_drawn_over_all_frequencies_and_the_same_again() -> None:
    table = texts()
    two = mask_words(table, "text", 2, "[MASK]", seed=1).features["word"].names
    assert len(set(two) & {"common", "usual"}) == 1  # one of many texts, one of few
    first, again, other = (mask_words(table, "text", 4, "[MASK]", seed=seed)["text"][:] for seed in (0, 0, 1))
    assert first == again != other


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 words stand in 40 of 20 texts: expected two or more"):
        mask_words(texts(20), "text", 4, "[MASK]")


def test_two_sources_of_the_same_words_have_the_same_rows(tmp_path: Path) -> None:
    write_split(tmp_path / "texts", "train", texts())
    sources = [
        Source(str(tmp_path / "texts"), name="word", label_column="word", words=4),
        Source(str(tmp_path / "texts"), name="label without a word", words=4),
    ]
    table, _ = load_table(sources, ["train"], None)
    inputs = table["input"][:]
    assert inputs[: len(inputs) // 2] == inputs[len(inputs) // 2 :]


def test_a_text_of_a_test_set_is_left_out_before_its_words_are_masked(tmp_path: Path) -> None:
    table = texts()
    write_split(tmp_path / "texts", "train", table)
    rare = table.filter(lambda row: "rare" in row["text"].split())
    write_split(tmp_path / "test_set", "test", rare)
    source = Source(str(tmp_path / "texts"), label_column="word", words=5, name="word")
    where = {"sources": [asdict(source)], "splits": ["train"], "train_domains": None, "rotations": False}
    whole, _, none = training_table(where | {"exclude_texts_of": []})
    made, _, removed = training_table(where | {"exclude_texts_of": [str(tmp_path / "test_set")]})
    assert (none, removed) == (0, len(rare))
    assert set(whole.features["label"].names) - set(made.features["label"].names) == {"rare"}


@pytest.mark.parametrize(
    "values, message",
    [({"words": 1}, "words is 1"), ({"weight": 0.0}, "weight is 0.0"), ({"weight": float("nan")}, "weight is nan")],
)
def test_a_bad_source_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source("anything", **values)
