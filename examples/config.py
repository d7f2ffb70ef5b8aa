"""Arguments from a file: what a run was, in one JSON object that the command line may override."""

import argparse
import json
import sys
from pathlib import Path


def parse_args(parser: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `given` in its place, with `--config FILE` for arguments that it does not give itself.

    The file maps the names of arguments, without dashes, to a value, a list of values, or `true` for a flag. It is read
    as if its arguments stood in front of the others, so argparse refuses a name or a value that it does not know.
    """
    parser.add_argument("--config", type=Path, help="a JSON file of arguments, as in examples/configs")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    given = sys.argv[1:] if given is None else given
    path = first.parse_known_args(given)[0].config
    args = parser.parse_args([*([] if path is None else _read(path)), *given])
    if args.config != path:  # it was shortened
        parser.error(f"--config {args.config} was not read: write --config in full.")
    return args


def _read(path: Path) -> list[str]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected one JSON object of arguments.")
    return as_arguments(values, str(path))


def as_arguments(values: dict, where: str) -> list[str]:
    """Arguments by name as a command line gives them; `where` they were found is for the error."""
    arguments = []
    for name, value in values.items():
        if value is False or value is None:
            raise ValueError(f"{where} says {value!r} for {name!r}: leave the argument out, or say true for a flag.")
        arguments.append(f"--{name}")
        if value is not True:
            arguments += [str(one) for one in (value if isinstance(value, list) else [value])]
    return arguments
