"""Device memory of a step, by XLA's own account: split, masked, full."""

from __future__ import annotations

from typing import Any

import jax
import optax

import jlora
from benchmarks import _measure
from benchmarks._t5 import Size, Workload, tiny

COLUMNS = ("arguments", "outputs", "aliased", "temporary", "peak")


def main(args: Any) -> None:
    """Compile, print a table, save. Nothing runs."""
    work = Workload(Size(config=tiny()) if args.quick else Size())
    contenders = {
        "jlora, split": work.jlora(),
        "jlora, optax.masked": masked(work),
        "jlora, masked, global norm inside": masked(work, clip=True),
        "full fine-tuning": work.full(),
    }
    rows, flops = {}, {}
    for name, (step, state, frozen) in contenders.items():
        jitted = jax.jit(step, donate_argnums=0)
        compiled = jitted.lower(state, frozen, work.batch).compile()
        rows[name] = _bytes(compiled.memory_analysis())
        flops[name] = compiled.cost_analysis()["flops"] / 1e9
    table = [
        [n, *(f"{r[c] / 2**20:,.1f}" for c in COLUMNS), flops[n]]
        for n, r in rows.items()
    ]
    _measure.print_table(table, ["step", *(f"{c} MiB" for c in COLUMNS), "GFLOP"])
    if not args.quick:
        print(_measure.save("memory", {"bytes": rows, "gflop": flops}))


def masked(work: Workload, clip: bool = False) -> Any:
    """Train the whole tree through `optax.masked`, as optax's users know it."""
    tree = work.lorafied()
    tx = optax.adamw(1e-4)
    if clip:
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    tx = optax.masked(tx, jlora.trainable_mask(tree))
    loss = jlora.lora(work.loss)

    def step(state: Any, frozen: Any, batch: Any) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step, (tree, tx.init(tree)), ()


def _bytes(analysis: Any) -> dict[str, int]:
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }
    peak = sizes["arguments"] + sizes["outputs"] + sizes["temporary"] - sizes["aliased"]
    return {**sizes, "peak": peak}
