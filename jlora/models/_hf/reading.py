"""Leaves read straight from files: each device its part, each tensor in its place.

Nothing else is held: a leaf's memory is made in its final dtype and sharding, and the
tensors are copied into it one after the other out of mapped files.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._errors import ShapeError, StructureError
from jlora.models._hf.sources import Box, Source, TensorPlace, places
from jlora.models._hf.tensors import TensorFolder

Shardings = Any  # see `shardings_of`

_ALIGNED = 64  # bytes: XLA takes such memory as it is
_ROWS = 16  # of float32, that is a cache line of a column
_LARGE = 2**22  # bytes, from which on threads are worth their start


def read(
    tensors: TensorFolder,
    source: Source,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Sharding | None,
) -> jax.Array:
    """Return a leaf.

    Args:
      tensors: what it is read from.
      source: where it is found.
      shape: of the whole leaf.
      dtype: what it becomes.
      sharding: where it lies; `None` is the default device.
    """
    found = places(source, shape)
    last: dict[tuple[Any, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        spans = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        # Devices that hold the same part take it from the same memory.
        key = tuple(spans)
        if key not in last:
            last.clear()
            last[key] = _part(tensors, found, tuple(slice(*s) for s in spans), dtype)
        return last[key]

    if sharding is None:
        leaf = jax.device_put(part((slice(None),) * len(shape)))
    else:
        leaf = jax.make_array_from_callback(shape, sharding, part)
    # Transfers run in the background; waiting keeps one leaf in the host's memory.
    return jax.block_until_ready(leaf)


def _part(
    tensors: TensorFolder, found: list[TensorPlace], region: Box, dtype: Any
) -> np.ndarray:
    """Return the values of a leaf in `region`."""
    out = _aligned(tuple(s.stop - s.start for s in region), np.dtype(dtype))
    for place in found:
        spans = [
            (max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(place.box, region, strict=True)
        ]
        if all(start < stop for start, stop in spans):
            inner, outer = _within(spans, place.box), _within(spans, region)
            view = tensors.view(place.tensor.name)
            if place.tensor.transposed:
                view = view.swapaxes(-1, -2)
            into = out[outer][(0,) * place.depth]
            _copy(into, view[inner[place.depth :]], place.tensor.transposed)
    return out


def _within(spans: list[tuple[int, int]], box: Box) -> Box:
    """Return `spans` counted from where `box` begins."""
    return tuple(
        slice(start - own.start, stop - own.start)
        for (start, stop), own in zip(spans, box, strict=True)
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array that XLA's CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(into: np.ndarray, view: np.ndarray, transposed: bool) -> None:
    """Copy and cast, on all processors; NumPy lets go of Python's lock meanwhile."""
    axis = into.ndim - 1 if transposed else 0
    if into.nbytes < _LARGE:
        _copy_part(into, view, transposed)
        return
    threads = os.cpu_count() or 1
    # Whole bands for each, or two would write to one cache line.
    each = -(-into.shape[axis] // (threads * _ROWS)) * _ROWS
    parts = [
        (slice(None),) * axis + (slice(i, i + each),)
        for i in range(0, into.shape[axis], each)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda p: _copy_part(into[p], view[p], transposed), parts))


def _copy_part(into: np.ndarray, view: np.ndarray, transposed: bool) -> None:
    """Copy and cast; a transposed view a few of the file's rows at a time.

    NumPy alone writes a transpose one element a cache line, six times as slow, and
    moves bfloat16 element by element if it is not told that they are mere bits.
    """
    if not transposed:
        into[...] = view
        return
    bits = np.dtype(f"u{into.itemsize}")
    for i in range(0, into.shape[-1], _ROWS):
        rows = view[..., i : i + _ROWS].astype(into.dtype, copy=False)
        into[..., i : i + _ROWS].view(bits)[...] = rows.view(bits)


def shardings_of(shardings: Shardings, abstract: Any) -> list[Sharding | None]:
    """Return the sharding of every leaf.

    Args:
      shardings: `None`, a sharding for all leaves, a function of a leaf's path and
        shape that answers with its sharding or `None`, or a tree of shardings (or the
        beginning of one, as `jax.jit` takes it) in the structure of `abstract`.
      abstract: the parameters' shapes.

    Raises:
      ShapeError: a sharding that does not divide its leaf.
      StructureError: a tree of another structure, or what is no sharding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if callable(shardings):
        shapes = (leaf.shape for _, leaf in leaves)
        found = [shardings(*each) for each in zip(paths, shapes, strict=True)]
    else:
        try:
            whole = jax.tree.broadcast(shardings, abstract, is_leaf=_is_none)
        except ValueError as error:
            raise StructureError(
                "sharding: its tree is not that of the parameters (nor the beginning "
                f"of it): {error}"
            ) from error
        found = jax.tree.leaves(whole, is_leaf=_is_none)
    for path, (_, leaf), each in zip(paths, leaves, found, strict=True):
        if each is not None:
            _check(path, leaf.shape, each)
    return found


def _check(path: str, shape: tuple[int, ...], sharding: Any) -> None:
    if not isinstance(sharding, Sharding):
        raise StructureError(
            f"sharding: {path} got {sharding!r}, which is no jax.sharding.Sharding.\n"
            "A PartitionSpec goes with its mesh: NamedSharding(mesh, spec)."
        )
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ShapeError(
            f"{path} {list(shape)} cannot be sharded as {sharding}: {error}\n"
            "Give this path another one."
        ) from error


def _is_none(x: Any) -> bool:
    return x is None
