"""What mkdocs does with the pages: files outside of `docs` are linked where the source is published, and the marks go that
docstrings in the style of Hugging Face have around names and types."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of the pages to files of the repository, which the site does not hold."""
    root, up = (config["repo_url"] or "").rstrip("/"), "../" * (page.file.src_uri.count("/") + 1)

    def published(match: re.Match) -> str:
        text, place = match[1], match[2].removeprefix(up)
        return f"[{text}]({root}/blob/main/{place})" if root else f"{text} (`{place}`)"

    return re.sub(rf"\[([^\]]+)\]\(({re.escape(up)}[^)#]+)\)", published, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    html = re.sub(r"\[(<code>[\w.]+</code>)\]", r"\1", html)
    return re.sub(r"<code>([^<]*`[^<]*)</code>", lambda type_: re.sub(r"`|\*|\[(?=`)|(?<=`)\]", "", type_[0]), html)
