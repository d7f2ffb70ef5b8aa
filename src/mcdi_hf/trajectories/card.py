"""The card of a trajectory data set: what it holds, how it was made, how to load it."""

import json
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData


CARD = """
# {title}

Trajectories of LoRA adapters: one row a task, with the weights that its optimiser started from and passed through.
A generator of adapters learns from them with [mcdi_hf](https://arxiv.org/abs/2502.01117).

## Summary

{summary}

## Use

```python
from mcdi_hf import load_trajectories

trajectories, made = load_trajectories("{title}")  # this folder, or the id of this repository
print(trajectories[0]["weights"].shape, made["base_model"])
```

`datasets.load_dataset` reads it as well, with `streaming=True` too, and without `mcdi_hf`.

## Columns

| column | |
|---|---|
| `task` | the task's number, from 0 |
| `group` | the group that its classes come from |
| `classes` | their names, in the order of the logits |
| `support` | for each class the rows of the source data that the optimiser saw |
| `steps` | the steps of the optimiser that `weights` holds; the first is 0 |
| `losses` | the training loss at each later step |
| `train_accuracy` | on the batches that led to the last weights from the ones before |
| `accuracy` | of the last weights, on held-out rows |
| `weights` | `(steps, {width})`: {order} |

The tensors lie flat one behind the other, in the order of `layout` in `trajectories.json`.

## How it was made

Settings that are `null` or empty are left out; `trajectories.json` has them all.

| setting | |
|---|---|
{settings}
"""

UNFINISHED = "The collection has not been finished: some tasks are still missing."

SUMMARY = """| | |
|---|---|
| tasks | {tasks} |
| tasks of each group | {groups} |
| held-out accuracy, mean (sd) over the tasks | {accuracy[0]:.3f} ({accuracy[1]:.3f}) |
| training accuracy, mean (sd) over the tasks | {train_accuracy[0]:.3f} ({train_accuracy[1]:.3f}) |
| mean training loss | {losses} |
| size | {megabytes:.1f} MB |"""

SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}


def trajectory_card(title: str, record: dict, width: int, summary: dict | None) -> DatasetCard:
    """Write the card of a trajectory data set.

    Args:
        title (`str`): The folder's name.
        record (`dict`): What `trajectories.json` holds.
        width (`int`): The width of the column `weights`.
        summary (`dict`, *optional*): What [`TrajectoryFolder.finish`] found; none before the end of the collection.
    """
    # No `configs`: the shards' names say the split, and for a local folder with `configs` the cache of `datasets` is
    # found by the folder's last name alone, so that it would give the rows of another folder, or of last week.
    data = DatasetCardData(pretty_name=title, tags=["mcdi", "lora", "peft", "weight-generation"])
    text = UNFINISHED
    if summary is not None:
        data.size_categories = [next((name for below, name in SIZES.items() if summary["tasks"] < below), "1M<n<10M")]
        groups = ", ".join(f"{_cell(group)} {count}" for group, count in summary["groups"].items())
        losses = ", ".join(f"{loss:.3f} at step {step}" for step, loss in summary["losses"].items())
        text = SUMMARY.format(**{**summary, "groups": groups, "losses": losses})
    settings = _leaves({key: value for key, value in record.items() if key != "layout"})
    order = "the LoRA matrices"
    if record["layout"]["head_name"] is not None:
        order += f", the head's weight and its bias, zeros up to the width of {record['max_ways']} classes"
    text = CARD.format(
        title=title,
        summary=text,
        width=width,
        order=order,
        settings="\n".join(f"| {_cell(path)} | {_cell(value)} |" for path, value in settings.items()),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


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


def _cell(value: Any) -> str:
    """A value on one line of code, fit for a cell of a Markdown table whatever it holds."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{' '.join(text.split())}`".replace("|", "\\|")
