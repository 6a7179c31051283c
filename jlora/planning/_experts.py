"""Products of a mixture's experts, `jax.lax.ragged_dot` and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jlora.planning._flat import Operation
from jlora.planning._spread import Label, Spread
from jlora.planning._values import Value


def ragged_dot(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Rows `[m, k]` by kernels `[E, k, n]`, or the kernels' gradient of two rows.

    Each row meets one kernel, and that is what is counted. But what is ragged is
    written out once for each expert, zeros where a row is another's, and multiplied as
    one dense product: so JAX and XLA have it wherever no kernel is at hand for it.
    """
    x, y, sizes = values
    numbers = op.eqn.params["ragged_dot_dimension_numbers"]
    left, right, out, inner = _labels(numbers, len(x.shape), len(y.shape))
    (x, y), cut = walk.agree([x, y], [left, right])
    spec = tuple(cut.get(label, ()) for label in out)
    written = [x] if numbers.rhs_group_dimensions else [x, y]
    experts = sizes.shape[-1] // walk.devices(cut.get("expert", ()))
    (made,) = walk.make(
        op, [x, y, sizes], [spec], inner=experts * sum(v.bytes for v in written)
    )
    size = {**dict(zip(right, y.shape, strict=True)),
            **dict(zip(left, x.shape, strict=True))}  # fmt: skip
    each = [n for n in size if n != "expert"]
    ways = walk.devices([a for n in cut for a in cut[n]])
    walk.count(op, 2 * math.prod(size[n] for n in each) / ways)
    return [walk.summed(made, [a for n in inner for a in cut.get(n, ())])]


def _labels(
    numbers: Any, ndim: int, other: int
) -> tuple[list[Label], list[Label], list[Label], list[Label]]:
    """Names of both operands' dimensions, of the result's, and of what is summed."""
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    left: list[Label] = [("x", d) for d in range(ndim)]
    right: list[Label] = ["expert" if d in groups else ("y", d) for d in range(other)]
    for one, two in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[two] = left[one]
    inner = [left[d] for d in lc] + ["expert" for _ in groups]
    free = [n for d, n in enumerate(left) if d not in (*lc, *lb)]
    free += [n for d, n in enumerate(right) if d not in (*rc, *rb, *groups)]
    first: list[Label] = [] if groups else ["expert"]
    return left, right, [*first, *(left[d] for d in lb), *free], inner
