"""Write the card of every released pipeline: a template of `cards/`, filled with the release's `results.json`.

python examples/reproduce/write_cards.py
"""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


RELEASES = Path(__file__).parents[2] / "model_cards"
TEMPLATES = Path(__file__).parent / "cards"


def card_text(folder: Path, templates: Path = TEMPLATES) -> str:
    """The card that a release shall have: `NAME.md` of the templates, filled with the figures in its folder."""
    loader = FileSystemLoader(templates)
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(f"{folder.name}.md").render(json.loads((folder / "results.json").read_text()))


def main() -> None:
    for path in sorted(RELEASES.glob("*/results.json")):
        (path.parent / "README.md").write_text(card_text(path.parent))


if __name__ == "__main__":
    main()
