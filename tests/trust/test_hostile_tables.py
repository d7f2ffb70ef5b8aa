"""Files of examples as nobody should have them: a result, or one line that names the file or what is wrong in it."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from reliability import Reliability
from tiny import tiny_pipeline

from mcdi_hf import GeneratedAdapter
from mcdi_hf.commands.main import main


PART = "hostile tables"
HEAD, ROWS = ("text", "label"), [("a b c", "p"), ("a c", "p"), ("x y z", "q"), ("z y", "q")]
FORMULAS = ["=1+1", "@SUM(A1)", "+1", "-1", '=HYPERLINK("http://a.b")']
NAMES = ["../out", "<script>alert(1)</script>", "a: [b", "| a | b |", "{{ 7 * 7 }}", "---", "%PDF", "a\nb", "'; drop"]


def table(rows: list[tuple], head: tuple[str, ...] = HEAD, **how: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **how).writerows([head, *rows])
    return file.getvalue()


LATIN = table([("é è", "p"), ("x", "q")]).encode("latin-1")
# Name -> ending, content, and what a refusal says; nothing where there is a result.
TABLES: dict[str, tuple[str, Callable[[bool], bytes], str]] = {
    "plain": (".csv", lambda _: table(ROWS).encode(), ""),
    "a byte order mark": (".csv", lambda _: table(ROWS).encode("utf-8-sig"), ""),
    "line ends of old": (".csv", lambda _: table(ROWS, lineterminator="\r").encode(), ""),
    "tabs": (".tsv", lambda _: table(ROWS, delimiter="\t").encode(), ""),
    "formulas": (".csv", lambda _: table([(one, "pq"[index % 2]) for index, one in enumerate(FORMULAS)]).encode(), ""),
    "odd labels": (".csv", lambda _: table([("a b", name) for name in NAMES]).encode(), ""),
    "a text under two labels": (".csv", lambda _: table([("a", "p"), ("a", "q")]).encode(), ""),
    "null and 007": (".csv", lambda _: table([("null", "007"), ("NaN", "7")]).encode(), ""),
    "10,000 rows": (".csv", lambda _: table(ROWS * 2500).encode(), ""),
    "more rows": (".csv", lambda all: table(ROWS * (250_000 if all else 6000)).encode(), "20,000 at most"),
    "latin letters": (".csv", lambda _: LATIN, "cannot be read"),
    "two encodings": (".csv", lambda _: table(ROWS).encode() + LATIN, "cannot be read"),
    "UTF-16": (".csv", lambda _: table(ROWS).encode("utf-16"), "cannot be read"),
    "one class": (".csv", lambda _: table(ROWS[:2]).encode(), "has one class"),
    "no rows": (".csv", lambda _: table([]).encode(), "has no rows"),
    "nothing": (".csv", lambda _: b"", "is empty"),
    "a long cell": (
        ".csv",
        lambda all: table([("a" * (100_000_000 if all else 200_000), "p"), *ROWS]).encode(),
        "field",
    ),
    "a long text": (".jsonl", lambda all: lines([("a" * (10_000_000 if all else 100_000), "p"), *ROWS]), ""),
    "an open quote": (".csv", lambda _: b'text,label\n"a,p\nx,q\n', "cannot be read"),
    "ragged rows": (".csv", lambda _: b"text,label\na,p,1\nx,q\n", "in row 2 another number of cells"),
    "two columns of a name": (".csv", lambda _: b"text,text,label\na,b,p\nx,y,q\n", "more than one column 'text'"),
    "no label": (".csv", lambda _: table([*ROWS, ("a", "")]).encode(), "no example or no label, such as the rows [5]"),
    "spaces": (".csv", lambda _: table([*ROWS, (" ", "p")]).encode(), "no example or no label, such as the rows [5]"),
    "other columns": (".csv", lambda _: table(ROWS, ("one", "two")).encode(), "Which column holds the labels"),
    "NUL": (".csv", lambda _: table([("a\0b", "p"), ("x", "q")]).encode(), ""),
    "lines": (".jsonl", lambda _: lines(ROWS), ""),
    "half a line": (".jsonl", lambda _: lines(ROWS)[:-9], "cannot be read"),
    "a list of lists": (".json", lambda _: json.dumps([[1, 2], [3]]).encode(), "Which column holds"),
    "noise as JSON": (".json", lambda _: bytes(range(256)) * 40, "cannot be read"),
    "noise as Parquet": (".parquet", lambda _: bytes(range(256)) * 40, "cannot be read"),
    "noise as CSV": (".csv", lambda _: bytes(range(256)) * 40, "cannot be read"),
}


def lines(rows: list[tuple]) -> bytes:
    return "".join(json.dumps(dict(zip(HEAD, row))) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    tiny_pipeline("default")[0].save_pretrained(folder)
    return folder


def generate(file: Path, pipeline: Path, *options: str) -> GeneratedAdapter:
    """What the command makes of a file; what it refuses is a `ValueError`, as `Reliability` counts them."""
    folder = file.with_suffix("")
    try:
        main(["generate", str(file), "--pipeline", str(pipeline), "--output_dir", str(folder), *options])
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code.startswith("error: ") and "\n" not in error.code
        assert len(error.code) < 1000 and not folder.exists()
        raise ValueError(error.code) from error
    return GeneratedAdapter.from_pretrained(folder)


@pytest.mark.parametrize("name", TABLES)
def test_a_result_or_one_line(
    pipeline: Path, thorough: bool, reliability: Reliability, name: str, tmp_path: Path
) -> None:
    ending, content, message = TABLES[name]
    file = tmp_path / f"rows{ending}"
    file.write_bytes(content(thorough))
    adapter, said = reliability.attempt(PART, lambda: generate(file, pipeline), *[message] * bool(message))
    assert bool(said) == bool(message)
    if name == "odd labels":
        assert adapter.labels == NAMES
        card = ModelCard.load(tmp_path / "rows" / "README.md")
        assert card.data.library_name == "peft" and "<script>" not in re.sub("(?s)```.*?```", "", card.text)
        main(
            [
                "predict",
                str(tmp_path / "rows"),
                str(file),
                "--split",
                "train",
                "--output_file",
                str(tmp_path / "o.csv"),
            ]
        )
        with (tmp_path / "o.csv").open(newline="") as found:
            assert {row["label"] for row in csv.DictReader(found)} <= set(NAMES)
