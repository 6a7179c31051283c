"""Plots of sweeps: milliseconds, and the ratio to the floor, over one size."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

AXES = {
    "rank": "rank of the adapters",
    "depth": "layers",
    "adapters": "kernels with an adapter",
    "batch": "sequences a batch",
    "length": "tokens a sequence",
}
# One colour a contender in every plot, told apart by the blind to red and green too.
COLOURS = {"floor": "0.45", "jlora": "#0072b2", "full fine-tuning": "#d55e00"}
OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
HEADROOM = 1.18  # for what is written above the points


def plot(name: str, result: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
    """Draw one file for each axis of a sweep; return their names."""
    made = []
    for axis in dict.fromkeys(row["axis"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["axis"] == axis and r["median_ms"]]
        if rows:
            file = f"{name}_{axis}.png"
            _draw(axis, rows, _title(axis, rows, result), folder / file)
            made.append(file)
    return made


def _draw(axis: str, rows: Sequence[Row], title: str, file: pathlib.Path) -> None:
    """Times on the left, their ratios to the floor on the right; both from zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    places = _places(axis, rows)
    colours = dict(COLOURS)
    others = iter(OTHERS)
    for contender in dict.fromkeys(r["contender"] for r in rows):
        own = [r for r in rows if r["contender"] == contender]
        colour = colours.setdefault(contender, next(others, "black"))
        _line(times, own, "median_ms", places, label=contender, color=colour)
        if contender != "floor":
            _line(ratios, own, "to_floor", places, label=contender, color=colour)
    times.set_ylabel("milliseconds a step")
    ratios.set_ylabel("time / time of the floor")
    ratios.axhline(1.0, color=COLOURS["floor"], linewidth=1)
    for one in (times, ratios):
        _finish(one, axis, places)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)


def _places(axis: str, rows: Sequence[Row]) -> dict[str, tuple[float, str]]:
    """Where each value stands on the x axis, and what is written there."""
    if axis != "adapters":
        return {str(r["value"]): (float(r["value"]), f"{r['value']}") for r in rows}
    # By their number; the names would run into each other side by side.
    return {
        str(r["value"]): (float(r["kernels"]), f"{r['kernels']}\n{_lines(r['value'])}")
        for r in rows
    }


def _lines(names: str) -> str:
    return names.replace(" ", "\n")


def _line(
    one: Any, rows: Sequence[Row], column: str, places: Any, **style: Any
) -> None:
    """A contender's line; ratios carry their values."""
    known = [r for r in rows if r.get(column) is not None]
    x = [places[str(r["value"])][0] for r in known]
    y = [r[column] for r in known]
    one.plot(x, y, "o-", markersize=4, **style)
    if column == "to_floor":
        for point in zip(x, y, strict=True):
            one.annotate(
                f"{point[1]:.2f}", point, (0, 6), textcoords="offset points",
                ha="center", fontsize=8, color=style["color"],
            )  # fmt: skip


def _finish(one: Any, axis: str, places: Mapping[str, tuple[float, str]]) -> None:
    if axis == "rank":
        one.set_xscale("log", base=2)
    ticks, labels = zip(*dict.fromkeys(places.values()), strict=True)
    one.set_xticks(ticks, labels)
    one.minorticks_off()
    one.margins(x=0.08)
    one.set_ylim(0, one.get_ylim()[1] * HEADROOM)
    one.set_xlabel(AXES[axis])
    one.grid(axis="y", color="0.9")
    one.set_axisbelow(True)
    one.spines[["top", "right"]].set_visible(False)


def _title(axis: str, rows: Sequence[Row], result: Mapping[str, Any]) -> str:
    """The model, what stayed the same on this axis, and the machine."""
    cases = [_parts(r["case"]) for r in rows]
    same = [part for part in cases[0] if all(part in case for case in cases)]
    machine = result["machine"]
    is_cpu = machine["device"].startswith("cpu")
    where = machine["processor"] if is_cpu else machine["device"]
    return f"A training step of {', '.join(same)}\n{where}, {machine['date'][:10]}"


def _parts(title: str) -> list[str]:
    """A case's title in pieces: the model, the batch, and what follows."""
    head, *rest = title.split(", ")
    return [*head.split(" ", 1), *rest]
