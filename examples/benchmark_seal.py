"""What keeps the test tasks out of every choice: choices are made on validation and sealed, and only then are tests drawn."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import write_whole

from mcdi_hf import Task
from mcdi_hf.trajectories.description import differences


class Sealed:
    """The choices of one run, and the results on test tasks behind them.

    While the seal is open, [`Sealed.choose`] makes choices and keeps them, and no test task can be had. Once
    [`Sealed.close`] was called nothing can be chosen any more, and [`Sealed.measure`] draws the test tasks of each plan
    once: its line is kept with the seal, and a run whose settings or choices are others is refused beside it.

    Args:
        folder (`Path`): Where `choices.json` and `lines.jsonl` are, or will be.
        settings (`dict`): All that the results depend on, beside the choices: JSON values.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.lines_path = folder / "choices.json", folder / "lines.jsonl"
        self.settings, self.choices, self.seal = json.loads(json.dumps(settings)), {}, None
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if different := differences(kept["settings"], self.settings):
                raise ValueError(
                    f"{self.path} was made otherwise: {'; '.join(different)}. Test tasks are drawn once for one set of "
                    f"choices: take another --runs_root, or go on as before."
                )
            self.choices, self.seal = kept["choices"], kept["seal"]
            if self.seal not in (None, self._fingerprint()):
                raise ValueError(f"{self.path} was edited after its seal was closed: take another --runs_root.")
        self.lines = [json.loads(line) for line in self._text().splitlines()]
        if any(line["seal"] != self.seal for line in self.lines):
            raise ValueError(f"{self.lines_path} has results under another seal than {self.path}: they were mixed up.")

    def choose(self, name: str, make: Callable[[], Any]) -> Any:
        """The choice of this name: the one that is kept, or what `make` finds on validation tasks, a JSON value."""
        if name not in self.choices:
            if self.seal is not None:
                raise ValueError(f"{name!r} was not chosen before the seal of {self.path} was closed.")
            self.choices[name] = json.loads(json.dumps(make()))
            self._write()
        return self.choices[name]

    def close(self) -> str:
        """Fix all choices; their fingerprint."""
        if self.seal is None:
            self.seal = self._fingerprint()
            self._write()
        return self.seal

    def measure(
        self, plan: dict[str, Any], draw: Callable[[], list[Task]], judge: Callable[[list[Task]], dict[str, Any]]
    ) -> None:
        """Draw the test tasks of a plan and judge them, unless that was done.

        Args:
            plan (`dict`): What is measured, such as the table, the seed and the kind of tasks.
            draw (`Callable`): The test tasks.
            judge (`Callable`): Test tasks -> what is kept of them, JSON values.
        """
        if self.seal is None:
            raise ValueError(f"Test tasks of {plan} were asked for before the seal of {self.path} was closed.")
        if any(line["plan"] == plan for line in self.lines):
            return
        line = {"plan": plan, "seal": self.seal, **judge(draw())}
        with self.lines_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def _fingerprint(self) -> str:
        text = json.dumps([self.settings, self.choices], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _write(self) -> None:
        text = json.dumps({"settings": self.settings, "choices": self.choices, "seal": self.seal}, indent=1)
        write_whole(self.path, lambda part: part.write_text(text))

    def _text(self) -> str:
        """The lines that a run before left; a last one that was cut off in writing is dropped, here and in the file."""
        if not self.lines_path.exists():
            return ""
        text = self.lines_path.read_text()
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            write_whole(self.lines_path, lambda part: part.write_text(text))
        return text
