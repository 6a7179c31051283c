"""A forward pass in which every example has an adapter of its own, and its products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Row, Rows, chosen, race

CPU = (Case("gpt2-4x128"),)
GPU = (Case("llama-1b-2x2048"),)
_JAX, _PRODUCT = "mixed_batches:forward", "mixed_batches:product"
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "floor": ("jax", _JAX, {"how": "floor"}),
    "jlora": ("jax", _JAX, {"how": "mixed"}),
    "jlora, picked": ("jax", _JAX, {"how": "mixed", "limit": 0}),
    "jlora, side by side": ("jax", _JAX, {"how": "mixed", "limit": 10**9}),
    "jlora, one by one": ("jax", _JAX, {"how": "one by one"}),
    "merged, adapter by adapter": ("jax", _JAX, {"how": "merged"}),
    "PEFT": ("PEFT", "torch_steps:mixed_batches", {}),
    "product, picked": ("jax", _PRODUCT, {"how": "picked"}),
    "product, side by side": ("jax", _PRODUCT, {"how": "side by side"}),
    "product, ragged_dot": ("jax", _PRODUCT, {"how": "ragged"}),
}
COLUMNS = ("case", "batch", "adapters", "contender", "median_ms", "to_floor", "to_peft",
           "error")  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case and number of adapters."""
    names = options.contenders or [*CONTENDERS]
    found = cases(options, *(GPU if options.gpu else CPU))
    # And the shape of a step of generation, where adapters weigh most.
    steps = [dataclasses.replace(one, batch=8, source=1) for one in found]
    for one in [*found, *steps]:
        for adapters in options.adapters:
            arguments = {"case": one.json, "adapters": adapters}
            result = race(chosen(CONTENDERS, names, **arguments), options)
            size = f"{one.batch}x{one.source}"
            head = {"case": one.title, "batch": size, "adapters": adapters}
            yield result.rows(head, names), result.about


def numbers(batch: int, adapters: int) -> list[int]:
    """Return who acts on which example, all of them in turn."""
    return [n % adapters for n in range(batch)]


def forward(
    case: Mapping[str, Any], adapters: int, how: str, limit: int | None = None
) -> Any:
    """The logits of a batch; runs in a worker."""
    import jax

    import jlora
    from benchmarks.work import workload
    from jlora._kernel import bank as banks

    work = workload(Case(**case))
    ids = work.batch["input_ids"]
    apply = lambda p, x: work.model.apply({"params": p}, x)  # noqa: E731
    tree = work.lorafied(work.params)
    which = numbers(ids.shape[0], adapters)
    if how == "floor":
        params, f = work.params, jax.jit(apply)
    elif how == "mixed":
        mixed = jlora.mixed(apply)

        def limited(params: Any, x: Any) -> Any:
            before = banks._SIDE_BY_SIDE
            banks._SIDE_BY_SIDE = before if limit is None else limit
            try:
                return mixed(params, x)
            finally:
                banks._SIDE_BY_SIDE = before

        f = jax.jit(limited)
        params = jlora.with_ids(jlora.bank([tree] * adapters), which)
    else:
        params = tree if how == "one by one" else jlora.merge(tree)
        f = jax.jit(jlora.lora(apply))
        groups: Any = [[n] for n in range(len(which))]
        if how == "merged":
            groups = [[n for n, k in enumerate(which) if k == a] for a in {*which}]
        parts = [ids[jax.numpy.asarray(rows)] for rows in groups]
        return lambda: jax.block_until_ready([f(params, x) for x in parts]), {}
    return lambda: jax.block_until_ready(f(params, ids)), {}


def product(case: Mapping[str, Any], adapters: int, how: str) -> Any:
    """Every example's own s·x·A·B alone, of one kernel of the model's width."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from benchmarks.work import workload

    work = workload(Case(**case))
    (size, length), width = work.batch["input_ids"].shape, work.config.n_embd
    rank = work.case.rank
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (size, length, width))
    a = jax.random.normal(keys[1], (adapters, width, rank))
    b = jax.random.normal(keys[2], (adapters, rank, width))

    def picked(x: Any, a: Any, b: Any, ids: Any) -> Any:
        low = jnp.einsum("bti,bir->btr", x, a[ids])
        return jnp.einsum("btr,bro->bto", low, b[ids])

    def side_by_side(x: Any, a: Any, b: Any, ids: Any) -> Any:
        mask = jax.nn.one_hot(ids, adapters)[:, None, :, None]
        low = jnp.einsum("bti,kir->btkr", x, a) * mask
        return jnp.einsum("btkr,kro->bto", low, b)

    def ragged(x: Any, a: Any, b: Any, ids: Any) -> Any:
        order = jnp.argsort(ids)
        rows = (jnp.bincount(ids, length=adapters) * length).astype(jnp.int32)
        low = lax.ragged_dot(x[order].reshape(-1, width), a, rows)
        out = lax.ragged_dot(low, b, rows).reshape(x.shape)
        return out[jnp.argsort(order)]

    forms = {"picked": picked, "side by side": side_by_side, "ragged": ragged}
    f, ids = jax.jit(forms[how]), jnp.asarray(numbers(size, adapters))
    return lambda: jax.block_until_ready(f(x, a, b, ids)), {}
