"""The card of a trajectory data set: what it holds, how it was made, how to load it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData


SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}


def trajectory_card(title: str, record: dict, width: int, summary: dict | None) -> DatasetCard:
    """Fill the card of a trajectory data set called `title`: `record` is what `trajectories.json` holds, `width` that
    of its weights, `summary` what [`TrajectoryFolder.finish`] found, none before the end of the collection.
    """
    # No `configs`: the shards' names say the split, and for a local folder with `configs` the cache of `datasets` is
    # found by the folder's last name alone, so that it would give the rows of another folder, or of last week.
    data = DatasetCardData(pretty_name=title, tags=["mcdi", "lora", "peft", "weight-generation"])
    if summary is not None:
        data.size_categories = [next((name for below, name in SIZES.items() if summary["tasks"] < below), "1M<n<10M")]
    template = Path(__file__).parent / "templates" / "trajectory_card.md"
    values = {"title": title, "record": record, "summary": summary, "width": width, "code": _code}
    values["settings"] = _leaves({key: value for key, value in record.items() if key != "layout"})
    return DatasetCard.from_template(data, template_path=str(template), **values)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value, for all that is set in a nested dict; a list of dicts counts as a dict of its places."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value} if value not in (None, [], "") else {}
    found = {}
    for key, inner in value.items():
        found |= _leaves(inner, f"{path}.{key}" if path else str(key))
    return found


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{' '.join(text.split())}`".replace("|", "\\|")
