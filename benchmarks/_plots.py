"""Plots of sweeps: milliseconds, and the ratio to the floor, over one size."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

AXES = {
    "rank": "rank",
    "depth": "layers",
    "adapters": "kernels with an adapter",
    "batch": "sequences a batch",
    "length": "tokens a sequence",
}


def plot(name: str, result: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Draw one file for each axis of a sweep; return their names."""
    made = []
    for axis in dict.fromkeys(row["axis"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["axis"] == axis and r["median_ms"]]
        if rows:
            file = f"{name}_{axis}.png"
            _draw(axis, rows, f"{_model(rows)}, {_device(result)}", folder / file)
            made.append(file)
    return made


def _draw(
    axis: str, rows: Sequence[Mapping[str, Any]], title: str, file: pathlib.Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for contender in dict.fromkeys(r["contender"] for r in rows):
        own = [r for r in rows if r["contender"] == contender]
        values = [str(r["value"]) for r in own]
        times.plot(values, [r["median_ms"] for r in own], "o-", label=contender)
        if contender == "jlora" and all(r["to_floor"] for r in own):
            ratios.plot(values, [r["to_floor"] for r in own], "o-", color="C1")
    times.set_ylabel("ms a step")
    times.set_ylim(bottom=0)
    times.legend()
    ratios.set_ylabel("jlora / floor")
    ratios.axhline(1.0, color="gray", linewidth=0.8)
    for one in (times, ratios):
        one.set_xlabel(AXES[axis])
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _model(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{rows[0]['shape'].rpartition('-')[0]}, {rows[0]['dtype']}"


def _device(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    is_cpu = machine["device"].startswith("cpu")
    return machine["processor"] if is_cpu else machine["device"]
