"""Which leaves of a batch are ids, and how many there are: read from a step's program.

An id beyond its table or its classes becomes NaN, or another row, on the device, where
nobody can say which id it was. The program says into what the leaves of a batch index,
so the ids are compared on the host, before the step.

A leaf is followed from the arguments through operations that only lay it out anew. It
counts as ids where it picks rows of a parameter, or is the labels of a loss of
`jlora.train`. What is computed from it is not followed: it may be within bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import _compat
from jlora._compat import Eqn
from jlora._errors import DataError
from jlora.train._ids import LABELS, refuse_ids, values_of


class Layout(NamedTuple):
    """An array of the program whose items are items of a leaf.

    Attributes:
      leaf: which leaf of the batch.
      places: where each item stands in the flattened leaf.
      form: `"ids"`; `"negative"` or `"shifted"` while JAX counts negative ids from the
        end: `where(ids < 0, ids + size, ids)`.
    """

    leaf: int
    places: np.ndarray
    form: str = "ids"


class _Parameter:
    """An array of the program that is a parameter, in this dtype or another."""


class Use(NamedTuple):
    """A leaf of the batch as ids.

    Attributes:
      ids: which items of which leaf.
      size: how many there are to choose from.
      what: what they choose: `"classes"` or `"rows"`.
      mask: what a loss multiplies the items by, if anything.
    """

    ids: Layout
    size: int
    what: str
    mask: Layout | None


def uses_of(jaxpr: Any, leaves: int) -> tuple[Use, ...]:
    """The uses of a program's last arguments, a batch's leaves, as ids.

    Args:
      jaxpr: a closed jaxpr.
      leaves: how many there are; the arguments before them are parameters.
    """
    bare, _ = _compat.open_jaxpr(jaxpr)
    parameters = len(bare.invars) - leaves
    known: list[Any] = [_Parameter()] * parameters
    for number, var in enumerate(bare.invars[parameters:]):
        shape = tuple(var.aval.shape)
        places = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
        known.append(Layout(number, places))
    found: list[Use] = []
    _walk(jaxpr, known, found)
    return tuple(found)


class IdCheck:
    """The ids of a step's batches, checked before each run.

    Arrays of NumPy are checked always. Those on a device, for which the host would have
    to wait, are checked in the first batch of each shape.
    """

    def __init__(self) -> None:
        self._uses: dict[Any, tuple[Use, ...]] = {}

    def __call__(self, program: Any, batch: Any, trace: Callable[[], Any]) -> None:
        """Check a batch.

        Args:
          program: what tells this program from the step's others, hashable.
          batch: what it is about to run on.
          trace: makes its jaxpr, whose last arguments are the batch's leaves.

        Raises:
          DataError: an id that does not exist, with the leaf and the place in it.
        """
        leaves, treedef = jax.tree.flatten(batch)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return
        key = (program, treedef, tuple(np.shape(x) for x in leaves))
        is_new = key not in self._uses
        if is_new:
            self._uses[key] = uses_of(trace(), len(leaves))
        if not is_new:
            leaves = [None if isinstance(x, jax.Array) else x for x in leaves]
        try:
            for use in self._uses[key]:
                _check(use, leaves, batch)
        except DataError:
            del self._uses[key]  # the next one is the first of its shape again
            raise


def _check(use: Use, leaves: Sequence[Any], batch: Any) -> None:
    ids, places = _values(leaves, use.ids), use.ids.places.reshape(-1)
    if ids is None:
        return
    mask: np.ndarray | None = None
    # Of several processes each has its part of the program's batch, whose rows are all
    # treated alike: it is checked as if it were the first.
    own = places < ids.size
    if use.mask is not None:
        weights = _values(leaves, use.mask)
        if weights is None:
            return
        marks = use.mask.places.reshape(-1)
        own &= marks < weights.size
        own[own] = weights.reshape(-1)[marks[own]] != 0
    places = places[own]
    if places.size != ids.size:
        mask = np.zeros(ids.shape, bool)
        mask.reshape(-1)[places] = True
    path = jax.tree_util.tree_leaves_with_path(batch)[use.ids.leaf][0]
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
    refuse_ids(repr(name), ids, use.size, what=use.what, mask=mask)


def _values(leaves: Sequence[Any], layout: Layout) -> np.ndarray | None:
    leaf = leaves[layout.leaf]
    return None if leaf is None else values_of(leaf)


def _walk(jaxpr: Any, known: Sequence[Any], found: list[Use]) -> list[Any]:
    """Follow what is known of a program's arguments to its results."""
    bare, _ = _compat.open_jaxpr(jaxpr)
    env = {v: k for v, k in zip(bare.invars, known, strict=True) if k is not None}

    def read(atom: Any) -> Any:
        return None if isinstance(atom, _compat.Literal) else env.get(atom)

    for eqn in bare.eqns:
        operands = [read(v) for v in eqn.invars]
        has_ids = any(isinstance(k, Layout) for k in operands)
        is_parameter = _is_parameter(eqn, operands)
        if not has_ids and not is_parameter:
            continue
        results = _follow(eqn, operands, found)
        env.update(
            (v, k) for v, k in zip(eqn.outvars, results, strict=False) if k is not None
        )
    return [read(v) for v in bare.outvars]


