"""Links to Markdown files outside of docs/ hand out the file; GitHub shows them."""

from __future__ import annotations

import pathlib
import re
from typing import Any

LINK = re.compile(r"\]\(((?:\.\./)+[^)#]+\.md)\)")


def hand_out(app: Any, name: str, source: list[str]) -> None:
    """MyST would look for a page of that name; `path:` says that it is a file."""
    docs = pathlib.Path(app.srcdir)
    page = docs / name

    def link(found: re.Match[str]) -> str:
        target = (page.parent / found[1]).resolve()
        inside = target.is_relative_to(docs.resolve())
        return found[0] if inside else f"](path:{found[1]})"

    source[0] = LINK.sub(link, source[0])


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", hand_out)
    return {"parallel_read_safe": True}
