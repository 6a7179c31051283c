"""A bfloat16 weight, its neighbours, and two updates: one rounds to nothing."""

from __future__ import annotations

import jax.numpy as jnp
from matplotlib.figure import Figure
from style import Colours

SIZE = (6.8, 1.9)
WEIGHT = jnp.bfloat16(0.0201)
STEPS = (0.35, 1.7)  # the updates, in steps of the grid


def draw(figure: Figure, colours: Colours) -> None:
    """The grid around the weight, and where each sum lies and goes."""
    axes = figure.subplots()
    grid = [WEIGHT]
    for _ in range(3):
        grid.append(jnp.nextafter(grid[-1], jnp.bfloat16(1)))
    values = [float(x) for x in grid]
    step = values[1] - values[0]
    axes.plot([values[0] - 0.3 * step, values[-1] + 0.3 * step], [0, 0], "-",
              color=colours.faint, lw=1)  # fmt: skip
    axes.plot(values, [0] * len(values), "|", color=colours.text, markersize=18)
    for value in values:
        axes.text(value, -0.42, f"{value:.6f}", ha="center", fontsize=9.5)
    axes.text(values[0], 0.34, "w", ha="center", fontsize=12)
    for size, colour in zip(STEPS, (colours.second, colours.trained), strict=True):
        exact = values[0] + size * step
        merged = float(jnp.bfloat16(exact))
        axes.plot(exact, 0, "o", color=colour, markersize=6)
        bend = "arc3,rad=0.55" if merged < exact else "arc3,rad=-0.55"
        look = {"arrowstyle": "-|>", "color": colour, "connectionstyle": bend}
        axes.annotate("", (merged, 0.05), (exact, 0.05), arrowprops=look)
        text = f"w + {size:g} steps"
        axes.text(exact, 0.5, text, ha="center", color=colour, fontsize=10)
    axes.set(ylim=(-0.6, 0.75))
    axes.set_axis_off()
