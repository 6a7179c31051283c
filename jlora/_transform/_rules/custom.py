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
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jlora import _compat
from jlora._compat import Eqn, rebind
from jlora._errors import UnsupportedOpError
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora._transform._rules._table import Run, rule
from jlora._transform._rules._terms import bases, scaled_now


@rule(*_compat.CUSTOM_RULE)
def custom_rule(run: Run, eqn: Eqn, args: list[Any]) -> Any:
    """Value by replay, derivative by the function's own rule."""
    args = [scaled_now(x) for x in args]
    _refuse_dropout(args)

    @jax.custom_vjp
    def call(*operands: Any) -> list[Any]:
        return run.replay(eqn.params["call_jaxpr"], operands)

    def forward(*primals: Any) -> tuple[list[Any], Any]:
        operands, wanted = zip(*map(_value_and_wanted, primals), strict=True)
        _refuse_closures(eqn, operands, wanted)
        traced = jax.make_jaxpr(
            lambda *xs: _dense_vjp(eqn, xs, wanted), return_shape=True
        )(*bases(operands))
        jaxpr, (out_shape, pullback_shape) = traced
        flat = run.replay(jaxpr, operands)
        out, residuals = flat[: len(out_shape)], flat[len(out_shape) :]
        return out, (
            residuals, operands, _Static((jax.tree.structure(pullback_shape), wanted)),
        )  # fmt: skip

    def backward(saved: Any, cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, operands, static = saved
        treedef, wanted = static.value
        cotangents = [_instantiated(ct) for ct in cotangents]
        floats = [ct for ct in cotangents if ct.dtype != jax.dtypes.float0]

        def pull_back(residuals: Any, floats: Any) -> Any:
            feed = iter(floats)
            cts = [next(feed) if _is_float(ct) else ct for ct in cotangents]
            return jax.tree.unflatten(treedef, residuals)(cts)

        jaxpr = jax.make_jaxpr(pull_back)(bases(residuals), floats)
        grads = iter(run.replay(jaxpr, [*residuals, *floats]))
        return tuple(
            _operand_grad(x, next(grads) if want else None)
            for x, want in zip(operands, wanted, strict=True)
        )

    # A rule may ask which operands are differentiated, and refuse some.
    call.defvjp(forward, backward, symbolic_zeros=True)
    return call(*args)


def _value_and_wanted(primal: Any) -> tuple[Any, bool]:
    """An operand, and whether its derivative is asked for (of any of its arrays)."""
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    leaves, structure = jax.tree.flatten(primal, is_leaf=is_primal)
    value = jax.tree.unflatten(structure, [x.value for x in leaves])
    return value, _is_float(value) and any(x.perturbed for x in leaves)


def _instantiated(cotangent: Any) -> Any:
    """A cotangent as an array, also where it is known to be nought."""
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return np.zeros(cotangent.shape, cotangent.dtype)


def _refuse_closures(eqn: Eqn, operands: Sequence[Any], wanted: Sequence[bool]) -> None:
    """What such a function closes over has no derivative, in JAX neither."""
    closed_over = eqn.params.get("num_consts", 0)
    for x, want in zip(operands[:closed_over], wanted, strict=False):
        if want and isinstance(x, LowRank):
            name = eqn.params.get("name", eqn.primitive.name)
            raise UnsupportedOpError(
                f"the function `{name}` has a derivative of its own (jax.custom_vjp or "
                f"custom_jvp) and closes over the adapted kernel {x.path!r} {x.shape}: "
                "its rule cannot say what the kernel's gradient is.\nHand the kernel "
                "in as an argument, as the plain function's gradient needs too."
            )


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


def _dense_vjp(
    eqn: Eqn, xs: Sequence[Any], wanted: Sequence[bool]
) -> tuple[list[Array], Any]:
    """The function on dense operands, and its pullback to those that are wanted."""

    def f(*chosen: Any) -> list[Array]:
        feed = iter(chosen)
        pairs = zip(xs, wanted, strict=True)
        return rebind(eqn, [next(feed) if want else x for x, want in pairs])

    return jax.vjp(f, *(x for x, want in zip(xs, wanted, strict=True) if want))


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
