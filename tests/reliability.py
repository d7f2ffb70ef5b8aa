"""Counting what becomes of faults and hostile inputs: `make reliability` makes a table of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


OUTCOMES = ("result", "changed", "refused", "lost")


class Reliability:
    """Outcomes of every part: `result` as of a sound input, `changed` but valid, `refused` by name, or `lost`."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def attempt(
        self, part: str, call: Callable[[], Any], *names: str, same: Callable[[Any], bool] = lambda _: True
    ) -> tuple[Any, str]:
        """Try one input.

        Args:
            part (`str`): What the input is counted under.
            call (`Callable`): What is tried.
            names (`str`): A refusal must have one of these in its message, the file's name for instance.
            same (`Callable`, *optional*): Whether a result is that of a sound input.

        Returns:
            The result and the message of the refusal, one of them empty. Any other error is a failure.
        """
        counts = self._counts_of(part)
        try:
            result = call()
        except (ValueError, TypeError, OSError) as error:
            if any(name in str(error) for name in names):
                counts["refused"] += 1
                return None, str(error)
            counts["lost"] += 1
            raise AssertionError(f"{type(error).__name__} without any of {names}: {error}") from error
        except Exception:
            counts["lost"] += 1
            raise
        counts["result" if same(result) else "changed"] += 1
        return result, ""

    def held(self, part: str, number: int) -> None:
        """Count inputs that were found to give the result of a sound one."""
        self._counts_of(part)["result"] += number

    def _counts_of(self, part: str) -> dict[str, int]:
        return self.counts.setdefault(part, dict.fromkeys(OUTCOMES, 0))

    def write(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.counts, indent=1) + "\n")
