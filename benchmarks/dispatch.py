"""The call of a step: what Python and JAX do before the device has its work.

The step is AdamW on many tiny kernels, so that little of it is computing. A call is
waited for by the contender's next, which comes after those of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.race import Rows, chosen, race

CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: ("jax", "jax_calls:calling", {"kind": name})
    for name in ("flat lists", "trees of nodes", "jlora")
}
COLUMNS = (
    "kernels", "contender", "median_ms", "min_ms", "cpu_ms", "to_flat_lists", "arrays",
    "first_step_s", "error",
)  # fmt: skip
KERNELS = 448


def run(options: Any) -> Iterator[Rows]:
    """Yield a row for each contender and number of kernels."""
    for kernels in options.kernels or [8 if options.quick else KERNELS]:
        names = options.contenders or [*CONTENDERS]
        result = race(chosen(CONTENDERS, names, kernels=kernels), options)
        yield result.rows({"kernels": kernels}, names), result.about
