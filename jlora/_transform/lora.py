"""`lora(fn)`: the function transform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import OptionError
from jlora._kernel.nodes import LowRank, is_node
from jlora._kernel.quantized import Quantized
from jlora._transform.forwarded import forwarded
from jlora._transform.frozen import freeze
from jlora._transform.replay import OnMissing, Replay
from jlora._transform.resolve import resolve, with_magnitudes
from jlora._transform.without import check_bases


def lora(
    fn: Callable[..., Any],
    *,
    on_missing: OnMissing = "error",
    stop_frozen: bool = True,
) -> Callable[..., Any]:
    """Make a JAX function use lorafied parameters.

    The function is traced on the dense shapes and replayed with low-rank kernels in
    the place of the dense ones; its code is not edited. Call the result under
    `jax.jit`, like the function itself.

    Args:
      fn: any function of arrays. Lorafied trees may be anywhere in its arguments;
        arguments that are not arrays are passed on unchanged.
      on_missing: what to do if a primitive that meets an adapted kernel has no low-rank
        rule: raise an `"error"`, or `"materialize"` the merged kernel for that one use,
        with a single `JloraWarning`.
      stop_frozen: give no gradient to the frozen leaves of lorafied trees: the bases
        of their nodes, and all other leaves that were in the tree when it was lorafied.
        So `jax.grad` of the whole tree costs no more than that of its trainable half,
        and `optax.masked` has no gradients to pass through. Leaves added later keep
        their gradient, as in `{"model": tree, "prompt": soft_prompt}`. Pass False to
        differentiate the bases too.

    Returns:
      A function of the same arguments. Without a lorafied tree among them it does what
      `fn` does. Nodes that `fn` returns come back as nodes, and values that are not
      arrays come back unchanged.

    Raises:
      OptionError: an `on_missing` that is neither.
      UnsupportedOpError: a primitive without a rule, when called.
      ShapeError: a kernel is contracted over other axes than its adapter's.

    >>> params = lorafy({"kernel": jnp.ones((3, 2))}, rank=1, targets=["kernel"])
    >>> lora(lambda p, x: x @ p["kernel"])(params, jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """
    return transformed(fn, on_missing, stop_frozen)


def transformed(
    fn: Callable[..., Any],
    on_missing: OnMissing,
    stop_frozen: bool,
    tokens: Sequence[int | None] = (),
) -> Callable[..., Any]:
    """`lora`, also of a function of which the tokens' axis is known.

    Args:
      fn: the function.
      on_missing: as in `lora`.
      stop_frozen: as in `lora`.
      tokens: the axis in each leaf of the arguments that follow the first one, None in
        those without.
    """
    if on_missing not in ("error", "materialize"):
        raise OptionError(
            f"on_missing={on_missing!r}: expected 'error' or 'materialize'."
        )

    @functools.wraps(fn)
    def lorafied(*args: Any, **kwargs: Any) -> Any:
        if stop_frozen:
            args = tuple(freeze(x) for x in args)
            kwargs = {name: freeze(x) for name, x in kwargs.items()}
        given, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
        if not any(is_node(x) for x in given):
            return fn(*args, **kwargs)
        leaves = jax.tree.leaves(resolve((args, kwargs)), is_leaf=is_node)
        traced = [i for i, x in enumerate(leaves) if _is_traced(x)]
        out: list[Any] = []
        out_tree = None

        def flat(*arrays: Any) -> list[Any]:
            nonlocal out, out_tree
            full = list(leaves)
            for i, x in zip(traced, arrays, strict=True):
                full[i] = x
            inner_args, inner_kwargs = jax.tree.unflatten(treedef, full)
            found, out_tree = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
            # No tracer outlives its trace.
            out = [_ARRAY if isinstance(x, jax.Array) else x for x in found]
            return [x for x in found if isinstance(x, jax.Array)]

        operands = jax.tree.map(_as_jax, [leaves[i] for i in traced])
        jaxpr = jax.make_jaxpr(flat)(*[_dense(x) for x in operands])
        check_bases(jaxpr, (args, kwargs))
        run = Replay(on_missing)
        before = len(jax.tree.leaves(args[:1], is_leaf=is_node))
        marks = {before + n: ((d, 0),) for n, d in enumerate(tokens) if d is not None}
        inputs = [frozenset(marks.get(i, ())) for i in traced] if marks else None
        results = run.returned(run.replay(jaxpr, operands, inputs))
        # What is handed on goes out as it was given; what is no array, a name or a
        # number, is no result of a program.
        arrays = iter(
            with_magnitudes(x) if n is None else given[traced[n]]
            for x, n in zip(results, forwarded(jaxpr), strict=True)
        )
        done = [next(arrays) if x is _ARRAY else x for x in out]
        return jax.tree.unflatten(out_tree, done)

    return lorafied


_ARRAY: Any = object()  # a result's place


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | LowRank)


def _as_jax(x: Any) -> Any:
    """NumPy arrays in JAX's dtypes, as tracing sees them: int64 ids become int32."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def _dense(x: Any) -> Any:
    x = x.base if isinstance(x, LowRank) else x
    is_quantized = isinstance(x, Quantized)
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized else x
