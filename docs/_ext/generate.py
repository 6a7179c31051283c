"""Writes what the build makes, before Sphinx looks for pages.

A maker is a function from nothing to texts by path below docs/. What it makes is
ignored by git, so that no page can be older than the code that it tells of.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import api
import code_map
import console
import figures
import gallery
import measured

Maker = Callable[[], Mapping[str, str]]
MODULES = (api, code_map, console, figures, gallery, measured)
MAKERS: tuple[Maker, ...] = tuple(module.pages for module in MODULES)
FOLDERS = ("_generated", "reference/api")  # as in .gitignore
HERE = pathlib.Path(__file__).parent.parent


def generate(app: Any) -> None:
    """Run every maker, and remove what none of them has made."""
    made = {HERE / path: text for make in MAKERS for path, text in make().items()}
    for folder in FOLDERS:
        for path in sorted((HERE / folder).rglob("*"), reverse=True):
            if path.is_dir():
                not any(path.iterdir()) and shutil.rmtree(path)
            elif path not in made:
                path.unlink()
    for path, text in made.items():
        write(path, text)


def write(path: pathlib.Path, text: str) -> None:
    """Write a text that is new; others keep their time, so that Sphinx skips them."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}
