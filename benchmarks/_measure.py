"""Fair timing: contenders interleaved in one process, medians, ratios."""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import optax

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each contender, one after the other in every round.

    A machine that slows down for a while slows all of them, so ratios within a round
    hold where times alone would not.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            took = 1e3 * (time.perf_counter() - start)
            if round_number >= warmup:
                times[name].append(took)
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of one contender's time over another's."""
    pairs = zip(times[name], times[to], strict=True)
    return statistics.median(x / y for x, y in pairs)


def machine() -> dict[str, Any]:
    """What a figure was measured on and with."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform}: {device.device_kind}",
        "processor": _processor(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "commit": head.stdout.strip() or None,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def save(name: str, result: Mapping[str, Any]) -> pathlib.Path:
    """Write a result beside the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def print_table(rows: list[list[Any]], header: list[str]) -> None:
    """A Markdown table."""
    cells = [header, *[[_cell(x) for x in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for number, row in enumerate(cells):
        parts = (x.ljust(w) for x, w in zip(row, widths, strict=True))
        print("| " + " | ".join(parts) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:,.3f}" if abs(x) < 10 else f"{x:,.0f}"
    return str(x)
