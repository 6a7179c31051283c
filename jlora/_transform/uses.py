"""How a program uses its leaves: each is followed to the primitives that consume it.

On the way it may be laid out anew, scaled, or handed to inner programs. The primitive
at the end tells which of its axes are inputs, outputs or stacks.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._kernel.axes import Dims
from jlora._transform._rules.experts import is_plain
from jlora._transform._rules.gather import looked_up_axes, without_whole_axes
from jlora._transform._rules.layout import reshape_groups
from jlora._transform.program import needed

Axes = tuple[frozenset[int], ...]  # for each dimension of a value, the leaf's axes


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf.

    Attributes:
      kind: `matmul`, `gather`, `conv`, `bias`, `scale`, or `other`.
      primitive: the primitive that consumes it.
      in_axes: the leaf's axes that are contracted or looked up.
      out_axes: those that go on to the result.
      batch_axes: those with a product for each index: stacks of layers, experts.
      flops: multiply-adds times two, all steps of a scan counted.
    """

    kind: str
    primitive: str
    in_axes: Dims = ()
    out_axes: Dims = ()
    batch_axes: Dims = ()
    flops: int = 0

    @property
    def is_kernel(self) -> bool:
        """Whether an adapter could serve this use."""
        contracts = self.kind in ("matmul", "gather", "conv")
        return contracts and bool(self.in_axes) and bool(self.out_axes)

    def __str__(self) -> str:
        if not self.is_kernel:
            return self.primitive if self.kind == "other" else self.kind
        axes = f"{list(self.in_axes)}->{list(self.out_axes)}"
        return f"{self.kind} {axes}" + (
            f" for each of {list(self.batch_axes)}" if self.batch_axes else ""
        )


def one_to_one(shape: Sequence[int]) -> Axes:
    """A leaf's axes in the leaf itself."""
    return tuple(frozenset({d}) for d in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """Where a leaf's axes are in some value; `stack` ones are gone, an index each."""

    path: str
    axes: Axes
    stack: frozenset[int] = frozenset()

    def flat(self, dims: Sequence[int]) -> Dims:
        """The leaf's axes in those dimensions of the value."""
        return tuple(sorted(frozenset().union(*(self.axes[d] for d in dims))))

    def drop(self, dims: set[int]) -> LeafAxes:
        """Where they are once those dimensions are gone."""
        gone = frozenset(self.flat(sorted(dims)))
        kept = tuple(a for d, a in enumerate(self.axes) if d not in dims)
        return LeafAxes(self.path, kept, self.stack | gone)


Places = tuple[LeafAxes, ...]  # a concatenation holds several leaves


class Walk:
    """Follows leaves through a program and collects their uses."""

    def __init__(self, uses: dict[str, list[Use]]) -> None:
        self.uses = uses
        self.fixed: set[Any] = set()  # variables that hang on no input

    def follow(self, jaxpr: Jaxpr, args: Sequence[Places], times: int) -> list[Places]:
        """Walk a jaxpr whose operands hold those leaves; the places of its results."""
        bare, _ = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Places] = dict(zip(bare.invars, args, strict=True))

        def read(atom: Any) -> Places:
            return () if isinstance(atom, _compat.Literal) else env.get(atom, ())

        self.fixed.update(bare.constvars)
        for eqn in needed(bare)[0]:
            if all(self._is_fixed(v) for v in eqn.invars):
                self.fixed.update(eqn.outvars)
            operands = [read(v) for v in eqn.invars]
            if any(operands):
                results = self._equation(eqn, operands, times)
                env.update(zip(eqn.outvars, results, strict=False))
        return [read(v) for v in bare.outvars]

    def _is_fixed(self, atom: Any) -> bool:
        return isinstance(atom, _compat.Literal) or atom in self.fixed

    def _equation(
        self, eqn: Eqn, operands: list[Places], times: int
    ) -> Sequence[Places]:
        inner = list(_inner_programs(eqn, operands))
        if inner:
            results = [
                self.follow(body, args, times * repeat) for body, args, repeat in inner
            ]
            if eqn.primitive.name == "cond":  # whichever branch it is
                columns = zip(*results, strict=True)
                return [tuple(dict.fromkeys(sum(c, ()))) for c in columns]
            # What a loop or a solve returns is no longer the leaf that went in.
            return () if eqn.primitive.name in _CONSUMING else results[0]
        fixed = [self._is_fixed(v) for v in eqn.invars]
        moved = _after_layout(eqn, operands, fixed)
        if moved is not None:
            return moved
        kept = _scaled_or_shifted(eqn, operands, fixed)
        for number, places in enumerate(operands):
            for place in places if number != kept else ():
                use = _use(eqn, number, place, operands)
                use = dataclasses.replace(use, flops=use.flops * times)
                self.uses[place.path].append(use)
        return () if kept is None else [operands[kept]]


