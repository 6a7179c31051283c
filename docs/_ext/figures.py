"""Draws the figures of docs/figures, for light and for dark pages."""

from __future__ import annotations

import importlib
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "figures"


def pages() -> dict[str, str]:
    """The SVG files."""
    sys.path.insert(0, str(FOLDER))
    style = importlib.import_module("style")
    made = {}
    for script in sorted(FOLDER.glob("*.py")):
        if script.stem != "style":
            figure = importlib.import_module(script.stem)
            for kind in ("light", "dark"):
                colours = getattr(style, kind.upper())
                text = style.svg(figure.draw, colours, figure.SIZE)
                made[f"_generated/figures/{script.stem}-{kind}.svg"] = text
    return made
