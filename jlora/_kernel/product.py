"""A product with a factor, whose gradients leave the large operand where it lies.

JAX writes the gradient of `x·B` for B as `(dyᵀ·x)ᵀ`, and XLA wants the axes that a
first operand is contracted over last. Tokens lie on two axes, batch and position, so dy
would be transposed: a copy of the layer's output, into which XLA fuses whatever made
dy, read against the grain (13 ms instead of half a one behind a gated GELU of width
1,024 and 512 tokens). Here the narrow operand comes first: `xᵀ·dy`.

A primitive, for that is the one place where JAX lets a transposition be chosen and
forward mode, reverse mode over it and `vmap` be kept (jax.custom_vjp has no forward
mode, linear_call no batching). Without derivatives it is `lax.dot_general`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jlora import _compat

Array = Any
Axes = Sequence[int]
# As `lax.dot_general` has them: contracted axes of both, batch axes of both.
Numbers = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]

factor_product_p = _compat.Primitive("factor_product")
held_p = _compat.Primitive("held")


def factor_product(
    x: Array, y: Array, numbers: Numbers, *, precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:  # fmt: skip
    """`lax.dot_general`, with gradients in the order that moves the fewest bytes."""
    if precision is None:  # what holds here, for a program may be lowered elsewhere
        precision = _compat.default_precision()
    (xc, yc), (xb, yb) = numbers
    exact = ((tuple(xc), tuple(yc)), (tuple(xb), tuple(yb)))
    x, y = _compat.alike_varying(x, y)
    return _bind(x, y, exact, precision, preferred_element_type)


@functools.partial(jax.jit, static_argnums=(2, 3, 4), inline=_compat.INLINE)
def _bind(x: Array, y: Array, numbers: Any, precision: Any, into: Any) -> Array:
    """The primitive; jitted for the cache that JAX keeps of derivatives."""
    params = {"precision": precision, "preferred_element_type": into}
    return factor_product_p.bind(x, y, dimension_numbers=numbers, **params)


def _dot(x: Array, y: Array, **params: Any) -> Array:
    return lax.dot_general(x, y, **params)


def _dot_on_its_own(x: Array, y: Array, **params: Any) -> Array:
    """`_dot`, kept apart from other products of its large operand.

    On a GPU XLA merges products that share an operand where one is small, x·W and x·A
    too: it joins [W | A] at every step, and cuts the result, 2·|W| or 2·|W| + 2·|x·W|
    of traffic. Apart, x·A costs |x|.

    Source: `DotMerger`, openxla/xla.
    """
    size = jax.eval_shape(functools.partial(_dot, **params), x, y).size
    if size < x.size:
        x = lax.optimization_barrier(x)
    if size < y.size:
        y = lax.optimization_barrier(y)
    return _dot(x, y, **params)


def _transpose_x(g: Array, x: Any, y: Array, **params: Any) -> Array:
    return _gradient(g, x.aval, y, params, x_first=True)


def _transpose_y(g: Array, x: Array, y: Any, **params: Any) -> Array:
    return _gradient(g, y.aval, x, params, x_first=False)


def _gradient(
    g: Array, wanted: Any, other: Array, params: dict[str, Any], x_first: bool
) -> Array:
    """The cotangent of one operand from that of the product and the other operand."""
    contracted, batch = params["dimension_numbers"]
    order = 1 if x_first else -1
    (wc, oc), (wb, ob) = contracted[::order], batch[::order]
    w_free, o_free = _free(wanted.ndim, wc, wb), _free(other.ndim, oc, ob)
    # The product's axes: batch, then the free ones of x, then those of y.
    gb = list(range(len(wb)))
    first = len(w_free) if x_first else len(o_free)
    free = list(range(len(gb), g.ndim))
    g_of_w, g_of_o = (free[:first], free[first:])[::order]
    # As the result will have them.
    wc = [wc[oc.index(axis)] for axis in sorted(oc)]
    rest = {k: params[k] for k in ("precision", "preferred_element_type")}
    if _moved(g, g_of_w, g_of_o, other, o_free, oc) <= _moved(
        other, oc, o_free, g, g_of_o, g_of_w
    ):
        out = factor_product(g, other, ((g_of_o, o_free), (gb, ob)), **rest)
        axes = [*wb, *w_free, *wc]
    else:
        out = factor_product(other, g, ((o_free, g_of_o), (ob, gb)), **rest)
        axes = [*wb, *wc, *w_free]
    if axes != sorted(axes):
        # Or XLA makes the transposed product at once, which on a CPU is the slow one.
        out = out if wb else held_p.bind(out)
        out = lax.transpose(out, [axes.index(n) for n in range(wanted.ndim)])
    return out.astype(wanted.dtype)


def _moved(
    x: Array, x_free: Axes, x_inner: Axes, y: Array, y_inner: Axes, y_free: Axes
) -> int:
    """Weights that XLA transposes for x·y: it wants inner axes of x last, of y first.

    Source: `DotDecomposer`, openxla/xla.
    """
    x_moves = [*x_free, *x_inner] != sorted((*x_free, *x_inner))
    y_moves = [*y_inner, *y_free] != sorted((*y_inner, *y_free))
    return x_moves * x.size + y_moves * y.size


def _free(ndim: int, *used: Axes) -> list[int]:
    return [axis for axis in range(ndim) if not any(axis in axes for axes in used)]


def _batched(
    args: Sequence[Array], dims: Sequence[int | None], **params: Any
) -> tuple[Array, int]:
    """Under `vmap`: a batch axis more where both have it, else a free one."""
    (xc, yc), (xb, yb) = params.pop("dimension_numbers")
    (x, y), (x_dim, y_dim) = args, dims
    if x_dim is not None:
        x = _to_front(x, x_dim)
        xc, xb = [d + 1 for d in xc], [d + 1 for d in xb]
    if y_dim is not None:
        y = _to_front(y, y_dim)
        yc, yb = [d + 1 for d in yc], [d + 1 for d in yb]
    if x_dim is not None and y_dim is not None:
        numbers = (xc, yc), ([0, *xb], [0, *yb])
        return factor_product(x, y, numbers, **params), 0
    # The first of its operand's free axes.
    skipped = 0 if x_dim is not None else x.ndim - len(xc) - len(xb)
    out = factor_product(x, y, ((xc, yc), (xb, yb)), **params)
    return out, len(xb) + skipped


def _to_front(x: Array, axis: int) -> Array:
    return jax.numpy.moveaxis(x, axis, 0)


_compat.define(
    factor_product_p,
    _dot,
    _compat.dot_aval,
    batching=_batched,
    lowered={"cuda": _dot_on_its_own, "rocm": _dot_on_its_own},
)
_compat.define_transposes(factor_product_p, _transpose_x, _transpose_y)

# A barrier, but not under `vmap`: XLA folds transpositions into products of two
# matrices alone, and for a batched product behind a barrier it may choose a layout that
# its CPU backend cannot write, which ends the process.
_compat.define(
    held_p,
    lax.optimization_barrier,
    lambda x: x,
    batching=lambda args, dims: (args[0], dims[0]),
)
_compat.define_transposes(held_p, lambda g, _: g)
