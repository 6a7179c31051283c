"""What the transform adds to tracing and compiling a step, and the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import _results
from benchmarks._cases import Case, case
from benchmarks._choice import cases, described
from benchmarks._race import call
from benchmarks._workers import WorkerError

CPU = (("t5-small-8x64", 8, None),)
GPU = (("llama-1b-2x2048", 8, None),)
STAGES = ("trace", "lower", "compile", "all")
COLUMNS = (
    "case", "depth", "scan_layers", "stage", "plain_s", "full_s", "jlora_s", "ratio",
    "to_full", "error",
)  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    for one in cases(options, CPU, GPU):
        for depth in options.depths or [None]:
            deep = one if depth is None else _at_depth(one, depth, options)
            arguments = {
                "case": dataclasses.asdict(deep),
                "repeats": options.repeats,
                "run": depth is None,
            }
            head = {
                **described(deep),
                "depth": depth,
                "scan_layers": bool(one.model_fields.get("scan_layers")),
            }
            try:
                found, worker = call(
                    "benchmarks.compile_time:measure", arguments, options
                )
            except WorkerError as error:
                rows.append({**head, "error": str(error)})
                continue
            about |= worker
            rows += [{**head, **row} for row in found]
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _at_depth(one: Case, depth: int, options: Any) -> Case:
    same = ("rank", "targets", "model_fields", "batch", "source", "dtype")
    kept: dict[str, Any] = {name: getattr(one, name) for name in same}
    target = one.target or None
    return case(one.shape, quick=options.quick, depth=depth, target=target, **kept)


def measure(case: Mapping[str, Any], repeats: int, run: bool) -> list[dict[str, Any]]:
    """Return a row for each stage, with `run` the first step too; runs in a worker.

    Without `run` there are no parameters, only their shapes.
    """
    import jlora
    from benchmarks._workload import Workload, adapted_kernels

    work = Workload(Case(**case), abstract=not run)
    tree = work.lorafied()
    trainable, frozen = jlora.split(tree)
    adapted = jlora.lora(work.loss)
    kernels = {x.path: x.base for x in adapted_kernels(tree)}

    def plain(kernels: Any, base: Any, batch: Any) -> Any:
        return work.loss(_with(base, kernels), batch)

    def lorafied(trainable: Any, frozen: Any, batch: Any) -> Any:
        return adapted(jlora.combine(trainable, frozen), batch)

    contenders = {
        # As much of the plain function is differentiated as has adapters on it;
        "plain": (plain, (kernels, work.params, work.batch)),
        # or all of it, as full fine-tuning does.
        "full": (work.loss_of_logits, (work.params, work.batch)),
        "jlora": (lorafied, (trainable, frozen, work.batch)),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (f, arguments) in contenders.items():
            seconds[name].append(_stages(f, arguments))
    if not run:
        return list(_rows(seconds))
    first = {name: _first(f, arguments) for name, (f, arguments) in contenders.items()}
    return [*_rows(seconds), *_first_rows(first)]


def _rows(seconds: Mapping[str, list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    for stage in STAGES:
        times = {name: [x[stage] for x in taken] for name, taken in seconds.items()}
        yield {
            "stage": stage,
            **{f"{name}_s": statistics.median(x) for name, x in times.items()},
            "ratio": _ratio(times["jlora"], times["plain"]),
            "to_full": _ratio(times["jlora"], times["full"]),
        }


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def _first_rows(first: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    took = {name: seconds for name, (seconds, _) in first.items()}
    yield {
        "stage": "first step",
        **{f"{name}_s": seconds for name, seconds in took.items()},
        "ratio": took["jlora"] / took["plain"],
        "to_full": took["jlora"] / took["full"],
    }
    yield {
        "stage": "compilations after it",
        **{f"{name}_s": count for name, (_, count) in first.items()},
    }


def _stages(f: Callable[..., Any], arguments: Any) -> dict[str, float]:
    """Seconds to trace, lower and compile the gradient, with nothing cached."""
    import jax

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


def _first(f: Callable[..., Any], arguments: Any) -> tuple[float, int]:
    """Seconds of a first step, and how often other values compile it again."""
    import jax

    jax.clear_caches()
    step = jax.jit(jax.value_and_grad(lambda *a: f(*a)))
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    took = time.perf_counter() - start
    others = [jax.tree.map(lambda x, k=k: x * k, arguments[0]) for k in (2, 3)]
    with compilations() as count:
        for other in others:
            jax.block_until_ready(step(other, *arguments[1:]))
    return took, len(count)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the programs that XLA compiles meanwhile."""
    import jax

    seen: list[str] = []
    on = [True]

    def note(event: str, seconds: float, **_: Any) -> None:
        if on and event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        on.clear()  # listeners cannot be taken away one by one


def _with(tree: Any, kernels: dict[str, Any]) -> Any:
    """The tree with some of its leaves replaced, by path."""
    import jax

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return kernels.get(name, leaf)

    return jax.tree_util.tree_map_with_path(one, tree)
