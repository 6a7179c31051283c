"""A training step beside those of other libraries, from the newest results."""

from __future__ import annotations

import json

from matplotlib.figure import Figure
from style import Colours

from benchmarks.results import RESULTS

SIZE = (6.8, 2.9)
NAMES = {
    "floor": "no adapter at all",
    "by hand": "LoRA written into the layers",
    "jlora": "jlora",
    "PEFT": "PEFT (PyTorch)",
    "loralib": "loralib (PyTorch)",
    "qwix": "qwix (JAX)",
    "quax": "quax (JAX)",
}


def draw(figure: Figure, colours: Colours) -> None:
    """The time of each over that of a step without any adapter."""
    rows = json.loads((RESULTS / "step_time_peers.json").read_text())["rows"]
    times = {row["contender"]: row["to_floor"] for row in rows if row["to_floor"]}
    axes = figure.subplots()
    for place, name in enumerate(sorted(times, key=times.__getitem__)):
        colour = colours.trained if name == "jlora" else colours.faint
        axes.barh(place, times[name], 0.65, color=colour)
        axes.text(times[name] + 0.01, place, f"{times[name]:.2f}", va="center")
    names = [NAMES[name] for name in sorted(times, key=times.__getitem__)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1 * max(times.values())))
    axes.set_xlabel("time of a step; 1 is forward and backward without adapters")
