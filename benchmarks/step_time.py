"""Milliseconds of a training step: contenders, peers and the machine in one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Contender, Race, Row, Rows, chosen, race

CPU = (
    Case("t5-small-8x64"),
    Case("t5-small-8x64", targets="all-linear"),
    Case("t5-small-16x128"),
    Case("gpt2-4x128"),
)
GPU = (
    Case("t5-base-32x512"),
    Case("llama-1b-2x2048"),
    Case("llama-1b-2x2048", rank=16, targets="all-linear"),
)
# Ours share a process; each peer has its own.
OURS = ("floor", "by hand", "jlora", "full fine-tuning")
TORCH = ("PEFT", "PEFT, torch.compile", "loralib")
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    **{name: ("jax", "jax_steps:training", {"kind": name}) for name in OURS},
    **{n: (n, "jax_steps:training", {"kind": n}) for n in ("qwix", "quax")},
    **{name: (name, "torch_steps:training", {"kind": name}) for name in TORCH},
}
COLUMNS = (
    "case", "contender", "median_ms", "min_ms", "cpu_ms", "to_floor", "to_by_hand",
    "to_peft", "to_compile", "full_to_this", "to_roofline", "share_of_peak",
    "first_step_s", "trainable", "loss", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case."""
    names = (*OURS, "PEFT", "loralib", "qwix", "quax")
    if options.gpu:
        names = (*OURS, "PEFT", "PEFT, torch.compile")
    names = options.contenders or names
    size = 64 if options.quick else 8192 if options.gpu else 2048
    for one in cases(options, *(GPU if options.gpu else CPU)):
        product = {"case": one.json, "size": size}
        matmul = Contender("matmul", "benchmarks.jax_steps:matmul", product)
        entries = chosen(CONTENDERS, names, case=one.json)
        result = race([*entries, matmul], options)
        rows = result.rows({"case": one.title}, names)
        yield [row | roofline(result, row) for row in rows], result.about


def roofline(result: Race, row: Row) -> Row:
    """Compare with the time that the needed operations take at a matmul's rate."""
    if "median_ms" not in row or "matmul" not in result.facts:
        return {}
    known = result.facts["matmul"]
    full = "full" in row["contender"]
    needed = known["needed_gflop_full" if full else "needed_gflop"]
    rate = result.rate("matmul", known["gflop"])
    multiple = row["median_ms"] / 1e3 * rate / needed
    return {
        "needed_gflop": needed,
        "matmul_gflops": rate,
        "to_roofline": multiple,
        "share_of_peak": 1 / multiple,
    }
