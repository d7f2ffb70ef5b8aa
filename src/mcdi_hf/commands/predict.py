"""`mcdi-hf predict`: an adapter classifies the examples of a file."""

import argparse
import io
import sys
from pathlib import Path

from ..adapters.generated import GeneratedAdapter
from ..backbones.frozen import FrozenBackbone
from ..utils.files import write_file
from .tables import read_table, unlabelled, write_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("adapter", help="a folder or a Hub id")
    add("file", help="CSV, TSV, JSON Lines, Parquet, a text a line (.txt), or a data set")
    add("--base_model_name_or_path", help="a local copy of the adapter's backbone")
    add("--input_column", help="the column of texts or images, if its name does not tell")
    add("--split", default="test", help="of a data set (default: %(default)s)")
    add("--output_file", type=Path, help="a CSV file with label and score of every row (default: to the screen)")


def run(args: argparse.Namespace) -> None:
    """Classify the examples, and write a row for each."""
    examples = unlabelled(read_table(args.file, args.split), args.input_column)
    adapter = GeneratedAdapter.from_pretrained(args.adapter)
    backbone = FrozenBackbone.of(adapter.base_model, args.base_model_name_or_path)
    answers = adapter.predict(examples, backbone)
    texts = [{} if backbone.reads_images else {"text": example} for example in examples]
    rows = [text | {"label": one["label"], "score": f"{one['score']:.4f}"} for text, one in zip(texts, answers)]
    if args.output_file is None:
        write_rows(sys.stdout, rows)
        return
    written = io.StringIO(newline="")
    write_rows(written, rows)
    write_file(args.output_file, lambda file: file.write(written.getvalue().encode()))
    print(f"{len(rows)} predictions are in {args.output_file}.")
