"""Bytes of a saved adapter: as Orbax and as PEFT store it."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks._choice import cases, described
from benchmarks._race import call

CPU = (
    ("t5-small-8x64", 8, None),
    ("t5-small-8x64", 8, ["all-linear"]),
    ("gpt2-4x128", 8, None),
)
GPU = (("llama-1b-2x2048", 8, None),)
COLUMNS = ("case", "format", "bytes", "bytes_of_factors", "overhead")


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    for one in cases(options, CPU, GPU):
        arguments = {"case": dataclasses.asdict(one)}
        found, worker = call("benchmarks.files:measure", arguments, options)
        about |= worker
        rows += [{**described(one), **row} for row in found]
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def measure(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each format; runs in a worker."""
    import jax

    import jlora
    import jlora.peft
    from benchmarks._workload import workload
    from jlora import checkpoint

    work = workload(case)
    tree = work.lorafied()
    trainable, _ = jlora.split(tree)
    factors = sum(x.nbytes for x in jax.tree.leaves(trainable))
    with tempfile.TemporaryDirectory() as folder:
        orbax, peft = pathlib.Path(folder, "orbax"), pathlib.Path(folder, "peft")
        checkpoint.save_adapter(orbax, tree)
        fan = True if work.case.family == "gpt2" else None
        jlora.peft.save(peft, tree, fan_in_fan_out=fan)
        sizes = {"orbax": _size(orbax), "peft": _size(peft)}
    return [
        {"format": name, "bytes": size, "bytes_of_factors": factors,
         "overhead": size / factors}
        for name, size in sizes.items()
    ]  # fmt: skip


def _size(folder: pathlib.Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
