"""Step times of the contenders, interleaved in one run."""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _measure
from benchmarks._t5 import Size, Workload, tiny


def main(args: Any) -> None:
    """Measure, print a table, save."""
    size = Size(args.batch, args.source, args.target)
    if args.quick:
        size = Size(2, 8, 8, tiny())
    work = Workload(size, jnp.dtype(args.dtype).type)
    targets = "all-linear" if args.targets == ["all-linear"] else args.targets
    contenders = {
        "floor": work.floor(),
        "by hand": work.by_hand(targets),
        "jlora": work.jlora(targets),
        "naive W+sAB": work.naive(targets),
        "full fine-tuning": work.full(),
    }
    runs, flops = {}, {}
    for name, (step, state, frozen) in contenders.items():
        compiled = (
            jax.jit(step, donate_argnums=0).lower(state, frozen, work.batch).compile()
        )
        flops[name] = compiled.cost_analysis()["flops"]
        runs[name] = _stepper(compiled, state, frozen, work.batch)
    times = _measure.interleaved(runs, args.repeats)
    result = {
        "workload": f"T5 {size.batch}x{size.source}/{size.target}, {args.dtype}, "
        f"rank 8, {args.targets}",
        "median_ms": {n: statistics.median(t) for n, t in times.items()},
        "min_ms": {n: min(t) for n, t in times.items()},
        "to_floor": {n: _measure.ratio(times, n, "floor") for n in times},
        "to_by_hand": {n: _measure.ratio(times, n, "by hand") for n in times},
        "gflop": {n: f / 1e9 for n, f in flops.items()},
        "all_ms": times,
    }
    columns = ["median_ms", "min_ms", "to_floor", "to_by_hand", "gflop"]
    rows = [[n, *(result[c][n] for c in columns)] for n in times]
    print(result["workload"])
    _measure.print_table(rows, ["contender", *columns])
    if not args.quick:
        print(_measure.save(f"step_time_{args.name}", result))


def _stepper(compiled: Any, state: Any, frozen: Any, batch: Any) -> Any:
    """A function that runs one more step each time it is called."""
    holder = [jax.tree.map(jnp.copy, state)]

    def run() -> Any:
        holder[0], loss = compiled(holder[0], frozen, batch)
        return holder[0], loss

    return run
