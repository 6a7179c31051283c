"""RESULTS.md and the plots, from the result files."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import _bars, _plots, _results

HEAD = """# Benchmark results

Written by `python -m benchmarks report` from the files in [{folder}]({folder}); do not
edit. Contenders of a table took turns, round by round, in one run; ratios are medians
of the rounds' ratios. `to_roofline` is the step's time over that of the operations it
cannot do without ([_needed.py](_needed.py)) at the rate of a large matmul measured
in the same run. `load` is the machine's before the run: on a busy one PyTorch's
spinning threads lose several times what JAX's do. A contender that could not do the
work stands with its error.

## Bars

"""
BARS = (
    "figure", "bar", "value", "met", "numerator", "denominator", "environment", "load",
    "file",
)  # fmt: skip


def main(options: Any) -> pathlib.Path:
    """Read every result, write the report beside their folder; return its path."""
    folder = pathlib.Path(options.results or _results.RESULTS)
    results = _results.read(folder)
    parts = [HEAD.format(folder=folder.name)]
    parts.append(_results.table(_bars.table(results), BARS) + "\n")
    parts += [_section(name, result, folder) for name, result in results.items()]
    path = folder.parent / "RESULTS.md"
    path.write_text("\n".join(parts))
    print(f"wrote {path}")
    return path


def _section(name: str, result: Mapping[str, Any], folder: pathlib.Path) -> str:
    machine, environment = result["machine"], result["environment"]
    versions = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    command = importlib.import_module(f"benchmarks.{result['command']}")
    about = f"""
## {name}

{(command.__doc__ or "").splitlines()[0]}

- on {machine["processor"]}, device {machine["device"]}, load {machine["load"]:.1f}
- at {machine["date"]}, commit {machine["commit"]}, environment {environment["name"]}
- with Python {machine["python"]}{", " if versions else ""}{versions}
"""
    parts = [about, _results.table(result["rows"], command.COLUMNS), ""]
    if result["command"] == "sweep":
        parts += [
            f"![{file}]({folder.name}/{file})\n"
            for file in _plots.plot(name, result, folder)
        ]
    return "\n".join(parts)
