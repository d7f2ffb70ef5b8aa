"""The floors of the package, see `[importlinter]` in setup.cfg."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src" / "mcdi_hf").rglob("*.py"))
# A line for the end of a file -> what the linter then says.
WRONG = {
    ("utils/files.py", "from ..data.tasks import Task  # noqa: F401, E402"): "mcdi_hf.utils is not allowed to import",
    ("pipelines/noise.py", "from ..serving.slot import AdapterSlot"): "mcdi_hf.pipelines is not allowed to import",
    ("data/tasks.py", "def later():\n    from .episodes import task_losses"): "No cycles are allowed in mcdi_hf.data",
    (
        "adapters/head.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .codec import AdapterCodec",
    ): "No cycles are allowed in mcdi_hf.adapters",
    ("attic/__init__.py", ""): "attic",
}


def lint(source: Path) -> subprocess.CompletedProcess:
    """Run import-linter on the package in `source`, by the contracts of the checkout."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"  # as `lint-imports` does
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo", str(ROOT / "setup.cfg")]
    return subprocess.run(command, capture_output=True, text=True, cwd=source, timeout=120)


def test_a_file_imports_from_its_own_floor_and_below_and_never_in_a_circle() -> None:
    run = lint(ROOT / "src")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 kept, 0 broken" in run.stdout


@pytest.mark.parametrize(("wrong", "said"), WRONG.items())
def test_the_linter_sees_ways_up_circles_and_rooms_without_a_floor(wrong, said, tmp_path) -> None:
    shutil.copytree(ROOT / "src" / "mcdi_hf", tmp_path / "mcdi_hf", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "mcdi_hf" / wrong[0]
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as stream:
        stream.write(f"\n{wrong[1]}\n")
    run = lint(tmp_path)
    assert run.returncode == 1 and said in run.stdout, run.stdout + run.stderr


def test_nothing_is_imported_for_annotations_alone() -> None:
    assert FILES
    assert not [str(file) for file in FILES if "TYPE_CHECKING" in file.read_text()]


def test_whatever_the_package_imports_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    declared = set(re.findall(r"^[A-Za-z_]+", setup["options"]["install_requires"], re.MULTILINE))
    imported = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported = {{"PIL": "pillow"}.get(name, name) for name in imported - sys.stdlib_module_names}
    assert "torch" in imported and not imported - declared
