"""A run's losses, plotted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jlora.train._metrics import MetricsLog


def plot_losses(
    metrics: MetricsLog,
    path: Path,
    title: str = "",
    loss: str = "loss (nats a label)",
) -> None:
    """Draw the training loss, as it is and smoothed, and the validation loss.

    Args:
      metrics: the log of a run.
      path: the picture to write, a PNG for instance.
      title: its title.
      loss: what stands beside its axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [row for row in metrics.rows("train") if _is_finite(row["loss"])]
    valid = [row for row in metrics.rows("valid") if _is_finite(row["loss"])]
    steps, losses = _points(train)
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=1, label="train")
    axes.plot(steps, smoothed(losses), color="C0", label="train, smoothed")
    steps, losses = _points(valid)
    axes.plot(steps, losses, "o-", color="C1", markersize=4, label="validation")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.plot(
            steps[best], losses[best], "*", color="C3", markersize=11, zorder=3,
            label=f"best: {losses[best]:.3f} at step {steps[best]}",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=loss, title=title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _points(rows: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def smoothed(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Return running means, in which a value counts `weight` of the next.

    >>> smoothed([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    out, total, count = [], 0.0, 0.0
    for value in values:
        total, count = weight * total + value, weight * count + 1
        out.append(total / count)
    return out
