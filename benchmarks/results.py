"""Result files, with the machine they were measured on; tables."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.race import ENVIRONMENTS, ROOT, Row

RESULTS = pathlib.Path(__file__).parent / "results"
LOAD = os.getloadavg()[0]  # when the run began


def save(
    options: Any, arguments: Sequence[str], about: Mapping[str, Any], rows: list[Row]
) -> None:
    """Write the rows of a run; tiny sizes are saved only where `--results` says."""
    if options.results is None and options.quick:
        return
    folder = pathlib.Path(options.results or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [options.command, "gpu" if options.gpu else "", options.env]
    name = options.name or "_".join(p for p in parts if p not in ("", "default"))
    result = {
        "command": options.command,
        # Without where things lie on this machine.
        "arguments": [word.rpartition("/")[2] for word in arguments],
        "machine": machine(about),
        "environment": {"name": options.env, **ENVIRONMENTS[options.env]},
        "rows": rows,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def machine(about: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a figure was measured on and with."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    head = subprocess.run(git, capture_output=True, text=True)
    versions: dict[str, str] = {}
    for worker in about.values():
        versions |= worker["versions"]
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cores = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": next((worker["device"] for worker in about.values()), "cpu"),
        "processor": f"{len(cores)} x {cores[0]}" if cores else platform.processor(),
        "load": LOAD,
        "python": platform.python_version(),
        "versions": dict(sorted(versions.items())),
        "commit": head.stdout.strip() or None,
    }


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a Markdown table of the columns that any row fills."""
    used = [c for c in columns if any(row.get(c) is not None for row in rows)]
    cells = [[c if " " in c else c.replace("_", " ") for c in used]]
    cells += [[_cell(row.get(c)) for c in used] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells
    )


def _cell(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:,.3f}" if abs(x) < 10 else f"{x:,.0f}"
    if isinstance(x, int):
        return f"{x:,}"
    return str(x).replace("|", "\\|")