def _inner_programs(
    eqn: Eqn, operands: list[Places]
) -> Iterator[tuple[Jaxpr, list[Places], int]]:
    """The programs inside an equation: each with its operands and repetitions."""
    name = eqn.primitive.name
    if name in _compat.JIT:
        jit = _compat.jit_parts(eqn)
        # A loss looks up the head's columns; that makes it no embedding.
        yield jit.body, [()] * len(operands) if jit.name == _OWN else operands, 1
    elif name in _compat.REMAT:
        yield _compat.remat_parts(eqn).body, operands, 1
    elif name == "shard_map":
        yield _compat.shard_map_parts(eqn).body, operands, 1
    elif name == "cond":
        for body in _compat.cond_branches(eqn):
            yield body, operands[1:], 1
    elif name == "while":
        w = _compat.while_parts(eqn)
        middle = w.num_cond_consts + w.num_body_consts
        carry = operands[middle:]
        yield w.cond, [*operands[: w.num_cond_consts], *carry], 1
        yield w.body, [*operands[w.num_cond_consts : middle], *carry], 1
    elif name == "scan":
        s = _compat.scan_parts(eqn)
        first_x = s.num_consts + s.num_carry
        sliced = [tuple(p.drop({0}) for p in places) for places in operands[first_x:]]
        yield s.body, [*operands[:first_x], *sliced], s.length
    elif name == "custom_linear_solve":
        parts = _compat.solve_parts(eqn)
        first = 0
        for key, number in parts.num_consts.items():
            body = parts.programs[key]
            if body is not None:
                unknowns = [()] * (len(body.in_avals) - number)
                yield body, [*operands[first : first + number], *unknowns], 1
            first += number
    elif name == "custom_vmap_call":
        yield _compat.custom_vmap_parts(eqn).body, operands, 1
    elif name == "linear_call":
        yield _compat.linear_call_parts(eqn).body, operands, 1
    elif name == "composite" or "call_jaxpr" in eqn.params:
        # Or custom_jvp_call, custom_vjp_call, closed_call.
        yield _compat.call_body(eqn), operands, 1


_OWN = "label_columns"  # of `_linear_loss`
_CONSUMING = ("scan", "while", "custom_linear_solve")

_UNMOVED = frozenset(
    [
        "convert_element_type", "reduce_precision", "copy", "copy_p", "name", "neg",
        "stop_gradient", "sharding_constraint", "slice", "dynamic_slice", "rev",
        "all_gather", "pad", "tile", "cumsum", "scatter", "scatter-add",
        *_compat.PVARY, *_compat.RESHARD,
    ]
)  # fmt: skip


def _after_layout(
    eqn: Eqn, operands: list[Places], fixed: list[bool]
) -> list[Places] | None:
    """The places after a layout change, or None if the equation consumes the leaf."""
    name, p = eqn.primitive.name, eqn.params
    first = operands[0]
    if name in ("optimization_barrier", "device_put"):
        return operands
    if name in ("slice", "dynamic_slice", "split") and not any(operands[1:]):
        return [first] * len(eqn.outvars)
    if name in ("scatter", "scatter-add") and operands[2]:
        inserted = p["dimension_numbers"].inserted_window_dims
        axes = len(eqn.invars[1].aval.shape)
        return [(*first, *_set_in(operands[2], inserted))] if axes == 1 else None
    if name in _UNMOVED:
        return [first]
    if name in ("mul", "div") and _by_scalar(eqn):
        return [first or operands[1]]
    if name == "dynamic_update_slice":
        return [(*first, *operands[1])]
    if name in ("add", "sub", "add_any", "select_n") and _are_kernels(
        eqn, operands, fixed
    ):
        return [tuple(place for places in operands for place in places)]
    if name == "concatenate":
        return [tuple(place for places in operands for place in places)]
    change = _CHANGES.get(name)
    if change is None or (any(operands[1:]) and name != "stack"):
        return None
    shape = [v.aval.shape for v in (eqn.invars[0], eqn.outvars[0])]
    places = [place for places in operands for place in places]
    return [tuple(change(place, p, *shape) for place in places)]


def _by_scalar(eqn: Eqn) -> bool:
    shapes = [np.shape(v.val) if isinstance(v, _compat.Literal) else v.aval.shape
              for v in eqn.invars]  # fmt: skip
    return () in shapes and shapes[0] != shapes[1]


def _are_kernels(eqn: Eqn, operands: list[Places], fixed: list[bool]) -> bool:
    """Whether a sum or a choice is of whole leaves, or of one and a constant.

    A position or a mask's token that meets data is used up there.
    """
    shape = eqn.outvars[0].aval.shape
    first = 1 if eqn.primitive.name == "select_n" else 0
    cases = list(zip(eqn.invars, operands, strict=True))[first:]
    leaves = [bool(ps) and all(_is_spanned(p, shape) for p in ps) for _, ps in cases]
    numbers = fixed[first:]
    if first:  # zeros, say, beside a leaf
        numbers = [not ps for _, ps in cases]
    return any(leaves) and all(map(operator.or_, leaves, numbers))


