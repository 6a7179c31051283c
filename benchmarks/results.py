"""Result files, with the machine they were measured on; tables; RESULTS.md."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import pathlib
import platform
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.race import ENVIRONMENTS, ROOT, Row

RESULTS = pathlib.Path(__file__).parent / "results"
REQUIRED = ("command", "arguments", "machine", "environment", "rows")
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


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return every result in a folder, by file name.

    Raises:
      ValueError: a file that is no result.
    """
    out = {}
    for path in sorted(folder.glob("*.json")):
        out[path.stem] = json.loads(path.read_text())
        missing = [key for key in REQUIRED if key not in out[path.stem]]
        if missing:
            raise ValueError(f"{path} is no result of a benchmark: it lacks {missing}.")
    return out


# -- tables ----------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return a Markdown table of the columns that any row fills."""
    used = [c for c in columns if any(row.get(c) is not None for row in rows)]
    cells = [[c.replace("_", " ") for c in used]]
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


# -- the report ------------------------------------------------------------------------

HEAD = """# Benchmark results

Written by `python -m benchmarks report` from the files in [{folder}]({folder}); do not
edit. Contenders of a table took turns, round by round, in one run; ratios are medians
of the rounds' ratios. `to_roofline` is the step's time over that of the operations it
cannot do without ([work.py](work.py)) at the rate of a large matmul measured in the
same run. Before 2026-11-27 steps were called as programs compiled ahead of time, and
jlora's was its transform with optax around it; since then all go through `jax.jit`, and
jlora's is that of `jlora.train`. `load` is the machine's before the run: on a busy one
PyTorch's spinning threads lose several times what JAX's do. A contender that could not
do the work stands with its error.

## Bars

{bars}
"""
BARS = ("figure", "bar", "value", "met", "environment", "load", "file")


def report(folder: str | None) -> pathlib.Path:
    """Read every result, write the report beside their folder; return its path."""
    place = pathlib.Path(folder or RESULTS)
    found = read(place)
    parts = [HEAD.format(folder=place.name, bars=table(list(bars(found)), BARS))]
    path = place.parent / "RESULTS.md"
    path.write_text("\n".join([*parts, *map(_section, found, found.values())]))
    return path


def _section(name: str, result: Mapping[str, Any]) -> str:
    machine, command = result["machine"], result["command"]
    versions = [f"{n} {v}" for n, v in machine["versions"].items()]
    module = importlib.import_module(f"benchmarks.{command}")
    return f"""
## {name}

{(module.__doc__ or "").splitlines()[0]}

- `python -m benchmarks {shlex.join([command, *result["arguments"]])}`
- on {machine["processor"]}, device {machine["device"]}, load {machine["load"]:.1f}
- at {machine["date"]}, commit {machine["commit"]}
- with {", ".join([f"Python {machine['python']}", *versions])}

{table(result["rows"], module.COLUMNS)}
"""


def bars(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row for each bar, and for each environment it was measured in."""
    # The newest last, so that it stands.
    dated = sorted(results.items(), key=lambda x: x[1]["machine"]["date"])
    for bar in tomllib.loads(RESULTS.with_name("bars.toml").read_text())["bars"]:
        most, least = bar.get("at_most"), bar.get("at_least")
        words = f"at least {least}" if most is None else f"at most {most}"
        head = {"figure": bar["figure"], "bar": words}
        found = {}
        for name, result in dated:
            value = _value(bar, result)
            if value is not None:
                met = value >= least if most is None else value <= most
                environment = result["environment"]["name"]
                found[environment] = {
                    **head,
                    "value": value,
                    "met": "yes" if met else "no",
                    "environment": environment,
                    "load": result["machine"]["load"],
                    "file": name,
                }
        yield from found.values() or [{**head, "value": "not measured"}]


def _value(bar: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    device = "cpu" if result["machine"]["device"].startswith("cpu") else "gpu"
    asked = (bar["command"], bar.get("device", "cpu")) == (result["command"], device)
    if not asked or {"--quick", "--dry"} & {*result["arguments"]}:
        return None
    for row in result["rows"]:
        if bar["row"].items() <= row.items():
            return row.get(bar["column"])
    return None
