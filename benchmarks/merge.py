"""How fast adapters are folded in, against the machine's copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks._choice import cases, described
from benchmarks._race import Entry, race
from benchmarks.step_time import COPY, copy_rate

CPU = (("t5-base-8x64", 8, ["all-linear"]),)
GPU = (("llama-1b-2x2048", 8, ["all-linear"]),)
COLUMNS = ("case", "contender", "median_ms", "gbytes", "gbytes_per_s",
           "copy_gbytes_per_s", "share_of_bandwidth", "error")  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    size = 2**20 if options.quick else 2**32 if options.gpu else 2**29
    for one in cases(options, CPU, GPU):
        arguments = {"case": dataclasses.asdict(one)}
        merge = Entry("jlora", "benchmarks.merge:Merge", arguments)
        copy = Entry(COPY, "benchmarks._runners:Copy", {"size": size})
        result = race([merge, copy], options)
        about |= result.about
        rows.append({**described(one), "contender": "jlora", **_figures(result)})
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _figures(result: Any) -> dict[str, Any]:
    if "jlora" in result.errors:
        return {"error": result.errors["jlora"]}
    median, moved = result.median("jlora"), result.facts["jlora"]["bytes_moved"]
    rate, copy = moved / 1e6 / median, copy_rate(result)
    return {
        "median_ms": median,
        "gbytes": moved / 1e9,
        "gbytes_per_s": rate,
        "copy_gbytes_per_s": copy,
        "share_of_bandwidth": None if copy is None else rate / copy,
    }


class Merge:
    """One merge of every adapted kernel."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        import jax

        import jlora
        from benchmarks._workload import workload

        self.tree = workload(case).lorafied()
        nodes = jax.tree.leaves(self.tree, is_leaf=jlora.is_node)
        kernels = [x for x in nodes if jlora.is_node(x)]
        base = sum(x.base.nbytes for x in kernels)
        factors = sum(t.a.nbytes + t.b.nbytes for x in kernels
                      for t in x.adapters.values())  # fmt: skip
        # The least there is to do: read base and factors, write the merged kernels.
        self.facts = {"bytes_moved": 2 * base + factors}

    def step(self) -> None:
        """Merge once."""
        import jax

        import jlora

        jax.block_until_ready(jlora.merge(self.tree))
