"""Which axis of each value of a program is that of the tokens.

An adapter that acts on some tokens only must know where they are. The caller says which
axis of each input it is; from there it is followed through the program, equation by
equation. An entry of a sum or of any other operation entry by entry is of the token of
its operands. Where an axis is shuffled, reduced or mixed up with others it is lost, and
a product with such an adapter is then an error: nothing is guessed.

A mark is an axis and the number of the token that stands first on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._transform._rules.layout import reshape_groups

Marks = frozenset[tuple[int, int]]
NONE: Marks = frozenset()


class Tokens:
    """The marks of a program's values, those of its inner programs by equation."""

    def __init__(self, jaxpr: Jaxpr, inputs: Sequence[Marks]) -> None:
        bare, _ = _compat.open_jaxpr(jaxpr)
        self._marks: dict[Any, Marks] = dict(zip(bare.invars, inputs, strict=True))
        self._inner: dict[tuple[int, int], tuple[Marks, ...]] = {}
        for eqn in bare.eqns:
            if any(map(self.of, eqn.invars)):
                self._marks.update(zip(eqn.outvars, self._after(eqn), strict=True))
        self.results = [self.of(v) for v in bare.outvars]

    def of(self, atom: Any) -> Marks:
        """The marks of a variable or a literal."""
        known = not isinstance(atom, _compat.Literal)
        return self._marks.get(atom, NONE) if known else NONE

    def inside(self, eqn: Eqn, body: Jaxpr) -> tuple[Marks, ...] | None:
        """The marks of an inner program's operands."""
        return self._inner.get((id(eqn), id(body)))

    def _after(self, eqn: Eqn) -> list[Marks]:
        name, given = eqn.primitive.name, [self.of(v) for v in eqn.invars]
        if name in _compat.JIT:
            return self._run(eqn, _compat.jit_parts(eqn).body, given)
        if name in _compat.REMAT:
            return self._run(eqn, _compat.remat_parts(eqn).body, given)
        if name == "scan":
            return self._scan(eqn, given)
        if name == "while":
            return self._while(eqn, given)
        if name == "cond":
            ran = [self._run(eqn, b, given[1:]) for b in _compat.cond_branches(eqn)]
            return [frozenset.intersection(*marks) for marks in zip(*ran, strict=True)]
        if name in (*_compat.CUSTOM_RULE, "closed_call", "core_call", "call"):
            return self._run(eqn, _compat.call_body(eqn), given)
        if name == "optimization_barrier":
            return given
        found = _after(eqn, given)
        sizes = [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        return [frozenset(m for m in found if m[0] < len(s)) for s in sizes]

    def _run(self, eqn: Eqn, body: Jaxpr, given: Sequence[Marks]) -> list[Marks]:
        self._inner[id(eqn), id(body)] = tuple(given)
        return Tokens(body, given).results

    def _loop(
        self, eqn: Eqn, body: Jaxpr, carry: list[Marks],
        operands: Callable[[list[Marks]], list[Marks]],
    ) -> list[Marks]:  # fmt: skip
        """The results of a body whose carry has, step by step, the same marks."""
        while True:
            out = self._run(eqn, body, operands(carry))
            pairs = list(zip(carry, out, strict=False))
            if all(x <= y for x, y in pairs):
                return [x for x, _ in pairs] + out[len(carry) :]
            carry = [x & y for x, y in pairs]

    def _scan(self, eqn: Eqn, given: list[Marks]) -> list[Marks]:
        scan = _compat.scan_parts(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        slices = [frozenset((d - 1, n) for d, n in m if d) for m in given[last:]]
        out = self._loop(
            eqn, scan.body, given[first:last],
            lambda carry: [*given[:first], *carry, *slices],
        )  # fmt: skip
        stacked = [frozenset((d + 1, n) for d, n in m) for m in out[scan.num_carry :]]
        return [*out[: scan.num_carry], *stacked]

    def _while(self, eqn: Eqn, given: list[Marks]) -> list[Marks]:
        loop = _compat.while_parts(eqn)
        first = loop.num_cond_consts
        last = first + loop.num_body_consts
        operands = lambda carry: [*given[first:last], *carry]  # noqa: E731
        out = self._loop(eqn, loop.body, given[last:], operands)
        self._inner[id(eqn), id(loop.cond)] = (*given[:first], *out)
        return out


def _after(eqn: Eqn, given: Sequence[Marks]) -> Marks:
    """The marks of the results of an equation without programs inside."""
    name, p, first = eqn.primitive.name, eqn.params, given[0]
    if name in _ENTRYWISE:
        return _agreed(m for marks in given for m in marks)
    if name == "transpose":
        place = {old: new for new, old in enumerate(p["permutation"])}
        return frozenset((place[d], n) for d, n in first)
    if name == "broadcast_in_dim":
        return frozenset((p["broadcast_dimensions"][d], n) for d, n in first)
    if name in ("squeeze", *_REDUCTIONS):
        axes = p["dimensions"] if name == "squeeze" else p["axes"]
        return _without(first, [d % len(eqn.invars[0].aval.shape) for d in axes])
    if name == "reshape":
        return _reshaped(eqn, first)
    if name == "slice":
        steps = p["strides"] or (1,) * len(p["start_indices"])
        return frozenset(
            (d, n + p["start_indices"][d]) for d, n in first if steps[d] == 1
        )
    if name in ("pad", "concatenate", "split", "dynamic_slice", *_ALONG):
        return frozenset(m for m in _agreed(m for marks in given for m in marks)
                         if _is_whole(eqn, m[0]))  # fmt: skip
    if name == "dot_general":
        return _product(eqn, given)
    if name == "gather":
        return _looked_up(eqn, given[1])
    return NONE


def _agreed(marks: Iterable[tuple[int, int]]) -> Marks:
    """The marks of operands that meet entry by entry; shifted tokens are none."""
    found = frozenset(marks)
    axes = [d for d, _ in found]
    return frozenset(m for m in found if axes.count(m[0]) == 1)


def _without(marks: Marks, gone: Sequence[int]) -> Marks:
    return frozenset(
        (d - sum(g < d for g in gone), n) for d, n in marks if d not in gone
    )


def _reshaped(eqn: Eqn, marks: Marks) -> Marks:
    """An axis stays one beside axes of size one, and is lost among others."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None or 0 in old:
        return NONE
    found = set()
    for left, right in reshape_groups(old, new):
        wide = [d for d in left if old[d] != 1], [d for d in right if new[d] != 1]
        for d, n in marks:
            if wide[0] == [d] and len(wide[1]) == 1:
                found.add((wide[1][0], n))
            elif d in left and old[d] == 1 and len(left) == len(right) == 1:
                found.add((right[0], n))
    return frozenset(found)


def _is_whole(eqn: Eqn, axis: int) -> bool:
    """Whether all of an axis is there, in its order."""
    name, p = eqn.primitive.name, eqn.params
    if name == "pad":
        return not any(p["padding_config"][axis])
    if name in ("concatenate", "sort"):
        return bool(axis != p["dimension"])
    if name == "rev":
        return axis not in p["dimensions"]
    if name == "dynamic_slice":
        return bool(p["slice_sizes"][axis] == eqn.invars[0].aval.shape[axis])
    return bool(axis != p["axis"])


def _product(eqn: Eqn, given: Sequence[Marks]) -> Marks:
    """Free axes stay what they are, on either side; batch axes come first."""
    contracted, batch = eqn.params["dimension_numbers"]
    found, start = set(), len(batch[0])
    for marks, inner, outer, v in zip(
        given, contracted, batch, eqn.invars, strict=True
    ):
        free = [d for d in range(len(v.aval.shape)) if d not in (*inner, *outer)]
        for d, n in marks:
            if d in outer:
                found.add((list(outer).index(d), n))
            elif d in free:
                found.add((start + free.index(d), n))
        start += len(free)
    return _agreed(found)


def _looked_up(eqn: Eqn, indices: Marks) -> Marks:
    """Of a table the rows of the tokens; tokens that are looked up are shuffled."""
    offsets = eqn.params["dimension_numbers"].offset_dims
    axes = [d for d in range(len(eqn.outvars[0].aval.shape)) if d not in offsets]
    return frozenset((axes[d], n) for d, n in indices if d < len(axes))


_REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "argmax", "argmin",
)  # fmt: skip
_ALONG = ("sort", "rev")
_ENTRYWISE = frozenset(
    [
        "add", "sub", "mul", "div", "rem", "neg", "max", "min", "abs", "sign", "square",
        "integer_pow", "pow", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log",
        "log1p", "tanh", "logistic", "erf", "erfc", "erf_inv", "sin", "cos", "tan",
        "select_n", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not",
        "xor", "is_finite", "floor", "ceil", "round", "stop_gradient", "copy", "copy_p",
        "name", "convert_element_type", "reduce_precision", "add_any", "cumsum",
        "cummax", "cumlogsumexp", "cumprod", "sharding_constraint", *_compat.PVARY,
    ]
)  # fmt: skip
