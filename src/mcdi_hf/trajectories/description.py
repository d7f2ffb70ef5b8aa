"""How trajectories were made: what `trajectories.json` says, and what differs between two of them."""

from importlib.metadata import version
from pathlib import Path

from ..adapters.codec import AdapterCodec
from ..adapters.layout import AdapterLayout
from ..models.task_encoder import TaskEncoder
from ..utils.files import check_format, read_json


# Of a trajectory folder's files. Whoever changes what they mean raises it, and reads the older ones or says what to do.
FORMAT_VERSION = 1


def package_versions() -> dict[str, str]:
    """The versions of the packages that trajectories depend on, for their description."""
    return {name: version(name) for name in ("mcdi_hf", "torch", "transformers", "peft", "datasets", "numpy")}


def read_record(path: Path) -> tuple[dict, AdapterLayout]:
    """Read a `trajectories.json`, and the layout in it.

    Raises:
        `ValueError`: when the file is damaged, has no layout, or is of a format that is not known.
    """
    record = read_json(path)
    check_format(path, record.setdefault("format_version", 1), FORMAT_VERSION, "collect the trajectories again")
    try:
        layout = AdapterLayout.from_dict(record.get("layout"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return record, layout


def read_codec(folder: Path, layout: AdapterLayout) -> AdapterCodec:
    """Read the codec of trajectories, whose adapters must be of their layout.

    Raises:
        `ValueError`: when it is missing, damaged, or of another layout.
    """
    try:
        codec = AdapterCodec.from_pretrained(folder, use_safetensors=True).eval()
    except Exception as error:  # a foreign folder can go wrong in any way, and each of them is the folder's fault
        raise ValueError(f"{folder} is no codec: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if codec.layout.to_dict() != layout.to_dict():
        raise ValueError(f"{folder} is of another layout than the trajectories beside it: get the whole folder again.")
    return codec


def read_encoder(folder: Path) -> TaskEncoder:
    """Read the task encoder that was trained beside a shared adapter.

    Raises:
        `ValueError`: when it is missing or damaged.
    """
    try:
        found = TaskEncoder.from_pretrained(folder, use_safetensors=True)
    except Exception as error:  # as with a codec
        raise ValueError(
            f"{folder} is no task encoder: {type(error).__name__}: {str(error).splitlines()[0]} Get it again."
        ) from error
    # Where it was read is nobody's business, and would be saved with it.
    encoder = TaskEncoder.from_config({key: value for key, value in found.config.items() if key != "_name_or_path"})
    encoder.load_state_dict(found.state_dict())
    return encoder.eval()


def same_basis(one: AdapterCodec, other: AdapterCodec) -> bool:
    """Whether coefficients mean the same in two codecs of one layout: they have the same basis and the same head."""
    pairs = zip(one.basis.state_dict().values(), other.basis.state_dict().values(), strict=True)
    return one.head == other.head and all(mine.cpu().equal(its.cpu()) for mine, its in pairs)


def differences(there: dict, here: dict) -> list[str]:
    """Say what differs between two records of `trajectories.json`, `there` on disk or on the Hub and `here` at
    hand, each by its dotted path with both values."""
    if there == here:
        return []
    found = _differences(_by_module(there), _by_module(here), "")
    return found or ["layout.modules are in another order"]  # equal by name, and yet unequal


def _by_module(record: dict) -> dict:
    """The record with its adapted modules by name instead of in a list."""
    if "layout" not in record:
        return record
    layout = record["layout"]
    return {**record, "layout": {**layout, "modules": {module["name"]: module for module in layout["modules"]}}}


def _differences(there: dict, here: dict, prefix: str) -> list[str]:
    found = []
    for key in there | here:
        if key not in there or key not in here:
            found.append(f"{prefix}{key} is missing {'here' if key in there else 'there'}")
        elif isinstance(there[key], dict) and isinstance(here[key], dict):
            found += _differences(there[key], here[key], f"{prefix}{key}.")
        elif there[key] != here[key]:
            found.append(f"{prefix}{key} is {there[key]!r} there, {here[key]!r} here")
    return found
