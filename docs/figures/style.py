"""What the figures have in common: colours for light and for dark pages, and files."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("svg")


@dataclasses.dataclass(frozen=True)
class Colours:
    """Those of one kind of page."""

    text: str
    on_trained: str
    faint: str
    frozen: str
    trained: str
    second: str
    third: str


LIGHT = Colours(
    text="#1f2328", on_trained="#ffffff", faint="#8c959f", frozen="#d5dae1",
    trained="#e8590c", second="#1971c2", third="#2f9e44",
)  # fmt: skip
DARK = Colours(
    text="#d8dee4", on_trained="#1f1300", faint="#7d8590", frozen="#3d444d",
    trained="#ff922b", second="#4dabf7", third="#69db7c",
)  # fmt: skip
Draw = Callable[[Figure, Colours], None]


def svg(draw: Draw, colours: Colours, size: tuple[float, float]) -> str:
    """A figure as the text of an SVG file, the same for the same code."""
    settings = {
        "svg.hashsalt": "jlora",  # ids that do not change from run to run
        "font.size": 11,
        "text.color": colours.text,
        "axes.edgecolor": colours.faint,
        "axes.labelcolor": colours.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": colours.text,
        "ytick.color": colours.text,
        "grid.color": colours.faint,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, colours)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()
