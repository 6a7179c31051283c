"""Where a kernel lies: shardings, devices, memory spaces."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._kernel.axes import Array, Dims
from jlora._kernel.nodes import LowRank
from jlora._kernel.placement import factor_spec
from jlora._kernel.quantized import Quantized, dense
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules.quantised import placed_base


@rule("sharding_constraint", *_compat.RESHARD)
def sharding_constraint(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The kernel's sharding for the base, its part of each axis for the factors."""
    (w,) = args
    sharding = next(
        v for k, v in eqn.params.items() if k in ("sharding", "dst_sharding")
    )
    if not isinstance(sharding, NamedSharding):
        (base,) = rebind(eqn, [dense(w.base)])
        return [w.map(base, lambda t: t)]
    place = (
        lax.with_sharding_constraint
        if eqn.primitive.name == "sharding_constraint"
        else _compat.reshard
    )

    def constrain(x: Array, dims: Dims) -> tuple[Array, Dims]:
        spec = factor_spec(sharding.spec, dims)
        return place(x, NamedSharding(sharding.mesh, spec)), dims

    if isinstance(w.base, Quantized):
        base = placed_base(w.base, sharding, place)
    else:
        (base,) = rebind(eqn, [w.base])
    return [w.map(base, lambda t: t.map(constrain))]


@rule("all_gather", "all_gather_invariant")
def all_gather(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Gathering a sharded kernel gathers the factors that span that dimension."""
    (w,) = args
    p = eqn.params
    dim = p["all_gather_dimension"]
    if not p["tiled"] or not all(
        t.full(dim, w.shape[dim]) for t in w.adapters.values()
    ):
        return NotImplemented

    def one(x: Array, dims: Dims) -> tuple[Array, Dims]:
        if dim not in dims:
            return x, dims
        params = {**p, "all_gather_dimension": dims.index(dim)}
        return eqn.primitive.bind(x, **params), dims

    return [w.map(rebind(eqn, [w.base])[0], lambda t: t.map(one))]


@rule("device_put")
def device_put(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """The kernel's device, memory space or sharding for base and factors."""
    return [
        _put(x, target) if isinstance(x, LowRank) else jax.device_put(x, target)
        for x, target in zip(args, eqn.params["devices"], strict=True)
    ]


def _put(w: LowRank, target: Any) -> LowRank:
    def one(x: Array, dims: Dims) -> tuple[Array, Dims]:
        where = target
        if isinstance(target, NamedSharding):
            spec = factor_spec(target.spec, dims)
            kind = target.memory_kind
            where = NamedSharding(target.mesh, spec, memory_kind=kind)
        return jax.device_put(x, where), dims

    return w.map(placed_base(w.base, target, jax.device_put), lambda t: t.map(one))
