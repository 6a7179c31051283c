"""Milliseconds of a training step: contenders, peers and the machine in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import _needed, _results
from benchmarks._cases import Case
from benchmarks._choice import cases, described
from benchmarks._race import Entry, Race, race

CPU = (
    ("t5-small-8x64", 8, None),
    ("t5-small-8x64", 8, ["all-linear"]),
    ("t5-small-16x128", 8, None),
    ("gpt2-4x128", 8, None),
)
GPU = (
    ("t5-base-32x512", 8, None),
    ("llama-1b-2x2048", 8, None),
    ("llama-1b-2x2048", 16, ["all-linear"]),
)
OWN = ("floor", "by hand", "jlora", "naive W+sAB", "full fine-tuning")
TORCH = {
    "PEFT": "PEFT",
    "compile": "PEFT, torch.compile",
    "loralib": "loralib",
    "full": "torch full",
}
JAX = ("qwix", "quax", "lorax")
PEERS = ("PEFT", "loralib", *JAX)
MATMULS = {"matmul": "_runners", "matmul, PyTorch": "_peers_torch"}
PRODUCTS = 8  # as long as a step of T5-small
COPY = "copy"
COLUMNS = (
    "case", "contender", "median_ms", "min_ms", "cpu_ms", "to_floor", "to_by_hand",
    "to_peft", "to_compile", "full_to_this", "xla_gflop", "to_roofline",
    "share_of_peak", "first_step_s", "trainable", "loss", "error",
)  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    for one in cases(options, CPU, GPU):
        result = race(entries(one, options), options)
        rows += rows_of(one, result)
        about |= result.about
        found = [row for row in rows if row["case"] == one.title]
        print(f"\n{one.title}")
        print(_results.table(found, COLUMNS[1:]))
    _results.save(options, about, rows)
    return rows


def entries(one: Case, options: Any) -> list[Entry]:
    """Return the contenders that the command line asks for, and the peaks."""
    own, peers = chosen(options, OWN, ("PEFT", "compile") if options.gpu else PEERS)
    size = 64 if options.quick else 8192 if options.gpu else 2048
    bytes_ = 2**20 if options.quick else 2**32 if options.gpu else 2**29
    return [
        *(training(one, name) for name in own),
        *(peer(one, name) for name in peers),
        *matmuls(one, size, torch="PEFT" in peers),
        Entry(COPY, "benchmarks._runners:Copy", {"size": bytes_}),
    ]


def chosen(
    options: Any, own: Sequence[str], peers: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return JAX's contenders and the peers, where nothing is said those given.

    A peer may stand among `--contenders`; then it runs, with those of `--peers`.
    """
    names = options.contenders or own
    named = [n for n in names if n in (*TORCH, *JAX)]
    asked = options.peers
    if asked is None:
        asked = [] if named else peers
    return [n for n in names if n not in named], [*dict.fromkeys([*named, *asked])]


def matmuls(one: Case, size: int, *, torch: bool) -> list[Entry]:
    """Return square products: XLA's, and PyTorch's where a worker has it."""
    groups = ["jax", "PEFT"] if torch else ["jax"]
    arguments = {"size": size, "dtype": one.dtype, "times": PRODUCTS}
    return [
        Entry(name, f"benchmarks.{module}:Matmul", arguments, group)
        for (name, module), group in zip(MATMULS.items(), groups, strict=False)
    ]


def training(one: Case, name: str, group: str = "jax") -> Entry:
    """Return one of JAX's contenders."""
    arguments = {"case": dataclasses.asdict(one), "contender": name}
    return Entry(name, "benchmarks._runners:Training", arguments, group)


def peer(one: Case, name: str) -> Entry:
    """Return a peer, in a worker of its own.

    Raises:
      ValueError: no peer of that name.
    """
    if name in JAX:
        return training(one, name, group=name)
    if name not in TORCH:
        raise ValueError(f"no peer {name!r}; there are {', '.join([*TORCH, *JAX])}")
    kind = TORCH[name]
    arguments = {"case": dataclasses.asdict(one), "kind": kind}
    return Entry(kind, "benchmarks._peers_torch:Training", arguments, name)


def rows_of(one: Case, result: Race) -> list[_results.Row]:
    """Return a row for each contender, those that failed included."""
    names = [n for n in (*result.facts, *result.errors) if n not in (*MATMULS, COPY)]
    rate = matmul_rate(result)
    return [
        {
            **described(one),
            "contender": name,
            **figures(one, result, name, rate),
            "error": result.errors.get(name),
        }
        for name in dict.fromkeys(names)
    ]


def figures(one: Case, result: Race, name: str, rate: float | None) -> dict[str, Any]:
    """Return what is known of a contender; nothing of one that failed."""
    if name not in result.times:
        return {}
    median, full = result.median(name), "full" in name
    needed = _needed.flops(one, full=full) / 1e9
    # Milliseconds that the needed operations take at the measured rate.
    bound = None if rate is None else needed / rate
    facts = result.facts[name]
    return {
        "median_ms": median,
        "min_ms": min(result.times[name]),
        "cpu_ms": statistics.median(result.cpu[name]),
        "to_floor": result.ratio(name, "floor"),
        "to_by_hand": result.ratio(name, "by hand"),
        "to_peft": result.ratio(name, "PEFT"),
        "to_compile": result.ratio(name, "PEFT, torch.compile"),
        "full_to_this": result.ratio("full fine-tuning", name),
        "needed_gflop": needed,
        "needed_bytes": _needed.bytes_moved(one),
        "to_roofline": None if bound is None else median / bound,
        "share_of_peak": None if bound is None else bound / median,
        "matmul_gflops": None if rate is None else 1e3 * rate,
        "copy_gbytes_per_s": copy_rate(result),
        **facts,
        "all_ms": result.times[name],
    }


def matmul_rate(result: Race) -> float | None:
    """Return a matmul's GFLOP a millisecond, the median of the rounds.

    The machine's rate is that of the framework which gets most out of it.
    """
    known = [name for name in MATMULS if name in result.times]
    rates = [result.facts[name]["gflop"] / result.median(name) for name in known]
    return max(rates, default=None)


def copy_rate(result: Race, name: str = COPY) -> float | None:
    """Return the copy's GB a second, read and written, the median of the rounds."""
    if name not in result.times:
        return None
    return result.facts[name]["bytes_moved"] / 1e6 / result.median(name)
