"""A kernel and its adapter, as blocks: what is trained, and where the input goes."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from style import Colours

SIZE = (6.8, 3.5)


def draw(figure: Figure, colours: Colours) -> None:
    """The input takes two ways, through W and through A and B, and they are summed."""
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set(xlim=(0, 15.4), ylim=(-0.9, 7.6))
    text = {"ha": "center", "va": "center", "color": colours.text}

    def block(x: float, y: float, width: float, height: float, colour: str) -> None:
        axes.add_patch(Rectangle((x, y), width, height, color=colour, lw=0))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "lw": 1.2}
        axes.add_patch(FancyArrowPatch(start, end, color=colours.faint, **look))

    axes.text(0.5, 3.6, "x", fontsize=15, **text)
    arrow((0.9, 3.9), (4.1, 5.3))
    arrow((0.9, 3.3), (2.5, 1.8))

    block(4.3, 3.6, 4, 4, colours.frozen)
    axes.text(6.3, 5.9, "W", fontsize=17, **text)
    axes.text(6.3, 5.0, "frozen", fontsize=10, **text)
    axes.text(6.3, 3.2, "[in, out]", fontsize=9, **text)
    arrow((8.5, 5.3), (12.2, 4.0))

    block(2.7, -0.3, 0.8, 3.4, colours.trained)
    axes.text(3.1, -0.65, "[in, r]", fontsize=9, **text)
    arrow((3.7, 1.4), (6.8, 1.4))
    axes.text(5.2, 1.75, "x·A, r numbers", fontsize=9, **text)
    block(7.0, 1.0, 3.6, 0.8, colours.trained)
    axes.text(8.8, 0.6, "[r, out]", fontsize=9, **text)
    arrow((10.8, 1.4), (12.3, 3.2))
    axes.text(12.2, 2.0, r"s = $\alpha$ / r", fontsize=10, **text)

    axes.text(12.6, 3.6, "+", fontsize=20, **text)
    arrow((13.0, 3.6), (14.2, 3.6))
    axes.text(14.7, 3.6, "y", fontsize=15, **text)
    text["color"] = colours.on_trained
    axes.text(3.1, 1.4, "A", fontsize=15, **text)
    axes.text(8.8, 1.4, "B", fontsize=15, **text)
