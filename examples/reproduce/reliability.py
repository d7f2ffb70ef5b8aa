"""Try faults and hostile inputs, and write into docs/security.md what became of them. The tests do the trying."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "security.md"
START, END = "<!-- counts -->\n", "<!-- end of counts -->"
COLUMNS = {"result": "as before", "changed": "otherwise", "refused": "refused by name", "lost": "lost"}


def table(counts: dict[str, dict[str, int]]) -> str:
    """The counts of every part as Markdown, with their sums."""
    sums = {name: sum(one[name] for one in counts.values()) for name in COLUMNS}
    lines = ["| tried | inputs | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for part, one in [*sorted(counts.items()), ("**all**", sums)]:
        numbers = [sum(one.values()), *(one[name] for name in COLUMNS)]
        lines.append(f"| {part} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        command = [sys.executable, "-m", "pytest", "tests/trust", "-q", "--reliability", str(file)]
        code = subprocess.run(command, cwd=ROOT).returncode
        found = table(json.loads(file.read_text()))
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + found + END + rest.split(END)[1])
    print(found)
    return code  # something that is lost is in the table, and fails


if __name__ == "__main__":
    sys.exit(main())
