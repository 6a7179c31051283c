"""How a state's arrays lie between steps: like leaves in stacks, the rest by itself.

A model has hundreds of factors of few shapes. Each array that a compiled step takes and
gives costs microseconds of Python and of JAX, and each that its optimiser changes by
itself a kernel or more; so factors of one shape lie in one array, their moments in
others beside it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.train._joined import Joined, Lane

Tree = Any
#: The positions of one trainable leaf and of what the optimiser has for it.
Row = tuple[int, ...]

FEWEST, MOST = 4, 64  # arrays in a stack; a kernel takes only so many operands
# Numbers in an array: a larger one is worth its own kernels, and not worth a copy.
LARGEST = 2**22


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of a state's moving leaves lie in which stack.

    Buffers are the leaves that lie by themselves, in their order, then the stacks.

    Attributes:
      count: the leaves.
      groups: the rows of stacks that go together, column by column a stack each; the
        first column is of trainable leaves.
    """

    count: int
    groups: tuple[tuple[Row, ...], ...] = ()

    @functools.cached_property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the leaves in each stack."""
        return tuple(
            column for rows in self.groups for column in zip(*rows, strict=True)
        )

    @functools.cached_property
    def alone(self) -> tuple[int, ...]:
        """The positions of the leaves in none."""
        stacked = {i for own in self.stacks for i in own}
        return tuple(i for i in range(self.count) if i not in stacked)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """The buffers of leaves, which may be shapes."""
        stacks = [_stack([leaves[i] for i in own]) for own in self.stacks]
        return [*(leaves[i] for i in self.alone), *stacks]

    def unpack(self, buffers: Sequence[Any]) -> list[Any]:
        """The leaves."""
        leaves: list[Any] = [None] * self.count
        for i, x in zip(self.alone, buffers, strict=False):
            leaves[i] = x
        for own, stack in zip(self.stacks, buffers[len(self.alone) :], strict=True):
            for i, x in zip(own, _unstack(stack), strict=True):
                leaves[i] = x
        return leaves

    def apply(
        self,
        f: Callable[..., tuple[list[Any], Any]],
        grads: Sequence[Any],
        buffers: Sequence[Any],
        leaves: Sequence[Any],
    ) -> tuple[list[Any], Any]:
        """What a function of leaves makes of stacks, see `Joined`; in a traced step.

        Args:
          f: `(grads, leaves) -> (leaves, more)`, the leaves as lists.
          grads: one for each trainable leaf.
          buffers: the leaves as they lie.
          leaves: the same, as `unpack` gives them.

        Returns:
          The new buffers, and what else `f` returns.
        """
        program, structure = traced(f, grads, leaves)
        joined = Joined(program, self.lanes(len(grads)))
        own = [columns[0] for columns in _columns(self.groups)]
        stacks = [
            *buffers[len(self.alone) :],
            *(jnp.stack([grads[i - 1] for i in column]) for column in own),
        ]
        found, stacked = joined.run([*grads, *leaves], stacks, self.stacks)
        more = jax.tree.unflatten(structure, found[self.count :])
        return [*(found[i] for i in self.alone), *stacked], more

    def lanes(self, grads: int) -> list[Lane | None]:
        """Where the gradients, and after them the leaves, lie."""
        out: list[Lane | None] = [None] * (grads + self.count)
        number = 0
        for group, columns in enumerate(_columns(self.groups)):
            for own in columns:
                for lane, i in enumerate(own):
                    out[grads + i] = Lane(group, number, lane, len(own))
                number += 1
        for group, columns in enumerate(_columns(self.groups)):
            for lane, i in enumerate(columns[0]):
                # The step's count leads the leaves, and has no gradient.
                out[i - 1] = Lane(group, number + group, lane, len(columns[0]))
        return out


def _columns(groups: Iterable[Sequence[Row]]) -> list[list[tuple[int, ...]]]:
    return [list(zip(*rows, strict=True)) for rows in groups]


def traced(
    f: Callable[..., tuple[list[Any], Any]], grads: Sequence[Any], leaves: Sequence[Any]
) -> tuple[Any, Any]:
    """The program of `f`, as of `Layout.apply`, and the structure of what else."""
    structures: list[Any] = []

    def flat(grads: list[Any], leaves: list[Any]) -> list[Any]:
        new, more = f(grads, leaves)
        others, structure = jax.tree.flatten(more)
        structures.append(structure)
        return [*new, *others]

    program = jax.make_jaxpr(flat)(list(grads), list(leaves))
    return program, structures[0]


# -- choosing a layout -----------------------------------------------------------------


def layout_of(moving: tuple[Any, Tree, Tree], program: Callable[[], Any]) -> Layout:
    """A layout for a state, with all leaves in stacks that its update treats alike.

    Args:
      moving: the step's count, the trainable leaves and the optimiser's.
      program: makes the program of the update, see `traced`.
    """
    leaves, count = jax.tree.leaves(moving), len(jax.tree.leaves(moving))
    if not _can_be_stacked(leaves):
        return Layout(count)
    groups = _candidates(*moving[1:])
    if not groups:
        return Layout(count)
    first = Layout(count, tuple(groups))
    joined = Joined(program(), first.lanes(len(jax.tree.leaves(moving[1]))))
    found = []
    for rows in first.groups:
        columns = [joined.alike(own) for own in zip(*rows, strict=True)]
        found += _gathered(zip(zip(*columns, strict=True), rows, strict=True))
    return Layout(count, tuple(found))


def _can_be_stacked(leaves: Sequence[Any]) -> bool:
    """Whether all lie on one device, and are not being traced."""
    places: set[Any] = set()
    for x in leaves:
        if isinstance(x, np.ndarray):
            continue
        sharding = getattr(x, "sharding", None)
        if isinstance(x, jax.core.Tracer) or sharding is None:
            return False
        places |= sharding.device_set
    return len(places) < 2


def _candidates(trainable: Tree, opt_state: Tree) -> list[tuple[Row, ...]]:
    """The rows of leaves that look alike."""
    of_half = jax.tree_util.tree_leaves_with_path(trainable)
    of_optimiser = jax.tree_util.tree_leaves_with_path(opt_state)
    number = {path: i for i, (path, _) in enumerate(of_half)}
    leaves = [None, *(x for _, x in of_half), *(x for _, x in of_optimiser)]
    rows: list[list[int]] = [[1 + i] for i in range(len(of_half))]
    looks: list[list[Any]] = [[path[-1:], _look(x)] for path, x in of_half]
    for position, (path, x) in enumerate(of_optimiser, 1 + len(of_half)):
        # What an optimiser keeps for a leaf stands at the leaf's path, in its own tree.
        cuts = (i for i in range(len(path)) if path[i:] in number)
        cut = next(cuts, None)
        if cut is not None:
            rows[number[path[cut:]]].append(position)
            looks[number[path[cut:]]] += [path[:cut], _look(x)]
    fit = [all(_fits(leaves[i]) for i in row) for row in rows]
    pairs = (
        (tuple(look), tuple(row))
        for look, row, fits in zip(looks, rows, fit, strict=True)
        if fits
    )
    return _gathered(pairs)


def _look(x: Any) -> Any:
    return tuple(x.shape), x.dtype


def _fits(x: Any) -> bool:
    is_number = jnp.issubdtype(x.dtype, jnp.floating)
    return bool(is_number) and x.size <= LARGEST


def _gathered(pairs: Iterable[tuple[Any, Row]]) -> list[tuple[Row, ...]]:
    """Rows of one key together, where they are enough, and no more than a stack has."""
    by_key: dict[Any, list[Row]] = {}
    for key, row in pairs:
        by_key.setdefault(key, []).append(row)
    cut = [
        tuple(rows[i : i + MOST])
        for rows in by_key.values()
        for i in range(0, len(rows), MOST)
    ]
    return [rows for rows in cut if len(rows) >= FEWEST]


# -- arrays ----------------------------------------------------------------------------


def _stack(xs: list[Any]) -> Any:
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        shape = (len(xs), *xs[0].shape)
        return jax.ShapeDtypeStruct(shape, xs[0].dtype, sharding=xs[0].sharding)
    return _stacked(xs)


def _unstack(x: Any) -> list[Any]:
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = x.shape[1:]
        one = jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
        return [one] * x.shape[0]
    if isinstance(x, jax.core.Tracer):
        return _apart(x)
    return _unstacked(x)


def _apart(x: jax.Array) -> list[jax.Array]:
    return [lax.index_in_dim(x, i, keepdims=False) for i in range(x.shape[0])]


_stacked = jax.jit(jnp.stack)
_unstacked = jax.jit(_apart)
