"""The tables of the page of benchmarks, from the files in benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks import report
from benchmarks.race import Row
from benchmarks.results import RESULTS, table

STEPS = ("step_time", "step_time_all_linear")  # what the first table is made of


def pages() -> dict[str, str]:
    """The bars that the project sets itself, and every result."""
    files = sorted(RESULTS.glob("*.json"))
    found = {file.stem: json.loads(file.read_text()) for file in files}
    bars = table(list(report.bars(found)), report.BARS)
    sections = "".join(map(report.section, found, found.values()))
    return {
        "_generated/steps.md": f"{_steps(found)}\n",
        "_generated/bars.md": f"{bars}\n",
        "_generated/results.md": sections.replace("\n## ", "\n### "),
    }


def _steps(found: Mapping[str, Any]) -> str:
    """Milliseconds of a step: a row for each contender, a column for each case."""
    rows = [row for name in STEPS for row in found[name]["rows"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["contender"], {"step": row["contender"]})
        line[row["case"]] = round(row["median_ms"])
    return table(list(lines.values()), ["step", *cases])
