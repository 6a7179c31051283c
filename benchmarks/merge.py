"""How fast adapters are folded in, against the machine's copy.

A merge gives a new tree, so it is held against a copy that does: every adapted kernel
read once and written to new memory, in one program. On a CPU the system hands out that
memory page by page, which takes longer than the copying. `--env fresh` makes every page
new, as for who merges once; `--env tuned` keeps them; glibc by itself keeps some, more
or fewer from run to run. The copy in place, which no merge can reach while the base is
kept, stands beside them: it is what the memory itself can do. A merge with
`donate=True` writes over its bases and needs no new memory, so that copy is its bar.
What either made is freed when the clock has stopped. Programs are compiled for shapes,
so what a user waits for who merges once is `first_s`.

PEFT writes over its bases, and checks for NaN only with `safe_merge`, in a copy of each
kernel.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import _results
from benchmarks._choice import cases, contenders, described
from benchmarks._race import Entry, Race, race
from benchmarks.step_time import COPY, copy_rate

CPU = (("t5-base-8x64", 8, ["all-linear"]),)
GPU = (("llama-1b-2x2048", 8, ["all-linear"]),)
# Whether bases are written over, or checks made.
OWN = {"jlora": {"donate": False}, "jlora, donated": {"donate": True}}
PEFT = {"PEFT": {"safe": False}, "PEFT, safe_merge": {"safe": True}}
NEW = "copy, new memory"
COLUMNS = (
    "case", "contender", "first_s", "median_ms", "gbytes", "gbytes_per_s",
    "copy_gbytes_per_s", "in_place_gbytes_per_s", "share_of_bandwidth",
    "share_of_in_place", "to_peft", "to_safe_merge", "error",
)  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    size = 2**20 if options.quick else 2**32 if options.gpu else 2**29
    for one in cases(options, CPU, GPU):
        arguments = {"case": dataclasses.asdict(one)}
        names = contenders(options, (*OWN, *PEFT))
        new = Entry(NEW, "benchmarks.merge:CopyKernels", arguments)
        in_place = Entry(COPY, "benchmarks._runners:Copy", {"size": size})
        merges = [_entry(name, arguments) for name in names]
        result = race([*merges, new, in_place], options)
        about |= result.about
        rows += [
            {**described(one), "contender": name, **_figures(result, name)}
            for name in names
        ]
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _entry(name: str, arguments: Mapping[str, Any]) -> Entry:
    if name in PEFT:
        arguments = {**arguments, **PEFT[name]}
        return Entry(name, "benchmarks._peers_torch:Merge", arguments, "PEFT")
    return Entry(name, "benchmarks.merge:Merge", {**arguments, **OWN[name]})


def _figures(result: Race, name: str) -> dict[str, Any]:
    if name in result.errors:
        return {"error": result.errors[name]}
    rate, new, in_place = (copy_rate(result, other) for other in (name, NEW, COPY))
    assert rate is not None
    return {
        "first_s": result.facts[name]["first_s"],
        "median_ms": result.median(name),
        "gbytes": result.facts[name]["bytes_moved"] / 1e9,
        "gbytes_per_s": rate,
        "copy_gbytes_per_s": new,
        "in_place_gbytes_per_s": in_place,
        "share_of_bandwidth": None if new is None else rate / new,
        "share_of_in_place": None if in_place is None else rate / in_place,
        "to_peft": result.ratio(name, "PEFT"),
        "to_safe_merge": result.ratio(name, "PEFT, safe_merge"),
        "all_ms": result.times[name],
    }


def _kernels(case: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Return a case's tree, and the kernels in it that have adapters."""
    from benchmarks._workload import adapted_kernels, workload

    tree = workload(case).lorafied()
    return tree, adapted_kernels(tree)


class Merge:
    """One merge of every adapted kernel; donated, the next one is of what it made."""

    def __init__(self, case: Mapping[str, Any], *, donate: bool) -> None:
        import jax
        import jax.numpy as jnp

        self.tree, kernels = _kernels(case)
        self.donate = donate
        base = sum(x.base.nbytes for x in kernels)
        factors = sum(t.a.nbytes + t.b.nbytes for x in kernels
                      for t in x.adapters.values())  # fmt: skip
        if donate:  # others read the case's own
            self.tree = jax.tree.map(jnp.copy, self.tree)
        self.facts = first(self.step, base, factors)

    def step(self) -> Any:
        """Merge once."""
        import jax

        import jlora

        dense = jax.block_until_ready(jlora.merge(self.tree, donate=self.donate))
        if self.donate:
            self.tree = jax.tree.map(_on, self.tree, dense, is_leaf=jlora.is_node)
        return dense


def _on(x: Any, base: Any) -> Any:
    """The same adapters on another base."""
    import jlora

    return x.map(base, lambda t: t) if jlora.is_node(x) else x


def first(step: Callable[[], Any], base: int, factors: int) -> dict[str, float]:
    """Return what is known after a first step; base and factors are bytes."""
    start = time.perf_counter()
    step()
    # The least there is to do: read base and factors, write the merged kernels.
    moved = 2 * base + factors
    return {"bytes_moved": moved, "first_s": time.perf_counter() - start}


class CopyKernels:
    """One pass over the kernels that a merge reads, into new memory."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        import jax

        self.kernels = [x.base for x in _kernels(case)[1]]
        # Not `jnp.copy`, which on a CPU runs on one core.
        self.run = jax.jit(lambda kernels: [x + 1 for x in kernels])
        self.facts = {"bytes_moved": 2 * sum(x.nbytes for x in self.kernels)}

    def step(self) -> Any:
        """Copy once."""
        import jax

        return jax.block_until_ready(self.run(self.kernels))
