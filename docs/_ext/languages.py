"""A page's language, for browsers and for what reads it aloud: that of its folder."""

from __future__ import annotations

from typing import Any

LANGUAGES = ("vi",)


def set_language(app: Any, page: str, template: str, context: Any, tree: Any) -> None:
    """Tell the theme the language of a page in a folder that is called by one."""
    folder = page.partition("/")[0]
    if folder in LANGUAGES:
        context["language"] = folder


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("html-page-context", set_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
