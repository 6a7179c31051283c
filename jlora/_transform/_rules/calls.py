"""Functions with a rule of their own for vmap, transposition or a solve.

Each is made again around the replay of its inner program, so that its rule stays the
one that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Eqn
from jlora._errors import UnsupportedOpError
from jlora._kernel.adapter import DIMS_OF, Adapter
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import bases


@rule("composite")
def composite(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Its decomposition: a backend's kernel of that name would expect one array."""
    return run.replay(_compat.call_body(eqn), args)


@rule("linear_call")
def linear_call(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`linear_call` with its own transpose; kernels among what it is not linear in."""
    parts = _compat.linear_call_parts(eqn)
    first = parts.num_consts + parts.num_residuals
    kept, linear = args[:first], args[first:]
    if any(isinstance(x, LowRank) for x in linear):
        return NotImplemented
    if any(isinstance(x, LowRank) for x in args[: parts.num_consts]):
        return NotImplemented  # the transpose has closed over dead values of these

    def forward(kept: Sequence[Any], linear: Sequence[Any]) -> list[Any]:
        return run.replay(parts.body, [*kept, *linear])

    def transposed(kept: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        body, consts = parts.transpose()
        residuals = kept[parts.num_consts :]
        return run.replay(body, [*consts, *residuals, *cotangents])

    return jax.custom_derivatives.linear_call(forward, transposed, kept, linear)


@rule("custom_linear_solve")
def custom_linear_solve(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`lax.custom_linear_solve`: its derivative is one more solve."""
    parts = _compat.solve_parts(eqn)
    feed = iter(args)
    consts = {
        name: [next(feed) for _ in range(n)] for name, n in parts.num_consts.items()
    }
    b = list(feed)
    if any(isinstance(x, LowRank) for x in b):
        return NotImplemented

    def program(name: str, b: Sequence[Any]) -> list[Any]:
        return run.replay(parts.programs[name], [*consts[name], *b])

    def solver(name: str) -> Callable[..., Any]:
        def solve(_: Any, b: list[Any]) -> tuple[list[Any], list[Any]]:
            out = program(name, b)
            return out[: len(b)], out[len(b) :]

        return solve

    has_transpose = parts.programs["transpose_solve"] is not None
    out, rest = lax.custom_linear_solve(
        functools.partial(program, "matvec"),
        b,
        solve=solver("solve"),
        transpose_solve=solver("transpose_solve") if has_transpose else None,
        symmetric=has_transpose and parts.symmetric,
        has_aux=True,
    )
    return [*out, *rest]


@rule("custom_vmap_call")
def custom_vmap(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """`custom_vmap` with its own rule, replayed where it meets a kernel."""
    parts = _compat.custom_vmap_parts(eqn)

    @jax.custom_batching.custom_vmap
    def call(*operands: Any) -> list[Any]:
        return run.replay(parts.body, operands)

    @call.def_vmap
    def by_rule(size: int, batched: Sequence[Any], *operands: Any) -> Any:
        moved, flags = [], []
        for x, flag in zip(operands, batched, strict=True):
            if isinstance(x, LowRank):
                flags.append(any(jax.tree.leaves(flag)))
                x = _stacked(x, flag, size) if flags[-1] else x
            else:
                flags.append(flag)
            moved.append(x)
        out_flags: list[bool] = []

        def rule_of(*xs: Any) -> list[Any]:
            out, out_batched = parts.rule(size, flags, xs)
            out_flags[:] = jax.tree.leaves(out_batched)
            return jax.tree.leaves(out)

        traced = jax.make_jaxpr(rule_of)(*bases(moved))
        return run.replay(traced, moved), out_flags

    return call(*args)


def _stacked(w: LowRank, flags: LowRank, size: int) -> LowRank:
    """A kernel of which arrays are batched, as one with a leading dimension."""
    if not flags.base:
        raise UnsupportedOpError(
            f"the kernel {w.path!r} {w.shape} is one for all of a `vmap`, its adapters "
            "are not, and a function with a batching rule of its own (custom_vmap) "
            "would be given as many kernels.\nTake the function out of the `vmap`, or "
            "that kernel out of `targets`."
        )

    def one(t: Adapter, flag: Adapter) -> Adapter:
        by_array = {id(getattr(t, n)): getattr(flag, n) for n in _ARRAYS}
        shifted = t.rename({d: d + 1 for d in range(w.ndim)}, w.ndim + 1)
        return shifted.map(lambda x, dims: (x, (0, *dims) if by_array[id(x)] else dims))

    adapters = {n: one(t, flags.adapters[n]) for n, t in w.adapters.items()}
    return LowRank(w.base, adapters, w.path)


_ARRAYS = tuple(DIMS_OF)
