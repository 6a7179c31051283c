"""Seconds of `import jlora` beyond those of `import jax`, each in a fresh process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import _results
from benchmarks._workers import ROOT

COLUMNS = ("import", "median_s")
CODE = """
import time
start = time.perf_counter()
import jax
middle = time.perf_counter()
import jlora
print(middle - start, time.perf_counter() - middle)
"""


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    repeats = 1 if options.quick else options.repeats + 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for _ in range(repeats):
        words = subprocess.run(
            [sys.executable, "-c", CODE],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout.split()
        seconds.append([float(x) for x in words])
    # The first run may have compiled Python's files.
    counted = seconds[1:] or seconds
    jax, jlora = (statistics.median(column) for column in zip(*counted, strict=True))
    rows = [{"import": "jax", "median_s": jax}, {"import": "jlora", "median_s": jlora}]
    print(_results.table(rows, COLUMNS))
    _results.save(options, {}, rows)
    return rows
