"""Arguments of a script: dataclasses, read from the command line and from a JSON file."""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from .files import read_json


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


def parse_arguments(*dataclasses: type, description: str, args: list[str] | None = None) -> tuple[Any, ...]:
    """Read dataclasses from the command line, or from `args`, and what that leaves out from `--config FILE`.

    The file is a JSON object of arguments by name. Whatever is wrong ends the process with code 2 and one line.
    """
    parser = HfArgumentParser(dataclasses, description=description, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--config", help="a JSON file of arguments by name; those of the command line override it")
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, args = first.parse_known_args(args)
    try:
        if known.config is not None:
            values = _read_config(known.config, {k: v for one in dataclasses for k, v in get_type_hints(one).items()})
            parser.set_defaults(**values)
            for action in parser._actions:
                action.required = action.required and action.dest not in values
        *found, _ = parser.parse_args_into_dataclasses(args, look_for_args_file=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return tuple(found)


def check_fields(arguments: Any) -> None:
    """Refuse values that are not of their field's type; a text that stands for a path becomes one, and so on."""
    kinds = get_type_hints(type(arguments))
    for field in fields(arguments):
        setattr(arguments, field.name, _read(kinds[field.name], getattr(arguments, field.name), field.name))


def check_positive(arguments: Any, *names: str) -> None:
    """Refuse numbers below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}: expected a number from 1 on.")


def check_rates(arguments: Any, *names: str) -> None:
    """Refuse learning rates of 0 or less, and those above 1, with which nothing learns."""
    for name in names:
        if not 0 < getattr(arguments, name) <= 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}: expected a number above 0, 1 at most.")


def check_range(name: str, values: list[int]) -> None:
    """Refuse anything but a least and a greatest number, from 1 on."""
    if len(values) != 2 or not 1 <= values[0] <= values[1]:
        raise ValueError(f"{name} is {values}: expected the least and the greatest number, from 1 on.")


def _read_config(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    values = read_json(path)
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(f"{path} has unknown arguments {unknown}: see --help for those that there are.")
    if empty := [name for name, value in values.items() if value is None]:
        raise ValueError(f"{path} says null for {empty}: leave out what shall have its default.")
    return {name: _read(kinds[name], value, f"{path}: {name}") for name, value in values.items()}


def _read(kind: Any, value: Any, name: str) -> Any:
    """The value as its annotation wants it."""
    if get_origin(kind) in (UnionType, Union):  # `Literal[...] | None` is the latter
        return None if value is None else _read(get_args(kind)[0], value, name)
    if get_origin(kind) is list and isinstance(value, list | tuple):
        return [_read(get_args(kind)[0], one, name) for one in value]
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    one_of = list(get_args(kind)) if get_origin(kind) is Literal else None
    if value in one_of if one_of else type(kind) is type and isinstance(value, kind):
        if kind is not int or type(value) is not bool:
            return value
    expected = f"one of {one_of}" if one_of else kind.__name__ if type(kind) is type else kind
    raise ValueError(f"{name} is {value!r}: expected {expected}.")
