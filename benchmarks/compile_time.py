"""What the transform adds to tracing and compiling a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import jlora
from benchmarks import _measure
from benchmarks._t5 import Size, Workload, bases, tiny


def main(args: Any) -> None:
    """Measure, print a table, save."""
    size = Size(config=tiny()) if args.quick else Size()
    work = Workload(size)
    tree = work.lorafied()
    trainable, frozen = jlora.split(tree)
    adapted = jlora.lora(work.loss)
    plain_base = bases(tree)
    # As much of the plain function is differentiated as has adapters on it.
    kernels = {x.path: x.base for x in jax.tree.leaves(tree, is_leaf=jlora.is_node)
               if jlora.is_node(x)}  # fmt: skip

    def plain(kernels: Any, base: Any, batch: Any) -> Any:
        return work.loss(_with(base, kernels), batch)

    def lorafied(trainable: Any, frozen: Any, batch: Any) -> Any:
        return adapted(jlora.combine(trainable, frozen), batch)

    stages: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.repeats):
        for name, f, arguments in (
            ("plain", plain, (kernels, plain_base, work.batch)),
            ("jlora", lorafied, (trainable, frozen, work.batch)),
        ):
            for stage, seconds in _stages(f, arguments).items():
                stages.setdefault(stage, {}).setdefault(name, []).append(seconds)
    rows = []
    for stage, times in stages.items():
        medians = [statistics.median(times[n]) for n in ("plain", "jlora")]
        rows.append([stage, *medians, _measure.ratio(times, "jlora", "plain")])
    _measure.print_table(rows, ["stage", "plain s", "jlora s", "ratio"])
    if not args.quick:
        print(_measure.save("compile_time", {"seconds": stages, "rows": rows}))


def _stages(f: Callable[..., Any], arguments: Any) -> dict[str, float]:
    """Seconds to trace, lower and compile the gradient, with nothing cached."""
    jax.clear_caches()
    step = jax.jit(jax.value_and_grad(lambda *a: f(*a)))
    start = time.perf_counter()
    traced = step.trace(*arguments)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {
        "trace": after_trace - start,
        "lower": after_lower - after_trace,
        "compile": end - after_lower,
        "all": end - start,
    }


def _with(tree: Any, kernels: dict[str, Any]) -> Any:
    """The tree with some of its leaves replaced, by path."""

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return kernels.get(name, leaf)

    return jax.tree_util.tree_map_with_path(one, tree)
