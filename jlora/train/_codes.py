"""Quantised kernels that a mesh cuts: devices send codes, not dense kernels.

Where an axis of the mesh cuts the batch and a kernel (FSDP), each device gathers the
kernel before its product. XLA would gather what it made of the codes, in four to eight
times the bytes. A step knows where its parameters lie, and what it traces does not; so
the step says, for each quantised kernel, how its codes are cut when they are gathered.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jlora._kernel.quantized import Quantized
from jlora._kernel.specs import names_of
from jlora.sharding._batches import data_axes

Tree = Any
#: For each quantised kernel of a tree in order: the mesh and the parts of its codes'
#: axes (`Layout.kept`), or None.
Kept = tuple[Any, ...]

_kept: contextvars.ContextVar[Kept | None] = contextvars.ContextVar(
    "kept", default=None
)


def kept_parts(tree: Tree, mesh: Any) -> Kept | None:
    """How the codes of a tree are to be cut when a batch on the mesh meets them.

    Args:
      tree: of arrays or shapes that say where they lie.
      mesh: as the step has it; None says nothing, and neither do explicit axes, which
        the arrays' types know.
    """
    if mesh is None or any(t != AxisType.Auto for t in mesh.axis_types):
        return None
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    axes = frozenset(data_axes(abstract))
    found = tuple(_parts(q, abstract, axes) for q in _quantised(tree))
    return found if any(found) else None


def _parts(q: Quantized, mesh: Any, axes: frozenset[str]) -> Any:
    sharding = getattr(q.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (q.codes.ndim - len(sharding.spec))]
    own = spec[len(q.batch) :]
    left = [tuple(n for n in names_of(part) if n not in axes) for part in own]
    if left == [names_of(part) for part in own]:
        return None  # nothing of it is gathered
    return mesh, tuple(n[0] if len(n) == 1 else n or None for n in left)


@contextlib.contextmanager
def gathering(kept: Kept | None) -> Iterator[None]:
    """Let what is traced gather codes so; None leaves what was said before."""
    if kept is None:
        yield
        return
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def with_gathers(params: Tree) -> Tree:
    """The parameters of a step, whose kernels know how their codes are gathered."""
    kept = _kept.get()
    if kept is None:
        return params
    feed = iter(kept)

    def tell(x: Any) -> Any:
        if not isinstance(x, Quantized):
            return x
        return dataclasses.replace(
            x, layout=dataclasses.replace(x.layout, kept=next(feed))
        )

    return jax.tree.map(tell, params, is_leaf=_is_quantised)


def _quantised(tree: Tree) -> list[Quantized]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_quantised) if _is_quantised(x)]


def _is_quantised(x: Any) -> bool:
    return isinstance(x, Quantized)
