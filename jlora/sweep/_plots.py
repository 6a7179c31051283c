"""Pictures of a grid of runs, which can be read in grey too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLES = ("o-", "s--", "^:", "D-.", "v-", "P--")
# Dark enough beside each other in grey: of viridis, from dark to light.
_COLOURS = ("#440154", "#31688e", "#35b779", "#8a8a00", "#000000", "#7a7a7a")

Line = Sequence[tuple[float, float]]


def plot_lines(
    lines: Mapping[str, Line],
    path: Path,
    *,
    x: str,
    y: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> None:
    """Draw one number against another, a line for each value of a third.

    Lines differ in marker and dash as well as in colour. The horizontal axis is
    logarithmic, with a tick at each value.

    Args:
      lines: points `(x, y)` by the line's name; what is not finite is left out.
      path: the picture to write, a PNG for instance.
      x: what lies along the horizontal axis.
      y: what lies along the vertical one.
      title: of the picture.
      levels: horizontal lines by name, what there was before training say.
      from_zero: whether the vertical axis begins at 0, as times should.
    """
    figure, axes = _figure(title, x, y)
    values = sorted({a for points in lines.values() for a, _ in points})
    for n, (name, points) in enumerate(lines.items()):
        kept = [(a, b) for a, b in points if math.isfinite(b)]
        axes.plot(
            *zip(*sorted(kept), strict=True), _STYLES[n % len(_STYLES)], label=name,
            color=_COLOURS[n % len(_COLOURS)], linewidth=1.6, markersize=7,
        ) if kept else None  # fmt: skip
    for name, level in (levels or {}).items():
        axes.axhline(level, color="0.5", linewidth=1, linestyle=(0, (1, 3)), label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{a:g}" for a in values], minor=False)
    axes.minorticks_off()
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_heat_map(
    cells: Mapping[tuple[Any, Any], float],
    path: Path,
    *,
    x: str,
    y: str,
    value: str,
    title: str = "",
    digits: int = 3,
    low_is_good: bool = False,
) -> None:
    """Draw a number for each pair of values, dark where it is good.

    Args:
      cells: the numbers by `(x, y)`; a pair that is missing, or not finite, is blank.
      path: the picture to write.
      x: what the columns are.
      y: what the rows are.
      value: what the numbers are.
      title: of the picture.
      digits: of the numbers, behind the point.
      low_is_good: whether a low number is.
    """
    import numpy as np

    columns, rows = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    grid = np.full((len(rows), len(columns)), np.nan)
    for (a, b), number in cells.items():
        if math.isfinite(number):
            grid[rows.index(b), columns.index(a)] = number
    figure, axes = _figure(title, x, y)
    colours = "cividis" if low_is_good else "cividis_r"
    drawn = axes.imshow(grid, cmap=colours, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), [str(a) for a in columns])
    axes.set_yticks(range(len(rows)), [str(b) for b in rows])
    best = np.nanmin(grid) if low_is_good else np.nanmax(grid)
    for (i, j), number in np.ndenumerate(grid):
        if math.isnan(number):
            continue
        red, green, blue, _ = drawn.cmap(drawn.norm(number))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            j, i, f"{number:.{digits}f}" + " ★" * bool(number == best),
            ha="center", va="center", color="black" if light else "white",
            fontsize=12, fontweight="bold" if number == best else "normal",
        )  # fmt: skip
    figure.colorbar(drawn, label=value)
    figure.savefig(path, dpi=120)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, title=title)
    return figure, axes
