"""Write RESULTS.md from the result files, with the bars of [bars.toml](bars.toml)."""

from __future__ import annotations

import importlib
import json
import pathlib
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.race import Row
from benchmarks.results import RESULTS, table

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
    found = {p.stem: json.loads(p.read_text()) for p in sorted(place.glob("*.json"))}
    parts = [HEAD.format(folder=place.name, bars=table(list(bars(found)), BARS))]
    path = place.parent / "RESULTS.md"
    path.write_text("\n".join([*parts, *map(section, found, found.values())]))
    return path


def section(name: str, result: Mapping[str, Any]) -> str:
    """Return a result with its command and machine, under a title of its name."""
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
