"""Rules on whole trees: plain, lorafied, quantised, halves of them, training states."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._errors import JloraWarning
from jlora._kernel.axes import RANK
from jlora._kernel.nodes import Full, LowRank, Rows, is_array, is_node
from jlora._kernel.placement import place_spec
from jlora._kernel.quantized import Quantized
from jlora._kernel.specs import fitting
from jlora._paths import leaf_paths, map_with_path
from jlora._processes import put
from jlora._text import listed
from jlora.sharding._rules import (
    Rule,
    Rules,
    Uneven,
    no_rule,
    rules,
    uneven_axis,
)

Tree = Any


def place(
    tree: Tree,
    mesh: Mesh,
    layout: Rules | str | Iterable[Rule] = "fsdp+tensor",
    *,
    uneven: Uneven | None = None,
) -> Tree:
    """The tree with its arrays on a mesh; shapes get their shardings.

    A tree that is too large for one device is not made first: `jlora.models.load` and
    `jax.jit`'s `out_shardings` take `Rules.on` and `Rules.shardings`.

    Args:
      tree: as of `Rules.shardings`.
      mesh: the mesh.
      layout: rules, or what `rules` takes.
      uneven: as of `rules`; None leaves that of the rules as it is.

    Raises:
      LoraError: as of `rules` and of `Rules.shardings`.
    """
    own = layout if isinstance(layout, Rules) else rules(layout)
    if uneven is not None:
        own = rules(own, uneven=uneven)
    leaves, structure = jax.tree.flatten(tree)
    where = jax.tree.leaves(shardings_of(own, tree, mesh), is_leaf=_is_none)
    where = [s for s, x in zip(where, _with_none(tree), strict=True) if x is not None]
    placed = [_put(x, s) for x, s in zip(leaves, where, strict=True)]
    return jax.tree.unflatten(structure, placed)


def _put(x: Any, where: NamedSharding | None) -> Any:
    if where is None:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return put(x, where)


def shardings_of(rules: Rules, tree: Tree, mesh: Mesh) -> Tree:
    """`Rules.shardings`."""
    walk = _Walk(rules, mesh)
    found = map_with_path(walk.leaf, tree, is_leaf=is_node)
    if walk.unmatched:
        raise no_rule(walk.unmatched, rules)
    unused = [pattern for pattern, _ in rules.own if pattern not in walk.used]
    if unused:
        paths = leaf_paths(tree, is_leaf=is_node)
        warnings.warn(
            f"these rules match no leaf of two axes or more:\n  {listed(unused)}\nThe "
            f"tree has {', '.join(paths[:3])}, ...",
            JloraWarning,
            stacklevel=3,
        )
    return found


@dataclasses.dataclass
class _Walk:
    """What is found of a tree, leaf by leaf."""

    rules: Rules
    mesh: Mesh
    used: set[str] = dataclasses.field(default_factory=set)
    unmatched: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def leaf(self, path: str, x: Any) -> Any:
        if isinstance(x, Full):
            return dataclasses.replace(x, value=self.leaf(path, x.value))
        if is_node(x):
            return self.node(path, x)
        if not is_array(x):
            return None
        return self.on(self.spec(path, tuple(x.shape)))

    def node(self, path: str, x: Any) -> Any:
        shape = _kernel_shape(x)
        spec = self.spec(path, shape)
        base = x if isinstance(x, Quantized) else x.base
        if isinstance(base, Quantized) and base.codes is not None:
            spec = self.between_codes(path, base, spec)
        if isinstance(x, Rows):
            table = None if x.base is None else self.under(x.base, spec)
            own = PartitionSpec(None, *tuple(spec)[1:])
            rows = None if x.rows is None else self.on(own)
            return dataclasses.replace(x, base=table, rows=rows)
        if isinstance(x, Quantized):
            return self.under(x, spec)
        parts = [self.rules.rank_part(path, n, self.mesh) for n in _ranks(x)]
        rank = None if None in parts or not parts else parts[0]
        return self.alike(x, place_spec(x, spec, rank=rank))

    def under(self, base: Any, spec: PartitionSpec) -> Any:
        """The shardings of a base, dense or quantised."""
        if not isinstance(base, Quantized):
            return self.on(spec)
        return self.alike(base, base.place_spec(spec))

    def alike(self, x: Any, specs: Any) -> Any:
        """The node of specs as one of shardings, which holds what x holds."""
        arrays, structure = jax.tree.flatten(x, is_leaf=_is_none)
        given = jax.tree.leaves(specs, is_leaf=_is_spec_or_none)
        made = [
            None if a is None else self.on(fitting(s or _WHOLE, a.shape, self.mesh))
            for a, s in zip(arrays, given, strict=True)
        ]
        return jax.tree.unflatten(structure, made)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        rule = self.rules.match(path) if len(shape) > 1 else None
        if rule is not None:
            self.used.add(rule[0])
        elif len(shape) > 1:
            self.unmatched[path] = shape
            return PartitionSpec()
        return self.rules.spec(path, shape, self.mesh)

    def between_codes(
        self, path: str, base: Quantized, spec: PartitionSpec
    ) -> PartitionSpec:
        """The spec without what would cut within a block of codes."""
        parts = [*spec, *[None] * (base.ndim - len(spec))]
        for name in ("codes", "absmax"):
            array = getattr(base, name)
            for axis, dim in enumerate(base.along(name)):
                if dim is None or (part := parts[dim]) is None:
                    continue
                own = PartitionSpec(*[None] * axis, part)
                if tuple(fitting(own, array.shape, self.mesh)) == tuple(own):
                    continue
                if self.rules.uneven == "error":
                    why = f" into parts of whole blocks ({array.shape[axis]} {name})"
                    raise uneven_axis(path, base.shape, dim, part, self.mesh, why)
                parts[dim] = None
        return PartitionSpec(*parts)

    def on(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


_WHOLE = PartitionSpec()


def _kernel_shape(x: Any) -> tuple[int, ...]:
    """A node's shape; of a trainable half, in which there is no base, its factors'."""
    base = x if isinstance(x, Quantized) else x.base
    if base is not None and not (isinstance(base, Quantized) and base.codes is None):
        return tuple(x.shape)
    if isinstance(x, Quantized):
        return ()
    if isinstance(x, Rows):
        return tuple(x.rows.shape) if x.rows is not None else ()
    return _spanned(x)


def _spanned(x: LowRank) -> tuple[int, ...]:
    """The shape that a kernel's factors span; 1 where none does."""
    sizes: dict[int, int] = {}

    def note(array: Any, dims: Any) -> Any:
        pairs = zip(dims, array.shape, strict=False)
        sizes.update((d, n) for d, n in pairs if d >= 0)
        return array, dims

    for t in x.adapters.values():
        t.map(note)
    ndim = max((len(t.starts) for t in x.adapters.values()), default=0)
    return tuple(sizes.get(d, 1) for d in range(ndim))


def _ranks(x: LowRank) -> set[int]:
    """The ranks of a kernel's adapters; of a frozen half there are none."""
    found: set[int] = set()

    def note(array: Any, dims: Any) -> Any:
        pairs = zip(dims, array.shape, strict=False)
        found.update(n for d, n in pairs if d == RANK)
        return array, dims

    for t in x.adapters.values():
        t.map(note)
    return found


def _with_none(tree: Tree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_none)


def _is_none(x: Any) -> bool:
    return x is None


def _is_spec_or_none(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