def _is_parameter(eqn: Eqn, operands: list[Any]) -> bool:
    """Whether the result is a parameter: one is, or is cut from a stack of them."""
    name = eqn.primitive.name
    cut = name in _CUT and isinstance(operands[0], _Parameter)
    return cut or (name in _SAME and operands[0] is not None)


def _follow(eqn: Eqn, operands: list[Any], found: list[Use]) -> list[Any]:
    name = eqn.primitive.name
    first = operands[0] if operands else None
    if name in _SAME or (name in _CUT and isinstance(first, _Parameter)):
        return [first]
    if name in _compat.JIT:
        jit = _compat.jit_parts(eqn)
        _note_labels(jit.name, operands, found)
        return _walk(jit.body, operands, found)
    if name in _compat.REMAT:
        return _walk(_compat.remat_parts(eqn).body, operands, found)
    if name in _compat.CUSTOM_RULE:
        return _walk(eqn.params["call_jaxpr"], operands, found)
    if name == "scan":
        return _follow_scan(eqn, operands, found)
    if name == "gather":
        _note_rows(eqn, operands, found)
    elif name == "select_n":
        return [_chosen(operands)]
    elif isinstance(first, Layout) and name in ("lt", "add"):
        by_number = isinstance(eqn.invars[1], _compat.Literal)
        form = "negative" if name == "lt" else "shifted"
        return [first._replace(form=form) if by_number else None]
    elif isinstance(first, Layout) and name in _LAID_OUT:
        places = _LAID_OUT[name](first.places, eqn)
        return [first._replace(places=places)]
    return []


def _chosen(operands: list[Any]) -> Any:
    """`where(ids < 0, ids + size, ids)` is ids again."""
    if len(operands) != 3 or not all(isinstance(k, Layout) for k in operands):
        return None
    one_leaf = len({k.leaf for k in operands}) == 1
    is_known = [k.form for k in operands] == ["negative", "ids", "shifted"]
    return operands[1] if one_leaf and is_known else None


def _follow_scan(eqn: Eqn, operands: list[Any], found: list[Use]) -> list[Any]:
    scan = _compat.scan_parts(eqn)
    carried = scan.num_consts + scan.num_carry
    consts, xs = operands[: scan.num_consts], operands[carried:]
    sliced = any(isinstance(k, Layout) for k in xs)
    for i in range(scan.length if sliced else min(scan.length, 1)):
        own = [
            k._replace(places=k.places[i]) if isinstance(k, Layout) else None
            for k in xs
        ]
        _walk(scan.body, [*consts, *[None] * scan.num_carry, *own], found)
    return []


def _note_labels(name: str, operands: list[Any], found: list[Use]) -> None:
    head, _, classes = name.rpartition("_")
    if head != LABELS or not isinstance(operands[0], Layout):
        return
    mask = operands[1] if len(operands) > 1 else None
    if len(operands) == 1 or isinstance(mask, Layout):
        found.append(Use(operands[0], int(classes), "classes", mask))


def _note_rows(eqn: Eqn, operands: list[Any], found: list[Use]) -> None:
    table, ids = operands
    numbers = eqn.params["dimension_numbers"]
    is_clipped = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    if not isinstance(table, _Parameter) or not isinstance(ids, Layout) or is_clipped:
        return
    if ids.form == "ids" and len(numbers.start_index_map) == 1:
        size = eqn.invars[0].aval.shape[numbers.start_index_map[0]]
        found.append(Use(ids, size, "rows", None))


_CUT = ("slice", "squeeze", "reshape")
_SAME = (
    "convert_element_type",
    "copy",
    "sharding_constraint",
    "stop_gradient",  # from JAX 0.11 on
    *_compat.PVARY,
    *_compat.RESHARD,
)


def _reshaped(places: np.ndarray, eqn: Eqn) -> np.ndarray:
    return places.reshape(eqn.outvars[0].aval.shape)


def _broadcast(places: np.ndarray, eqn: Eqn) -> np.ndarray:
    shape = eqn.outvars[0].aval.shape
    aligned = [1] * len(shape)
    for axis, n in zip(eqn.params["broadcast_dimensions"], places.shape, strict=True):
        aligned[axis] = n
    return np.broadcast_to(places.reshape(aligned), shape)


def _sliced(places: np.ndarray, eqn: Eqn) -> np.ndarray:
    p = eqn.params
    strides = p["strides"] or (1,) * places.ndim
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return places[tuple(slice(*b) for b in bounds)]


def _transposed(places: np.ndarray, eqn: Eqn) -> np.ndarray:
    return places.transpose(eqn.params["permutation"])


_LAID_OUT: dict[str, Callable[[np.ndarray, Eqn], np.ndarray]] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "transpose": _transposed,
}
