"""What the pages point to is there: files, links, the names that their snippets import, and the flags of commands."""

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import mcdi_hf
from mcdi_hf import MCDiTrainingArguments, TrajectoryArguments


ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "src" / "mcdi_hf" / "commands"
FOLDERS = (".", "docs", "examples", "examples/benchmark", "examples/reproduce", "model_cards")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")) if page.name != "CHANGELOG.md"]
PLACE = re.compile(r"(?:examples|docs|tests|model_cards)(?:/[\w.-]+)*/[\w-]+(?:\.\w+)?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_points_to_what_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for paragraph in text.split("\n\n"):
        places = {place for place in PLACE.findall(paragraph) if "NAME" not in place}
        missing += [place for place in places if not (ROOT / place).exists()]
    assert not missing


def flags_of(script: Path) -> set[str]:
    """The flags of a script: those that it adds to a parser, and the fields of the dataclasses that it parses into."""
    if command := re.search(r"^main\(\[\"(\w+)\"", script.read_text(), re.MULTILINE):
        script = COMMANDS / f"{command[1]}.py"  # the example hands its arguments on
    tree = ast.parse(script.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found = set(re.findall(r"add(?:_argument)?\(\s*\"(--\w+)\"", script.read_text()))
    found |= {"--config"} if "parse_arguments" in names else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {f"--{one.target.id}" for one in node.body if isinstance(one, ast.AnnAssign)}
    for kind in (MCDiTrainingArguments, TrajectoryArguments):
        if kind.__name__ in names:
            found |= {f"--{field.name}" for field in fields(kind)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_have_flags_that_there_are(page: Path) -> None:
    fences = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for command in "".join(fences).replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        scripts = [(word, ROOT / word) for word in words if word.startswith("examples/") and word.endswith(".py")]
        pairs = zip(words, words[1:])
        scripts += [
            (name, COMMANDS / f"{name}.py") for one, name in pairs if one in ("mcdi-hf", "mcdi_hf") and name[0] != "-"
        ]
        for word, script in scripts:
            used = {flag for flag in words[words.index(word) :] if flag.startswith("--")}
            assert not used - flags_of(script)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_are_python_and_import_what_there_is(page: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "mcdi_hf":
                assert not [alias.name for alias in node.names if not hasattr(mcdi_hf, alias.name)]


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "training.md"} <= {page.name for page in PAGES}


def test_every_public_name_is_in_the_reference_with_an_example() -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    shown = re.findall(r"^::: mcdi_hf\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(shown) == sorted(mcdi_hf.__all__)
    assert not [name for name in shown if "Example" not in (getattr(mcdi_hf, name).__doc__ or "")]
