"""What the pages point to is there: files, links, and the names that their snippets import."""

import ast
import re
from pathlib import Path

import pytest

import mcdi_hf


ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "examples", "examples/benchmark", "examples/reproduce")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md")) if page.name != "CHANGELOG.md"]
PLACE = re.compile(r"(?:examples|docs|tests|model_cards)(?:/[\w.-]+)*/[\w-]+(?:\.\w+)?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_points_to_what_is_there(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for paragraph in text.split("\n\n"):
        if "04766b0" not in paragraph:  # files of that commit are said to be gone
            missing += [
                place for place in PLACE.findall(paragraph) if "NAME" not in place and not (ROOT / place).exists()
            ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_are_python_and_import_what_there_is(page: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "mcdi_hf":
                assert not [alias.name for alias in node.names if not hasattr(mcdi_hf, alias.name)]


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "training.md"} <= {page.name for page in PAGES}
