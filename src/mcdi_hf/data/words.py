"""Tasks from any texts, without labels: tell apart which word is missing (SMLMT, Bansal et al. 2020)."""

import re
from collections import defaultdict

import numpy as np
from datasets import ClassLabel, Dataset


TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\S")
EXAMPLES_PER_WORD = 40
WINDOW = 24  # tokens around the word: backbones cut longer texts
BINS = 20  # of the logarithm of how many texts hold a word


def mask_words(table: Dataset, text_column: str, num_words: int, mask_token: str, seed: int = 0) -> Dataset:
    """Make of texts a data set whose class is the word that is masked.

    `num_words` words are drawn evenly over the logarithm of their frequency, among those of at least two letters that
    stand in 40 texts. Each has 40 rows: a window of 24 tokens around it, in lower case, in which `mask_token` stands for
    the word. The other columns stay, so that the same texts can be labelled by them, too.

    Args:
        table (`datasets.Dataset`): The texts, with or without labels.
        text_column (`str`): The column of texts.
        num_words (`int`): How many words; all that there are, if they are fewer.
        mask_token (`str`): What the backbone's tokenizer knows as the mask.
        seed (`int`, *optional*, defaults to 0): Of the words and their texts.

    Returns:
        `datasets.Dataset`: At most `num_words * 40` rows, with a `ClassLabel` column `word`.

    Raises:
        `ValueError`: when fewer than two words stand in 40 texts.
    """
    texts = [TOKEN.findall(text.lower()) for text in table[text_column][:]]
    places = defaultdict(list)
    for row, tokens in enumerate(texts):
        for word in dict.fromkeys(tokens):
            if len(word) > 1 and word.isalpha():
                places[word].append(row)
    random = np.random.default_rng(seed)
    words = _evenly({word: len(rows) for word, rows in places.items()}, num_words, random)
    if len(words) < 2:
        raise ValueError(
            f"{len(words)} words stand in {EXAMPLES_PER_WORD} of {len(texts)} texts: expected two or more. Give more texts."
        )
    rows, masked, classes = [], [], []
    for number, word in enumerate(words):
        for row in random.choice(places[word], EXAMPLES_PER_WORD, replace=False).tolist():
            place = texts[row].index(word)
            window = texts[row][max(0, place - WINDOW // 2) :][:WINDOW]
            rows.append(row)
            masked.append(" ".join(mask_token if token == word else token for token in window))
            classes.append(number)
    kind = table.features[text_column]
    made = table.select(rows).remove_columns(text_column).add_column(text_column, masked, feature=kind)
    return made.add_column("word", classes, feature=ClassLabel(names=words))


def _evenly(counts: dict[str, int], num_words: int, random: np.random.Generator) -> list[str]:
    """Words in turn from equal bins of the logarithm of their counts, sorted."""
    known = sorted(word for word, count in counts.items() if count >= EXAMPLES_PER_WORD)
    if not known:
        return []
    levels = np.log([counts[word] for word in known])
    edges = np.linspace(levels.min(), levels.max(), BINS + 1)[1:-1]
    bins = [[] for _ in range(BINS)]
    for index in random.permutation(len(known)):
        bins[np.digitize(levels[index], edges)].append(known[index])
    in_turn = [words[place] for place in range(len(known)) for words in bins if place < len(words)]
    return sorted(in_turn[:num_words])