def _scaled_or_shifted(
    eqn: Eqn, operands: list[Places], fixed: list[bool]
) -> int | None:
    """Which operand is a whole leaf that a vector along some axes is put to."""
    if eqn.primitive.name not in ("mul", "div", "add", "sub"):
        return None
    shape = eqn.outvars[0].aval.shape
    for number, places in enumerate(operands):
        other = eqn.invars[1 - number].aval.shape
        spanned = bool(places) and all(_is_spanned(p, shape) for p in places)
        if spanned and len(shape) > 1 and (other != shape or fixed[1 - number]):
            return number
    return None


def _set_in(places: Places, inserted: Sequence[int]) -> Places:
    """Places in an update that is set into an array of more dimensions."""
    out = []
    for place in places:
        axes = list(place.axes)
        for d in sorted(inserted):
            axes.insert(d, frozenset())
        out.append(dataclasses.replace(place, axes=tuple(axes)))
    return tuple(out)


def _is_spanned(place: LeafAxes, shape: Sequence[int]) -> bool:
    """Whether the value varies along all its axes with the leaf's."""
    same = len(place.axes) == len(shape)
    return same and all(
        axes or size == 1 for axes, size in zip(place.axes, shape, strict=True)
    )


def _transpose(place: LeafAxes, p: Any, old: Any, new: Any) -> LeafAxes:
    axes = tuple(place.axes[d] for d in p["permutation"])
    return dataclasses.replace(place, axes=axes)


def _squeeze(place: LeafAxes, p: Any, old: Any, new: Any) -> LeafAxes:
    return place.drop({d % len(old) for d in p["dimensions"]})


def _broadcast(place: LeafAxes, p: Any, old: Any, new: Any) -> LeafAxes:
    axes = [frozenset[int]()] * len(new)
    for d, to in enumerate(p["broadcast_dimensions"]):
        axes[to] = place.axes[d]
    return dataclasses.replace(place, axes=tuple(axes))


def _reshape(place: LeafAxes, p: Any, old: Any, new: Any) -> LeafAxes:
    axes = [frozenset[int]()] * len(new)
    for left, right in reshape_groups(old, new):
        for d in right:
            axes[d] = frozenset().union(*(place.axes[x] for x in left))
    return dataclasses.replace(place, axes=tuple(axes))


def _stack(place: LeafAxes, p: Any, old: Any, new: Any) -> LeafAxes:
    axes = list(place.axes)
    axes.insert(p["axis"] % len(new), frozenset())
    return dataclasses.replace(place, axes=tuple(axes))


_CHANGES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "stack": _stack,
}


def _use(eqn: Eqn, number: int, place: LeafAxes, operands: list[Places]) -> Use:
    """The use that an equation makes of its `number`-th operand."""
    name = eqn.primitive.name
    others = [places for i, places in enumerate(operands) if i != number]
    if name == "dot_general" and not any(others):
        return _matmul(eqn, number, place)
    if name == "ragged_dot_general" and number == 1 and is_plain(eqn.params):
        flops = 2 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[1].aval.shape[1]
        return _kernel_use(eqn, "matmul", place, (1,), (0,), flops)
    if name == "gather" and number == 0:
        return _lookup(eqn, place)
    if name == "conv_general_dilated" and number == 1:
        return _convolution(eqn, place)
    if name == "dot_general":  # of two leaves: the first one's outputs are summed over
        return _matmul(eqn, number, place, outputs_summed=number == 0)
    kind = {"add": "bias", "sub": "bias", "mul": "scale", "div": "scale"}.get(name)
    return Use(kind or "other", name)


def _kernel_use(
    eqn: Eqn, kind: str, place: LeafAxes, ins: Sequence[int], batch: Sequence[int],
    flops: int,
) -> Use:  # fmt: skip
    """A contraction over the value's dimensions `ins`."""
    outs = [d for d in range(len(place.axes)) if d not in (*ins, *batch)]
    stack = tuple(sorted({*place.flat(batch), *place.stack}))
    in_axes = tuple(d for d in place.flat(ins) if d not in stack)
    out_axes = tuple(d for d in place.flat(outs) if d not in (*stack, *in_axes))
    return Use(kind, eqn.primitive.name, in_axes, out_axes, stack, flops)


def _matmul(
    eqn: Eqn, number: int, place: LeafAxes, outputs_summed: bool = False
) -> Use:
    contracted, batch = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    flops = 2 * math.prod(out) * math.prod(lhs[d] for d in contracted[0])
    ins, stack = contracted[number], batch[number]
    if outputs_summed:
        ins = [d for d in range(len(place.axes)) if d not in (*ins, *stack)]
    return _kernel_use(eqn, "matmul", place, ins, stack, flops)


def _lookup(eqn: Eqn, place: LeafAxes) -> Use:
    shape = eqn.invars[0].aval.shape
    p, _ = without_whole_axes(eqn.params, shape)
    batch = p["dimension_numbers"].operand_batching_dims
    touched = sorted(looked_up_axes(p, shape))
    return _kernel_use(eqn, "gather", place, touched, batch, 0)


def _convolution(eqn: Eqn, place: LeafAxes) -> Use:
    _, *in_dims = eqn.params["dimension_numbers"].rhs_spec
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    flops = 2 * math.prod(out) * math.prod(kernel[d] for d in in_dims)
    return _kernel_use(eqn, "conv", place, in_dims, (), flops)
