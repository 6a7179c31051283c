"""The tables of the page of benchmarks, from the files in benchmarks/results."""

from __future__ import annotations

import json

from benchmarks import report
from benchmarks.results import RESULTS, table


def pages() -> dict[str, str]:
    """The bars that the project sets itself, and every result."""
    files = sorted(RESULTS.glob("*.json"))
    found = {file.stem: json.loads(file.read_text()) for file in files}
    bars = table(list(report.bars(found)), report.BARS)
    sections = "".join(map(report.section, found, found.values()))
    return {
        "_generated/bars.md": f"{bars}\n",
        "_generated/results.md": sections.replace("\n## ", "\n### "),
    }
