"""What the transform adds to tracing and compiling a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Row, Rows, chosen, race

CPU = (Case("t5-small-8x64"),)
GPU = (Case("llama-1b-2x2048"),)
STAGES = ("trace", "lower", "compile", "all")
CONTENDERS = {
    kind: ("jax", "compile_time:compiling", {"kind": kind})
    for kind in ("plain", "full", "jlora")
}
COLUMNS = (
    "case", "depth", "stage", "plain_s", "full_s", "jlora_s", "ratio", "to_full",
    "to_first_depth", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case and depth."""
    options.warmup = 0
    for one in cases(options, *(GPU if options.gpu else CPU)):
        first: dict[str, float] = {}  # seconds at the first depth, by stage
        for depth in options.depths or [None]:
            case = replace(one, depth=depth)
            entries = chosen(CONTENDERS, [*CONTENDERS], case=case.json)
            result = race(entries, options)
            head = {"case": case.title, "depth": depth}
            if result.errors:
                error = next(iter(result.errors.values()))
                yield [{**head, "error": error}], result.about
                continue
            rows = [{**head, **_figures(stage, result.facts)} for stage in STAGES]
            for row in rows if depth else ():
                seconds = first.setdefault(row["stage"], row["jlora_s"])
                row["to_first_depth"] = row["jlora_s"] / seconds
            yield rows, result.about


def _figures(stage: str, facts: Mapping[str, Any]) -> Row:
    times = {name: facts[name][stage] for name in CONTENDERS}

    def ratio(to: str) -> float:
        pairs = zip(times["jlora"], times[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    row = {f"{name}_s": statistics.median(x) for name, x in times.items()}
    return {"stage": stage, **row, "ratio": ratio("plain"), "to_full": ratio("full")}


def compiling(case: Mapping[str, Any], kind: str) -> Any:
    """Trace, lower and compile a gradient, with nothing cached; runs in a worker.

    There are no parameters, only their shapes. Of `plain` as much is differentiated as
    has adapters on it, of `full` everything, as full fine-tuning does.
    """
    import jax

    import jlora
    from benchmarks.work import Workload, kernels, path_name

    work = Workload(Case(**case))
    tree = work.lorafied(work.shapes)
    adapted = jlora.lora(work.loss)
    bases = {f"{module}/kernel": node.base for module, node in kernels(tree).items()}

    def plain(bases: Any, params: Any, batch: Any) -> Any:
        one = lambda path, leaf: bases.get(path_name(path), leaf)  # noqa: E731
        return work.loss(jax.tree_util.tree_map_with_path(one, params), batch)

    def lorafied(trainable: Any, frozen: Any, batch: Any) -> Any:
        return adapted(jlora.combine(trainable, frozen), batch)

    loss, arguments = {
        "plain": (plain, (bases, work.shapes)),
        "full": (work.loss_of_logits, (work.shapes,)),
        "jlora": (lorafied, jlora.split(tree)),
    }[kind]
    facts: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def step() -> None:
        jax.clear_caches()
        gradient = jax.jit(jax.value_and_grad(lambda *args: loss(*args)))
        start = time.perf_counter()
        traced = gradient.trace(*arguments, work.batch)
        after_trace = time.perf_counter()
        lowered = traced.lower()
        after_lower = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        facts["trace"].append(after_trace - start)
        facts["lower"].append(after_lower - after_trace)
        facts["compile"].append(end - after_lower)
        facts["all"].append(end - start)

    return step, facts
