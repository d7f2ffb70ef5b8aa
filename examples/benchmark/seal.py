"""What keeps the test tasks out of every choice: they are drawn only when all choices were made and sealed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcdi_hf import Task
from mcdi_hf.trajectories.description import differences
from mcdi_hf.utils.files import write_file


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    """Write JSON whole or not at all."""
    write_file(path, lambda file: file.write((json.dumps(values, indent=indent) + "\n").encode()))


class Sealed:
    """The choices of one experiment, and the results on test tasks behind them.

    While the seal is open, [`Sealed.choose`] makes choices and keeps them, and no test task can be had. Once
    [`Sealed.close`] was called nothing can be chosen any more, and [`Sealed.measure`] draws the test tasks of each
    plan once: a file keeps its results with the seal, and a run whose settings or choices are others is refused.

    Args:
        folder (`Path`): Where `choices.json` and the results of every plan, `test/PLAN.json`, are or will be.
        settings (`dict`): All that the results depend on, beside the choices: JSON values.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.path, self.results_folder = folder / "choices.json", folder / "test"
        self.settings, self.choices, self.seal = json.loads(json.dumps(settings)), {}, None
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if different := differences(kept["settings"], self.settings):
                raise ValueError(
                    f"{self.path} was made otherwise: {'; '.join(different)}. Test tasks are drawn once for one set "
                    f"of choices: take another --runs_root, or go on as before."
                )
            self.choices, self.seal = kept["choices"], kept["seal"]
            if self.seal not in (None, self._fingerprint()):
                raise ValueError(f"{self.path} was edited after its seal was closed: take another --runs_root.")
        self.results = {path.stem: json.loads(path.read_text()) for path in sorted(self.results_folder.glob("*.json"))}
        if mixed := [plan for plan, found in self.results.items() if found["seal"] != self.seal]:
            raise ValueError(f"{self.results_folder} has results under another seal than {self.path}: {mixed}.")

    def choose(self, name: str, make: Callable[[], Any]) -> Any:
        """The choice of this name: the one that is kept, or what `make` finds on validation tasks, a JSON value."""
        if name not in self.choices:
            if self.seal is not None:
                raise ValueError(f"{name!r} was not chosen before the seal of {self.path} was closed.")
            self.choices[name] = json.loads(json.dumps(make()))
            self._write()
        return self.choices[name]

    def close(self) -> None:
        """Fix all choices."""
        if self.seal is None:
            self.seal = self._fingerprint()
            self._write()

    def measure(
        self, plan: str, draw: Callable[[], list[Task]], judge: Callable[[list[Task]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Draw the test tasks of a plan and judge them, unless that was done.

        Args:
            plan (`str`): What is measured, such as the fold, the seed and the kind of tasks: a file's name.
            draw (`Callable`): The test tasks.
            judge (`Callable`): Test tasks -> what is kept of them, JSON values.
        """
        if self.seal is None:
            raise ValueError(f"Test tasks of {plan} were asked for before the seal of {self.path} was closed.")
        if plan not in self.results:
            self.results[plan] = {"seal": self.seal, **judge(draw())}
            write_json(self.results_folder / f"{plan}.json", self.results[plan])
        return self.results[plan]

    def _fingerprint(self) -> str:
        text = json.dumps([self.settings, self.choices], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _write(self) -> None:
        write_json(self.path, {"settings": self.settings, "choices": self.choices, "seal": self.seal})
