"""How each operation's result is cut, and what it costs: one rule a kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jlora._transform._rules.layout import reshape_groups
from jlora.planning import _experts, _loops, _manual
from jlora.planning._flat import Operation
from jlora.planning._spread import Label, Spread
from jlora.planning._values import Spec, Value, spec_of

Rule = Callable[[Spread, Operation, list[Value]], Sequence[Value]]


def rule_of(name: str) -> Rule:
    """Return a primitive's rule."""
    return _RULES.get(name, _elementwise)


def _unknown(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Operands and results that are whole on every device."""
    if any(any(v.spec) for v in values):
        walk.costs.unknown.add(op.name)
    whole = [walk.gathered(v, ((),) * len(v.shape)) for v in values]
    return walk.make(op, whole, [((),) * len(v.aval.shape) for v in op.results])


def _cut(labels: Sequence[Label], cut: dict[Label, tuple[str, ...]]) -> Spec:
    return tuple(cut.get(label, ()) for label in labels)


# -- products --------------------------------------------------------------------------


def _dot(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    (lc, rc), (lb, rb) = op.eqn.params["dimension_numbers"]
    x, y = values
    left: list[Label] = [("x", d) for d in range(len(x.shape))]
    right: list[Label] = [("y", d) for d in range(len(y.shape))]
    for one, two in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[two] = left[one]
    inner = [left[d] for d in lc]
    batch = [left[d] for d in lb]
    out = [*batch, *[n for d, n in enumerate(left) if d not in (*lc, *lb)]]
    out += [n for d, n in enumerate(right) if d not in (*rc, *rb)]
    return _product(walk, op, values, (left, right), out, inner)


def _product(
    walk: Spread,
    op: Operation,
    values: list[Value],
    labels: tuple[list[Label], list[Label]],
    out: list[Label],
    inner: list[Label],
) -> Sequence[Value]:
    met, cut = walk.agree(values, labels)
    (made,) = walk.make(op, met, [_cut(out, cut)])
    size = {n: s for v, ns in zip(values, labels, strict=True)
            for n, s in zip(ns, v.shape, strict=True)}  # fmt: skip
    axes = [a for n in inner for a in cut[n]]
    terms = math.prod(size[n] for n in inner)
    ways = walk.devices([a for n in {*out, *inner} for a in cut.get(n, ())])
    walk.count(op, 2 * terms * math.prod(made.shape) / ways)
    return [walk.summed(made, axes)]


def _conv(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    numbers = op.eqn.params["dimension_numbers"]
    x, kernel = values
    batch, _, *_ = numbers.lhs_spec
    labels: list[list[Label]] = [
        ["batch" if d == batch else ("x", d) for d in range(len(x.shape))],
        [("k", d) for d in range(len(kernel.shape))],
    ]
    met, cut = walk.agree(values, labels)
    whole = [walk.gathered(v, tuple(a if n == "batch" else () for n, a in
             zip(ns, v.spec, strict=True)))
             for v, ns in zip(met, labels, strict=True)]  # fmt: skip
    out = op.results[0].aval.shape
    spec: list[tuple[str, ...]] = [()] * len(out)
    spec[numbers.out_spec[0]] = cut["batch"]
    (made,) = walk.make(op, whole, [tuple(spec)])
    taps = math.prod(kernel.shape) // kernel.shape[numbers.rhs_spec[0]]
    walk.count(op, 2 * taps * math.prod(out) / walk.devices(cut["batch"]))
    return [made]


# -- operations by element -------------------------------------------------------------


def _elementwise(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Operands of the result's shape up to ones, or numbers; else all is whole."""
    shape = op.results[0].aval.shape if op.results else ()
    arrays = [v for v in values if v.shape]
    alike = all(v.aval.shape == shape for v in op.results)
    alike &= all(_broadcasts(v.shape, shape) for v in arrays)
    if not alike or not arrays:
        return _unknown(walk, op, values)
    dims = range(len(shape))
    labels = [[d if v.shape[d] == shape[d] else (n, d) for d in dims]
              for n, v in enumerate(arrays)]  # fmt: skip
    met, cut = walk.agree(arrays, labels)
    scalars = [v for v in values if not v.shape]
    return walk.make(op, [*met, *scalars], [_cut(dims, cut)] * len(op.results))


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    same = len(shape) == len(to)
    return same and all(a in (1, b) for a, b in zip(shape, to, strict=True))


def _same(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Each result as its operand."""
    made = walk.make(op, values, [v.spec for v in values])
    for one, v in zip(made, values, strict=True):
        one.is_data = v.is_data
    return made


def _constrained(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """As the program says it is cut; dimensions it leaves open stay as they are."""
    (x,) = values
    # Read on one device, a program for a mesh has axes that are not there.
    said = tuple(
        tuple(a for a in axes if a in walk.sizes)
        for axes in spec_of(op.eqn.params["sharding"].spec, len(x.shape))
    )
    free = op.eqn.params["unconstrained_dims"]
    new = {a for d, axes in enumerate(said) for a in axes if d not in free}
    spec = tuple(
        tuple(a for a in axes if a not in new) if d in free else said[d]
        for d, axes in enumerate(x.spec)
    )
    keep = tuple(
        tuple(a for a in old if a in now) for old, now in zip(x.spec, spec, strict=True)
    )
    return walk.make(op, [walk.gathered(x, keep)], [spec])


# -- layout ----------------------------------------------------------------------------


def _transpose(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    (x,) = values
    order = op.eqn.params["permutation"]
    return walk.make(op, [x], [tuple(x.spec[d] for d in order)])


def _squeeze(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    (x,) = values
    gone = {d % len(x.shape) for d in op.eqn.params["dimensions"]}
    spec = tuple(axes for d, axes in enumerate(x.spec) if d not in gone)
    return walk.make(op, [x], [spec])


def _broadcast(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    x = values[0]
    shape = op.results[0].aval.shape
    spec: list[tuple[str, ...]] = [()] * len(shape)
    for d, to in enumerate(op.eqn.params["broadcast_dimensions"]):
        spec[to] = x.spec[d] if x.shape[d] == shape[to] else ()
    return walk.make(op, values, [tuple(spec)])


def _reshape(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Of dimensions that become one, or one that becomes several, the first is cut."""
    x = values[0]
    new = op.results[0].aval.shape
    keep: list[tuple[str, ...]] = [()] * len(x.shape)
    spec: list[tuple[str, ...]] = [()] * len(new)
    for left, right in reshape_groups(x.shape, new):
        olds = [d for d in left if x.shape[d] > 1]
        news = [d for d in right if new[d] > 1]
        if not olds or not news:
            continue
        axes = x.spec[olds[0]]
        if new[news[0]] % walk.devices(axes) == 0:
            keep[olds[0]] = spec[news[0]] = axes
    return walk.make(op, [walk.gathered(x, tuple(keep)), *values[1:]], [tuple(spec)])


def _along(keys: Sequence[str]) -> Rule:
    """A rule for operations that act along some dimensions, which must be whole."""

    def rule(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
        dims: set[int] = set()
        for key in keys:
            found = op.eqn.params[key]
            dims |= {*found} if isinstance(found, Sequence) else {found}
        arrays = [v for v in values if v.shape]
        met, cut = walk.agree(arrays, [list(range(len(v.shape))) for v in arrays])
        spec = tuple(() if d in dims else cut.get(d, ())
                     for d in range(len(arrays[0].shape)))  # fmt: skip
        whole = [walk.gathered(v, spec) for v in met]
        specs = [spec[: len(v.aval.shape)] for v in op.results]
        return walk.make(op, whole, specs)

    return rule


def _slice(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Dimensions that are taken as a whole stay cut."""
    x = values[0]
    shape = op.results[0].aval.shape
    spec = tuple(axes if shape[d] == x.shape[d] else ()
                 for d, axes in enumerate(x.spec))  # fmt: skip
    met = [walk.gathered(x, spec), *values[1:]]
    return walk.make(op, met, [spec] * len(op.results))


def _pad(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    x = values[0]
    spec = tuple(axes if not any(op.eqn.params["padding_config"][d]) else ()
                 for d, axes in enumerate(x.spec))  # fmt: skip
    return walk.make(op, [walk.gathered(x, spec), *values[1:]], [spec])


def _update(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    x, update, *rest = values
    dims = list(range(len(x.shape)))
    (x, update), cut = walk.agree([x, update], [dims, dims])
    spec = tuple(cut[d] if x.shape[d] == update.shape[d] else x.spec[d] for d in dims)
    update = walk.gathered(
        update, tuple(() if x.shape[d] != update.shape[d] else spec[d] for d in dims)
    )
    return walk.make(op, [x, update, *rest], [spec])


def _split(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Parts of a cut dimension are cut as it was: devices exchange what they have."""
    (x,) = values
    axis = op.eqn.params["axis"]
    ways = walk.devices(x.spec[axis])
    if any(v.aval.shape[axis] % ways for v in op.results):
        x = walk.gathered(x, tuple(() if d == axis else axes
                                   for d, axes in enumerate(x.spec)))  # fmt: skip
    made = walk.make(op, [x], [x.spec] * len(op.results))
    for v in made:
        walk.exchanged(v, x.spec[axis])
    return made


def _concatenate(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """The other way round."""
    axis = op.eqn.params["dimension"]
    dims = list(range(len(values[0].shape)))
    met, cut = walk.agree(values, [dims] * len(values))
    if any(v.shape[axis] % walk.devices(cut[axis]) for v in values):
        cut[axis] = ()
    spec = _cut(dims, cut)
    whole = [walk.gathered(v, spec) for v in met]
    for v in whole:
        walk.exchanged(v, v.spec[axis])
    return walk.make(op, whole, [spec])


def _iota(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    return walk.make(op, values, [((),) * len(v.aval.shape) for v in op.results])


# -- sums ------------------------------------------------------------------------------


def _reduce(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    arrays = [v for v in values if v.shape]
    dims = list(range(len(arrays[0].shape)))
    met, cut = walk.agree(arrays, [dims] * len(arrays))
    gone = op.eqn.params.get("axes", op.eqn.params.get("dimensions", ()))
    spec = tuple(cut[d] for d in dims if d not in gone)
    axes = [a for d in gone for a in cut[d]]
    made = walk.make(op, met, [spec] * len(op.results))
    return [walk.summed(v, axes) for v in made]


# -- lookups ---------------------------------------------------------------------------


def _lookup(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """Rows of a table: a device that has none of the row adds zeros, and all sum."""
    table, where = values
    numbers = op.eqn.params["dimension_numbers"]
    sizes = op.eqn.params["slice_sizes"]
    out = op.results[0].aval.shape
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    inner = [d for d in range(len(table.shape)) if d not in gone]
    labels: list[Label] = [("t", d) for d in range(len(table.shape))]
    indices: list[Label] = [("i", d) for d in range(len(where.shape))]
    for d, e in zip(numbers.operand_batching_dims,
                    numbers.start_indices_batching_dims, strict=True):  # fmt: skip
        labels[d] = indices[e]
    whole = tuple(axes if labels[d][0] == "i" or d in gone or sizes[d] == table.shape[d]
                  else () for d, axes in enumerate(table.spec))  # fmt: skip
    table = walk.gathered(table, whole)
    (table, where), cut = walk.agree([table, where], [labels, indices])
    offsets = iter(inner)
    rows = iter(indices[:-1])
    names = [labels[next(offsets)] if d in numbers.offset_dims else next(rows)
             for d in range(len(out))]  # fmt: skip
    looked = [d for d in gone if labels[d][0] == "t"]
    spec = tuple(axes if out[d] % walk.devices(axes) == 0 else ()
                 for d, axes in enumerate(_cut(names, cut)))  # fmt: skip
    (made,) = walk.make(op, [table, where], [spec])
    return [walk.summed(made, [a for d in looked for a in cut[labels[d]]])]


def _scatter(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    """A sum into rows of a table, of updates that devices have parts of."""
    table, _, updates = values
    numbers = op.eqn.params["dimension_numbers"]
    spec: list[tuple[str, ...]] = [()] * len(table.shape)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(table.shape)) if d not in gone]
    window = {*numbers.update_window_dims}
    for d, e in zip(kept, sorted(window), strict=True):
        if table.shape[d] == updates.shape[e]:
            spec[d] = updates.spec[e]
    free = [a for e, axes in enumerate(updates.spec) if e not in window for a in axes]
    (made,) = walk.make(op, values, [tuple(spec)])
    return [walk.summed(made, free)]


def _top(walk: Spread, op: Operation, values: list[Value]) -> Sequence[Value]:
    (x,) = values
    spec = (*x.spec[:-1], ())
    return walk.make(op, [walk.gathered(x, spec)], [spec] * len(op.results))


_REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "reduce_xor", "argmax", "argmin",
)  # fmt: skip

_DECOMPOSITIONS = (
    "cholesky", "triangular_solve", "lu", "qr", "eigh", "eig", "svd", "schur", "fft",
    "householder_product", "tridiagonal", "tridiagonal_solve", "hessenberg",
)  # fmt: skip

_SUMS = ("psum", "psum2", "psum_invariant", "pmax", "pmin")

_RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "factor_product": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot": _experts.ragged_dot,
    "ragged_dot_general": _experts.ragged_dot,
    "optimization_barrier": _same,
    "held": _same,
    "sharding_constraint": _constrained,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "rev": _along(["dimensions"]),
    "sort": _along(["dimension"]),
    "cumsum": _along(["axis"]),
    "cummax": _along(["axis"]),
    "cumlogsumexp": _along(["axis"]),
    "cumprod": _along(["axis"]),
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _update,
    "pad": _pad,
    "split": _split,
    "iota": _iota,
    "gather": _lookup,
    "top_k": _top,
    **dict.fromkeys(_DECOMPOSITIONS, _unknown),
    "scan": _loops.scan,
    "while": _loops.while_loop,
    "cond": _loops.cond,
    "shard_map": _manual.shard_map,
    **dict.fromkeys(_SUMS, _manual.sum_over_axes),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(["scatter", "scatter-add", "scatter-max", "scatter_add"], _scatter),
}
