"""`lora(fn)`: the function transform."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._errors import OptionError
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._transform.replay import OnMissing, Replay
from jlora._transform.resolve import resolve


def lora(
    fn: Callable[..., Any],
    *,
    on_missing: OnMissing = "error",
    stop_frozen: bool = True,
) -> Callable[..., Any]:
    """Make a JAX function use lorafied parameters.

    The function is traced on the dense shapes and replayed with the low-rank kernels
    in the place of the dense ones; nothing of it is edited. Call the result under
    `jax.jit`, as one would the function itself.

    Args:
      fn: any function of arrays. Lorafied trees may stand anywhere in its arguments;
        arguments that are not arrays are handed on as they are.
      on_missing: what to do where a primitive that meets an adapted kernel has no
        low-rank rule: `"error"`, or `"materialize"` to merge that leaf for that one
        use, which is said once by a `JloraWarning`.
      stop_frozen: give no gradient to the frozen leaves of every argument that holds
        adapters, so that `jax.grad` of the whole tree costs no more than that of its
        trainable half. Pass False to differentiate the base too.

    Returns:
      A function of the same arguments. Without a lorafied tree among them it is `fn`.

    Raises:
      OptionError: an `on_missing` that is neither.
      UnsupportedOpError: a primitive without a rule, when called.
      ShapeError: a kernel is contracted over other axes than its adapter's.

    >>> params = lorafy({"kernel": jnp.ones((3, 2))}, rank=1, targets=["kernel"])
    >>> lora(lambda p, x: x @ p["kernel"])(params, jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """
    if on_missing not in ("error", "materialize"):
        raise OptionError(
            f"on_missing={on_missing!r}: expected 'error' or 'materialize'."
        )

    @functools.wraps(fn)
    def lorafied(*args: Any, **kwargs: Any) -> Any:
        if stop_frozen:
            args = tuple(_freeze(x) for x in args)
            kwargs = {name: _freeze(x) for name, x in kwargs.items()}
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
        if not any(is_node(x) for x in leaves):
            return fn(*args, **kwargs)
        leaves = jax.tree.leaves(resolve((args, kwargs)), is_leaf=is_node)
        traced = [i for i, x in enumerate(leaves) if _is_traced(x)]
        out_tree = None

        def flat(*arrays: Any) -> list[Any]:
            nonlocal out_tree
            full = list(leaves)
            for i, x in zip(traced, arrays, strict=True):
                full[i] = x
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, full)
            out, out_tree = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
            return out

        operands = jax.tree.map(_as_jax, [leaves[i] for i in traced])
        jaxpr = jax.make_jaxpr(flat)(*[_dense(x) for x in operands])
        out = Replay(on_missing).replay(jaxpr, operands)
        return jax.tree.unflatten(out_tree, out)

    return lorafied


def _freeze(argument: Any) -> Any:
    """Stop the gradient of all frozen leaves of an argument that holds adapters."""
    leaves, treedef = jax.tree.flatten(argument, is_leaf=is_node)
    if not any(is_node(x) for x in leaves):
        return argument
    return jax.tree.unflatten(treedef, [_freeze_leaf(x) for x in leaves])


def _freeze_leaf(x: Any) -> Any:
    if isinstance(x, Full):
        return x
    if isinstance(x, Rows):
        return dataclasses.replace(x, base=_stop(x.base))
    if isinstance(x, LowRank):
        return x.map(
            _stop(x.base), lambda t: dataclasses.replace(t, scale=_stop(t.scale))
        )
    return _stop(x)


def _stop(x: Any) -> Any:
    is_float = _is_traced(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    return lax.stop_gradient(x) if is_float else x


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | LowRank)


def _as_jax(x: Any) -> Any:
    """NumPy arrays in JAX's dtypes, as tracing sees them: int64 ids become int32."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _dense(x: Any) -> Any:
    return x.base if isinstance(x, LowRank) else x
