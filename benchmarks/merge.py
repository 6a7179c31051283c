"""How fast adapters are folded in, against the machine's copy.

A merge gives a new tree, so it is held against a copy that does: every adapted kernel
read once and written to new memory, in one program. On a CPU the system hands out that
memory page by page, which takes longer than the copying. `--env fresh` makes every page
new, as for who merges once; `--env tuned` keeps them; glibc by itself keeps some, more
or fewer from run to run. A merge with `donate=True` writes over its bases and needs no
new memory, so its bar is the copy in place. What either made is freed when the clock
has stopped. Programs are compiled for shapes, so what a user waits for who merges once
is `first_s`.

PEFT writes over its bases, and checks for NaN only with `safe_merge`, in a copy of each
kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Contender, Race, Row, Rows, chosen, race

CPU = (Case("t5-base-8x64", targets="all-linear"),)
GPU = (Case("llama-1b-2x2048", targets="all-linear"),)
# What sets a merge apart: bases written over, or checks made.
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "jlora": ("jax", "merge:merge", {"donate": False}),
    "jlora, donated": ("jax", "merge:merge", {"donate": True}),
    "PEFT": ("PEFT", "torch_steps:merge", {"safe": False}),
    "PEFT, safe_merge": ("PEFT", "torch_steps:merge", {"safe": True}),
}
NEW, IN_PLACE = "copy, new memory", "copy, in place"
COLUMNS = (
    "case", "contender", "first_s", "median_ms", "gbytes", "gbytes_per_s",
    "copy_gbytes_per_s", "in_place_gbytes_per_s", "share_of_bandwidth",
    "share_of_in_place", "to_peft", "to_safe_merge", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case."""
    names = options.contenders or [*CONTENDERS]
    size = 2**20 if options.quick else 2**32 if options.gpu else 2**29
    for one in cases(options, *(GPU if options.gpu else CPU)):
        copies = [
            Contender(NEW, "benchmarks.merge:copy_kernels", {"case": one.json}),
            Contender(IN_PLACE, "benchmarks.merge:copy", {"size": size}),
        ]
        merges = chosen(CONTENDERS, names, case=one.json)
        result = race([*merges, *copies], options)
        rows = result.rows({"case": one.title}, names)
        yield [row | _rates(result, row) for row in rows], result.about


def _rates(result: Race, row: Row) -> Row:
    moved = {n: facts.get("bytes_moved", 0) / 1e9 for n, facts in result.facts.items()}
    names = (row["contender"], NEW, IN_PLACE)
    if not {*names} <= {*moved}:
        return {}
    rate, new, in_place = (result.rate(name, moved[name]) for name in names)
    return {
        "gbytes": moved[row["contender"]],
        "gbytes_per_s": rate,
        "copy_gbytes_per_s": new,
        "in_place_gbytes_per_s": in_place,
        "share_of_bandwidth": rate / new,
        "share_of_in_place": rate / in_place,
    }


# -- what a worker builds --------------------------------------------------------------


def merge(case: Mapping[str, Any], donate: bool) -> Any:
    """Merges of every adapted kernel; donated, the next one is of what it made."""
    import jax
    import jax.numpy as jnp

    import jlora
    from benchmarks.work import kernels, workload

    work = workload(Case(**case))
    tree = work.lorafied(work.params)
    trees = [jax.tree.map(jnp.copy, tree) if donate else tree]

    def on(x: Any, base: Any) -> Any:
        """The same adapters on another base."""
        return x.map(base, lambda t: t) if jlora.is_node(x) else x

    def step() -> Any:
        dense = jax.block_until_ready(jlora.merge(trees[0], donate=donate))
        if donate:
            trees[0] = jax.tree.map(on, trees[0], dense, is_leaf=jlora.is_node)
        return dense

    # The least there is to do: read base and factors, write the merged kernels.
    nodes = kernels(tree).values()
    moved = sum(2 * node.base.nbytes for node in nodes)
    moved += sum(t.a.nbytes + t.b.nbytes for n in nodes for t in n.adapters.values())
    start = time.perf_counter()
    step()
    return step, {"bytes_moved": moved, "first_s": time.perf_counter() - start}


def copy_kernels(case: Mapping[str, Any]) -> Any:
    """One pass over the kernels that a merge reads, into new memory."""
    import jax

    from benchmarks.work import kernels, workload

    work = workload(Case(**case))
    bases = [x.base for x in kernels(work.lorafied(work.params)).values()]
    # Not `jnp.copy`, which on a CPU runs on one core.
    run = jax.jit(lambda kernels: [x + 1 for x in kernels])
    facts = {"bytes_moved": 2 * sum(x.nbytes for x in bases)}
    return lambda: jax.block_until_ready(run(bases)), facts


def copy(size: int) -> Any:
    """One pass over a large array, in place: the bandwidth that memory has at best.

    Memory that is new costs more: on a CPU each page is handed out when first written.
    """
    import jax
    import jax.numpy as jnp

    arrays = [jnp.zeros(size // 4, jnp.float32)]
    run = jax.jit(lambda x: x + 1, donate_argnums=0)

    def step() -> None:
        arrays[0] = jax.block_until_ready(run(arrays[0]))

    return step, {"bytes_moved": 2 * arrays[0].nbytes}
