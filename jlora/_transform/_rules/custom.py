"""`jax.custom_jvp` and `jax.custom_vjp` functions that take an adapted kernel.

The value is computed low-rank. The derivative is the author's rule, never one that
autodiff would find inside: a rule may differ on purpose (straight-through, clipped or
fused gradients). The rule speaks of the dense kernel, so its gradient `dW` is formed,
then contracted to `dA = s·dW·Bᵀ` and `dB = s·Aᵀ·dW`. This is the one place where an
array of the kernel's shape appears beside it, and only when such a function is
differentiated; reverse mode only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._errors import UnsupportedOpError
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import scaled_now


@rule(*_compat.CUSTOM_RULE)
def custom_rule(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Value by replay, derivative by the function's own rule."""
    args = [scaled_now(x) for x in args]
    _refuse_dropout(args)

    @jax.custom_vjp
    def call(*operands: Any) -> list[Any]:
        return run.replay(eqn.params["call_jaxpr"], operands)

    def forward(*operands: Any) -> tuple[list[Any], Any]:
        dense = [x.base if isinstance(x, LowRank) else x for x in operands]
        traced = jax.make_jaxpr(lambda *xs: _dense_vjp(eqn, xs), return_shape=True)(
            *dense
        )
        jaxpr, (out_shape, pullback_shape) = traced
        flat = run.replay(jaxpr, operands)
        out, residuals = flat[: len(out_shape)], flat[len(out_shape) :]
        shape = (out_shape, jax.tree.structure(pullback_shape))
        return out, (residuals, operands, _Static(shape))

    def backward(saved: Any, cotangents: list[Array]) -> tuple[Any, ...]:
        residuals, operands, static = saved
        _, treedef = static.value
        dense = [x.base if isinstance(x, LowRank) else x for x in residuals]
        jaxpr = jax.make_jaxpr(
            lambda res, ct: jax.tree.unflatten(treedef, res)(ct)
        )(dense, cotangents)  # fmt: skip
        grads = iter(run.replay(jaxpr, [*residuals, *cotangents]))
        return tuple(
            _operand_grad(x, next(grads) if _is_float(x) else None) for x in operands
        )

    call.defvjp(forward, backward)
    return call(*args)


def _refuse_dropout(args: Sequence[Any]) -> None:
    """A rule makes products over again, and each would have a mask of its own."""
    for w in args:
        terms = w.adapters.values() if isinstance(w, LowRank) else ()
        if any(t.key is not None and t.dropout for t in terms):
            raise UnsupportedOpError(
                f"the kernel {w.path!r} has adapter dropout on and goes into a "
                "function with a derivative of its own (jax.custom_vjp, custom_jvp; "
                "jlora.train.linear_cross_entropy has one): its forward and backward "
                "passes would each draw another mask.\n"
                "Give that kernel's adapter none, jlora.Target(..., dropout=0.0), or "
                "leave it out, lorafy(..., exclude=...). A head can have dropout with "
                "jlora.train.cross_entropy of the logits."
            )


@jax.tree_util.register_static
class _Static:
    """A static value that rides along with residuals."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(
        jnp.result_type(x.dtype if hasattr(x, "dtype") else x), jnp.inexact
    )


def _dense_vjp(eqn: Eqn, xs: Sequence[Any]) -> tuple[list[Array], Any]:
    """The function and its pullback on dense operands, floats differentiated."""
    floats = [x for x in xs if _is_float(x)]

    def f(*fs: Any) -> list[Array]:
        feed = iter(fs)
        return rebind(eqn, [next(feed) if _is_float(x) else x for x in xs])

    return jax.vjp(f, *floats)


def _operand_grad(x: Any, grad: Any) -> Any:
    """The cotangent of an operand, as a tree like the operand's."""
    if grad is None:
        return None
    if not isinstance(x, LowRank):
        return grad
    (out,) = jax.vjp(_effective, x)[1](grad)
    return out


def _effective(w: LowRank) -> Array:
    """The kernel's value; only its pullback is used, the sum itself is dead code."""
    return w.base + w.delta().astype(w.dtype)
