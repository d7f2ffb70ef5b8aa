"""What makes the releases: their scripts are shell that parses, and name files that are there."""

import re
import subprocess
from pathlib import Path

import pytest
from scripts import EXAMPLES


ROOT = EXAMPLES.parent
SCRIPTS = sorted((EXAMPLES / "reproduce").glob("release_*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_release_script_names_files_that_are_there(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    text = text.replace("$configs", "examples/reproduce/configs")
    named = set(re.findall(r"(?<![\w/])examples/[\w./-]*\w", text))
    assert len(named) >= 4 and not [name for name in named if not (ROOT / name).exists()]
    assert path.stat().st_mode & 0o100
    # Without its argument it says what it needs, and starts nothing.
    ended = subprocess.run([path], capture_output=True, text=True)
    assert ended.returncode == 1 and "name the" in ended.stderr
