"""Mixed batches: one call in which every example names its adapter, or none.

Each example goes through the function as a batch of one, with its own adapter, under
`jax.vmap`: JAX knows which axis of every value is the examples', so nothing is guessed
and no example can see another's adapter. Products with the base are still one for the
whole batch; of a bank's factors each example's are gathered, or all are multiplied side
by side and masked, whichever the shapes make cheaper.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat
from jlora._errors import (
    DtypeError,
    OptionError,
    ShapeError,
    StructureError,
    UnsupportedOpError,
)
from jlora._kernel.axes import Array
from jlora._kernel.bank import has_bank
from jlora._kernel.nodes import is_array, is_node
from jlora._paths import Tree, leaf_paths
from jlora._transform.lora import transformed
from jlora._transform.masks import fold
from jlora._transform.replay import OnMissing
from jlora.adapters._bank import bank_size, invocations


class Mixture(NamedTuple):
    """A bank and who acts; what `jlora.mixed` functions take as their parameters.

    Attributes:
      bank: from `jlora.bank`.
      ids: `[B]` int32, the number of each example's adapter, or `[B, T]`, of that of
        each token; -1 is none.
    """

    bank: Tree
    ids: Array


def with_ids(bank: Tree, ids: Any) -> Mixture:
    """A bank with the number of the adapter of each example.

    Args:
      bank: from `jlora.bank`, of K adapters.
      ids: `[B]` integers, 0 to K-1; -1 is the base alone. `[B, T]` are those of each
        token, from `activated_ids` say. They may be traced: a new mixture is no new
        program.

    Raises:
      DtypeError: ids that are no integers.
      ShapeError: ids that are not `[B]` or `[B, T]`.
      OptionError: ids beyond the bank.
      StructureError: a tree that is no bank.
    """
    size = bank_size(bank)
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise DtypeError(
            f"ids are {ids.dtype}{list(ids.shape)}, and must be integers: the number "
            "of each example's adapter, -1 for none."
        )
    if ids.ndim not in (1, 2) or not ids.size:
        raise ShapeError(
            f"ids {tuple(ids.shape)} must be [B], one for each example, or [B, T]."
        )
    if not isinstance(ids, jax.core.Tracer):
        wrong = np.asarray(ids)[(np.asarray(ids) < -1) | (np.asarray(ids) >= size)]
        if wrong.size:
            raise OptionError(
                f"ids hold {wrong.ravel()[0]}, and the bank's adapters are 0 to "
                f"{size - 1}; -1 is none."
            )
    return Mixture(bank, jnp.asarray(ids, jnp.int32))


def mixed(
    fn: Callable[..., Any],
    in_axes: Any = 0,
    *,
    token_axes: Any = 1,
    on_missing: OnMissing = "error",
    stop_frozen: bool = True,
) -> Callable[..., Any]:
    """Make a function use another adapter for each example of its batch.

    The result for an example is what `jlora.lora(fn)` gives for it alone, as a batch of
    one, with its own adapter. It is compiled once for all mixtures, and differentiable:
    the gradient of an adapter is the sum of those of its examples.

    Args:
      fn: a function `fn(params, *args)` of batches, that treats examples apart.
      in_axes: which axis of the arrays in `args` is that of the examples, as in
        `jax.vmap`: a number or None for all, or a tuple with one for each argument, or
        trees of them. None is an argument that all examples share, as parameters do,
        keyword arguments and what is no array.
      token_axes: the same of the tokens, where `ids` say for each token who acts; the
        tokens are followed from there to the products.
      on_missing: as in `jlora.lora`.
      stop_frozen: as in `jlora.lora`.

    Returns:
      A function of a `Mixture` in the place of the parameters, and of the same other
      arguments. Its results have the axis of the examples first; a result without axes,
      the loss of a batch of one say, becomes `[B]`.

    Raises:
      ShapeError: an array without the axis of the examples, or not B long there; or
        ids `[B]` for adapters that act from their invocation tokens on.
      StructureError: parameters that are no mixture, when called.

    >>> bank = jlora.bank([jlora.lorafy({"w": jnp.ones((3, 2))}, 1, ["w"])] * 2)
    >>> f = jlora.mixed(lambda p, x: x @ p["w"])
    >>> f(jlora.with_ids(bank, [1, -1]), jnp.ones((2, 3)))
    Array([[3., 3.],
           [3., 3.]], dtype=float32)
    """

    @functools.wraps(fn)
    def run(mixture: Mixture, *args: Any, **kwargs: Any) -> Any:
        bank, ids = checked(mixture)
        leaves, structure = jax.tree.flatten(args)
        axes = _axes_of(in_axes, args, ids.shape[0])
        tokens: list[int | None] = []
        if ids.ndim == 1:
            check_everywhere(bank)
        else:
            check_by_token(bank)
            tokens = _axes_of(token_axes, args, ids.shape[1], "tokens")
        lorafied = transformed(fn, on_missing, stop_frozen, tokens)
        mapped = {n: axis for n, axis in enumerate(axes) if axis is not None}

        def one(number: Array, which: Array, *own: Array) -> Any:
            full = list(leaves)
            for n, x in zip(mapped, own, strict=True):
                full[n] = x
            params = choose(bank, which, number)
            given = jax.tree.unflatten(structure, full)
            return without_nodes(lorafied(params, *given, **kwargs))

        size, every = ids.shape[0], [0, 0, *mapped.values()]
        parts = [by_example(leaves[n], size, axis) for n, axis in mapped.items()]
        numbers = _compat.sharded_like(jnp.arange(size), ids)
        out = jax.vmap(one, in_axes=every)(numbers, ids, *parts)
        return jax.tree.map(together, out)

    return run


def choose(bank: Tree, which: Array, number: Array) -> Tree:
    """The tree of one example, which says who acts.

    Args:
      bank: from `bank`.
      which: the number of the adapter, or of that of each token.
      number: the example's, for dropout.
    """

    def one(x: Any) -> Any:
        if not has_bank(x):
            return x
        x = x.map(x.base, lambda t: dataclasses.replace(t, which=which))
        return fold(x, number)

    return jax.tree.map(one, bank, is_leaf=is_node)


def together(x: Array) -> Array:
    """`[B, n, ...]` as `[B * n, ...]`."""
    return x if x.ndim < 2 else x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def without_nodes(out: Any) -> Any:
    """What a function returns, if none of it is a kernel with the examples' adapters.

    Raises:
      UnsupportedOpError: some is.
    """
    for x in jax.tree.leaves(out, is_leaf=is_node):
        if is_node(x):
            raise UnsupportedOpError(
                f"the {x.kind} {x.path!r} {x.shape} is returned from a mixed batch, "
                "where each example has another.\nReturn results alone; jlora.pick "
                "gives the parameters of one adapter."
            )
    return out


def by_example(tree: Any, size: int, axis: int = 0) -> Any:
    """The arrays' rows by example: `[..., B * n, ...]` as `[..., B, n, ...]`.

    Raises:
      ShapeError: an array of which each example would not get as many rows.
    """

    def one(x: Any) -> Array:
        x = jnp.asarray(x)
        shape = x.shape
        if not shape or shape[axis] % size:
            raise ShapeError(
                f"{x.dtype}{list(shape)} has not as many rows for each of {size} "
                "examples.\nids name one adapter for each example (prompt)."
            )
        return x.reshape(*shape[:axis], size, shape[axis] // size, *shape[axis + 1 :])

    return jax.tree.map(one, tree)


def checked(mixture: Any) -> tuple[Tree, Array]:
    """Bank and numbers of a mixture.

    Raises:
      StructureError: it is none.
    """
    if not isinstance(mixture, Mixture):
        raise StructureError(
            f"a function of jlora.mixed takes jlora.with_ids(bank, ids) first, not a "
            f"{type(mixture).__name__}.\nWithout a bank it is jlora.lora(fn)."
        )
    return mixture


def check_everywhere(bank: Tree) -> None:
    """Refuse adapters that must not act on all tokens of an example.

    Raises:
      ShapeError: some act from their invocation on.
    """
    if any(invocations(bank)):
        raise ShapeError(
            "some of the bank's adapters act from their invocation tokens on (aLoRA), "
            "and ids [B] would have them act everywhere.\nPass "
            "jlora.activated_ids(bank, ids, input_ids), which are [B, T]."
        )


def check_by_token(bank: Tree) -> None:
    """Refuse adapters that cannot act on some tokens only.

    Raises:
      StructureError: DoRA, or biases of adapters.
    """
    for x in jax.tree.leaves(bank, is_leaf=is_node):
        terms = x.adapters.values() if has_bank(x) else ()
        if any(t.magnitude is not None or t.bias is not None for t in terms):
            raise StructureError(
                f"{x.path!r} {x.shape} has DoRA or adapters' biases, which act on a "
                "whole example.\nGive ids [B], one for each."
            )


def _axes_of(
    in_axes: Any, args: tuple[Any, ...], size: int, of: str = "examples"
) -> list[int | None]:
    """For each leaf of the arguments the axis of the examples or tokens, or None."""
    is_none = lambda x: x is None  # noqa: E731
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    try:
        spread = jax.tree.broadcast(in_axes, args, is_leaf=is_none)
    except ValueError as error:
        raise OptionError(
            f"in_axes={in_axes!r} does not fit the arguments after the parameters: a "
            f"number or None for all, or a tuple of {len(args)}, one for each."
        ) from error
    axes = jax.tree.leaves(spread, is_leaf=is_none)
    leaves, paths = jax.tree.leaves(args), leaf_paths(args)
    found = []
    for axis, x, path in zip(axes, leaves, paths, strict=True):
        is_mapped = axis is not None and is_array(x)
        found.append(_axis_of(axis, x, path, size, of) if is_mapped else None)
    return found


def _axis_of(axis: int, x: Any, path: str, size: int, of: str) -> int:
    ndim = len(x.shape)
    if not -ndim <= axis < ndim or x.shape[axis] != size:
        raise ShapeError(
            f"argument {path} {x.dtype}{list(x.shape)} has not {size} {of} on "
            f"axis {axis}, as ids have.\nSay where they are, or that there are none: "
            f"jlora.mixed(fn, {'in_axes' if of == 'examples' else 'token_axes'}="
            f"({int(of != 'examples')}, None, ...)), one for each argument after the "
            "parameters."
        )
    return axis % ndim
