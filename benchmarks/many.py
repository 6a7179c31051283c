"""Many adapters in one compiled step, against runs one by one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Rows, chosen, race

RANKS = (1, 4, 16)
RATES = (3e-4, 1e-3, 3e-3)
SLOTS = (1, 4, 16, 64, 256, 1024)
CPU = (Case("t5-small-8x64", batch=4, source=32, target=32),)
TINY = Case("gpt2-4x128", rank=4, quick=True)
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one by one": ("jax", "many:training", {"together": False}),
    "one step": ("jax", "many:training", {"together": True}),
}
COLUMNS = (
    "what", "case", "contender", "adapters", "steps", "median_ms", "cpu_ms",
    "to_one_by_one", "compilations", "ms_an_adapter", "peak_mib", "predicted_mib",
    "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield nine configurations, compilation included; then time against number.

    The more steps, the less compilation counts: a step of nine and one of one, by
    themselves, say how much.
    """
    steps = 2 if options.quick else options.steps
    warmup, options.warmup = options.warmup, 0
    given = ("shape", "rank", "targets", "batch", "source", "target", "quick")
    is_asked = any(getattr(options, name) for name in given)
    chosen_cases = cases(options, *CPU) if is_asked else CPU
    for one in chosen_cases:
        wanted = options.contenders or [*CONTENDERS]
        entries = chosen(CONTENDERS, wanted, case=one.json, steps=steps)
        result = race(entries, options)
        head = {"what": "with compilation", "case": one.title, "steps": steps}
        yield result.rows(head, wanted), result.about
    options.warmup = max(1, warmup)
    for one in chosen_cases:
        yield _curve(one, (1, len(RANKS) * len(RATES)), options)
    yield _curve(TINY, SLOTS[:2] if options.quick else SLOTS, options)


def _curve(case: Case, slots: tuple[int, ...], options: Any) -> Rows:
    """Time and memory of a step against the number of adapters."""
    table = {str(k): ("jax", "many:stepping", {"slots": k}) for k in slots}
    result = race(chosen(table, [*table], case=case.json), options)
    rows = result.rows({"what": "a step", "case": case.title}, [*table])
    for row in rows:
        if "median_ms" in row:
            row["ms_an_adapter"] = row["median_ms"] / int(row["contender"])
    return rows, result.about


def _loss_fn(work: Any) -> Any:
    return lambda params, batch, key: work.totals(params, batch)


def training(case: Mapping[str, Any], together: bool, steps: int) -> Any:
    """Nine whole runs, from nothing compiled; runs in a worker."""
    import jax

    import jlora.train
    from benchmarks.work import Workload
    from jlora import sweep

    work = Workload(Case(**case))
    targets, loss_fn, params = work.case.names, _loss_fn(work), work.params
    jobs = sweep.grid(rank=[*RANKS], learning_rate=[*RATES])
    facts: dict[str, Any] = {"adapters": len(jobs), "compilations": 0, "losses": []}

    def one_step() -> None:
        jax.clear_caches()
        results = sweep.run(
            loss_fn, params, jobs, [work.batch], steps=steps, targets=targets
        )
        facts["compilations"] = results.compilations
        facts["losses"] = [result.loss for result in results]

    def one_by_one() -> None:
        jax.clear_caches()
        losses, facts["compilations"] = [], 0
        for job in jobs:
            tx = sweep.adamw(job)
            tree = job.lorafy(params, targets=targets)
            state = jlora.train.TrainState.create(tree, tx, job.key)
            step = jlora.train.make_train_step(loss_fn, tx)
            for _ in range(steps):
                state, metrics = step(state, work.batch)
            losses.append(float(metrics["loss"]))
            facts["compilations"] += step.cache_size()
        facts["losses"] = losses

    return one_step if together else one_by_one, facts


def stepping(case: Mapping[str, Any], slots: int) -> Any:
    """A step of so many adapters of one rank on one batch; runs in a worker."""
    import jax

    from benchmarks.work import Workload
    from jlora import sweep
    from jlora.sweep._memory import peak_of, resized

    work = Workload(Case(**case))
    rank, targets = work.case.rank, work.case.names
    jobs = sweep.paired(seed=list(range(slots)), rank=rank)
    plan = sweep.Plan(work.params, jobs, targets=targets)
    bank, step = plan.bank(jobs), sweep.sweep_step(_loss_fn(work))
    start = time.perf_counter()
    compiled = step.lower(bank, work.batch, shared=True).compile()
    facts = {
        "adapters": slots,
        "compile_s": time.perf_counter() - start,
        "peak_mib": peak_of(compiled) / 2**20,
    }
    if slots > 1:  # from half as many, and a quarter
        half = resized(bank, slots // 2)
        account = sweep.account(step, half, work.batch, shared=True)
        facts["predicted_mib"] = account.peak(slots) / 2**20

    def one() -> None:
        nonlocal bank
        bank, metrics = step(bank, work.batch, shared=True)
        jax.block_until_ready((bank.trainable, metrics))

    return one, facts
