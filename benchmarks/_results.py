"""Result files: rows with the machine they were measured on; and tables."""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._workers import ENVIRONMENTS, ROOT

RESULTS = pathlib.Path(__file__).parent / "results"
REQUIRED = ("command", "machine", "environment", "options", "rows")

Row = dict[str, Any]


def machine(about: Mapping[str, Mapping[str, Any]], load: float) -> dict[str, Any]:
    """Return what a figure was measured on and with."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    head = subprocess.run(git, capture_output=True, text=True)
    versions: dict[str, str] = {}
    for worker in about.values():
        versions |= worker.get("versions", {})
    devices = [w["device"] for w in about.values() if "device" in w]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": devices[0] if devices else "cpu",
        "processor": _processor(),
        "load": load,  # when the run began
        "python": platform.python_version(),
        "versions": dict(sorted(versions.items())),
        "commit": head.stdout.strip() or None,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def save(
    options: Any, about: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]
) -> pathlib.Path | None:
    """Write the rows of a run; tiny sizes are saved only where `--results` says."""
    if options.results is None and (options.quick or options.dry):
        return None
    folder = pathlib.Path(options.results or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    name = options.name or "_".join(
        [options.command, *(["gpu"] if options.gpu else []),
         *([options.env] if options.env != "default" else [])]
    )  # fmt: skip
    result = {
        "command": options.command,
        "machine": machine(about, options.load),
        "environment": {"name": options.env, **ENVIRONMENTS[options.env]},
        "options": _asked(options),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nsaved {path}")
    return path


def _asked(options: Any) -> dict[str, Any]:
    """Return the command line, without where things lie on this machine."""
    kept = {k: v for k, v in vars(options).items() if k not in ("results", "python")}
    if kept.get("data"):
        kept["data"] = pathlib.Path(kept["data"]).name
    return dict(sorted(kept.items()))


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return every result in a folder, by file name.

    Raises:
      ValueError: a file that is no result.
    """
    out = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        missing = [key for key in REQUIRED if key not in result]
        if missing:
            raise ValueError(f"{path} is no result of a benchmark: it lacks {missing}.")
        out[path.stem] = result
    return out


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a Markdown table of the columns that any row fills."""
    used = [c for c in columns if any(row.get(c) is not None for row in rows)]
    cells = [[c.replace("_", " ") for c in used]]
    cells += [[_cell(row.get(c)) for c in used] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(used))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _cell(x: Any) -> str:
    if x is None:
        return ""
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, float):
        return f"{x:,.3f}" if abs(x) < 10 else f"{x:,.0f}"
    if isinstance(x, int):
        return f"{x:,}"
    text = " ".join(x) if isinstance(x, list) else str(x)
    return text.replace("|", "\\|")
