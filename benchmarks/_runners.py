"""What a JAX worker opens: contenders compiled, and the machine's peaks.

A runner has `facts`, found out while it was made, and `step()`, which is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import _contenders, _peers_jax
from benchmarks._workload import workload

CONTENDERS: dict[str, Callable[..., Any]] = {
    "floor": _contenders.floor,
    "by hand": _contenders.by_hand,
    "jlora": _contenders.transformed,
    "naive W+sAB": _contenders.naive,
    "full fine-tuning": _contenders.full,
    "jlora, optax.masked": _contenders.masked,
    "jlora, masked, clipped": _contenders.clipped,
    "qwix": _peers_jax.qwix,
    "quax": _peers_jax.quax,
    "lorax": _peers_jax.lorax,
}


class Training:
    """A contender's step, compiled ahead of time."""

    def __init__(self, case: Mapping[str, Any], contender: str) -> None:
        work = workload(case)
        if contender not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise ValueError(f"no contender {contender!r}; there are {known}")
        step, state, self.frozen = CONTENDERS[contender](work)
        self.batch = work.batch
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, self.frozen, self.batch)
        self.compiled = lowered.compile()
        # The parameters are shared with others, and a step reuses its state's memory.
        self.state = jax.tree.map(jnp.copy, state)
        loss = self.step()
        took = time.perf_counter() - start
        moving = state[0] if isinstance(state, tuple) else ()
        self.facts = {
            "first_step_s": took,
            "loss": float(jax.tree.leaves(loss)[0]),
            "trainable": _trainable(contender, moving),
            "xla_gflop": (self.compiled.cost_analysis() or {}).get("flops", 0) / 1e9,
            "xla_bytes": memory(self.compiled),
        }

    def step(self) -> Any:
        """Run one step and wait for it."""
        self.state, loss = self.compiled(self.state, self.frozen, self.batch)
        return jax.block_until_ready((self.state, loss))[1]


def _trainable(contender: str, moving: Any) -> int | None:
    if contender == "floor":
        return None
    if "masked" in contender:
        moving, _ = jlora.split(moving)
    return sum(x.size for x in jax.tree.leaves(moving))


def memory(compiled: Any) -> dict[str, int]:
    """Return XLA's own account of a program's memory, bytes."""
    a = compiled.memory_analysis()
    sizes = {
        "arguments": a.argument_size_in_bytes,
        "outputs": a.output_size_in_bytes,
        "aliased": a.alias_size_in_bytes,
        "temporary": a.temp_size_in_bytes,
    }
    peak = sizes["arguments"] + sizes["outputs"] + sizes["temporary"] - sizes["aliased"]
    return {**sizes, "peak": peak}


class Matmul:
    """Square products, one after the other: the rate that the machine reaches at best.

    As many as take about as long as a step: what comes before a single one, a cold
    cache or another framework's threads that still spin, is a third of its time.
    """

    def __init__(self, size: int, dtype: str, times: int) -> None:
        shape = (size, size)
        keys = jax.random.split(jax.random.key(0))
        self.x, self.y = (jax.random.normal(k, shape, jnp.dtype(dtype)) for k in keys)
        self.x = self.x * size**-0.5  # products stay as large as y
        self.run = jax.jit(
            lambda x, y: jax.lax.fori_loop(0, times, lambda _, z: x @ z, y)
        )
        self.facts = {"gflop": times * 2 * size**3 / 1e9, "size": size, "dtype": dtype}

    def step(self) -> None:
        """Multiply so many times."""
        jax.block_until_ready(self.run(self.x, self.y))


class Copy:
    """One pass over a large array, in place: the bandwidth that memory has at best.

    Memory that is new costs more: on a CPU each page is handed out when first written.
    """

    def __init__(self, size: int) -> None:
        self.x = jnp.zeros(size // 4, jnp.float32)
        self.run = jax.jit(lambda x: x + 1, donate_argnums=0)
        self.facts = {"bytes_moved": 2 * 4 * self.x.size}

    def step(self) -> None:
        """Read and write it once."""
        self.x = jax.block_until_ready(self.run(self.x))
