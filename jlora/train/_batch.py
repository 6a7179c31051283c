"""Batches as the steps take them: trees of arrays and numbers, checked on the host."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from jlora._errors import DataError
from jlora._text import listed

Batch = Any  # a pytree of arrays

_NUMBERS = (bool, int, float, complex)
_REMEDY = (
    "\nA batch is a tree of NumPy or JAX arrays and single numbers. Leave out what the "
    'loss does not use; a tokenizer returns arrays with return_tensors="np".'
)


def shapes_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """What a program is compiled for anew: the shapes of a batch's leaves."""
    return tuple(map(jax.numpy.shape, jax.tree.leaves(batch)))


def as_batch(batch: Any) -> Batch:
    """The batch, with mappings that JAX does not know as dicts.

    What a tokenizer of Hugging Face returns is such a mapping.

    Raises:
      DataError: a leaf that is no array, or a number that JAX would not keep.
    """
    leaves = jax.tree.leaves(batch)
    if all(_is_plain(x) for x in leaves):
        return batch
    batch = jax.tree.map(_as_dicts, batch)
    faults = _faults(batch)
    if faults:
        lines = (f"{path}: {fault}" for path, fault in faults.items())
        raise DataError(f"a step cannot read this batch:\n  {listed(lines)}{_REMEDY}")
    return batch


def _is_plain(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return _is_number(x.dtype) and x.dtype not in _WIDE
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


_WIDE = (np.dtype(np.int64), np.dtype(np.uint64))


@functools.lru_cache(maxsize=256)
def _is_number(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_))


def _as_dicts(x: Any) -> Any:
    if not isinstance(x, Mapping):
        return x
    return {key: jax.tree.map(_as_dicts, value) for key, value in x.items()}


def _faults(batch: Batch) -> dict[str, str]:
    """What is wrong with which leaf; lists of numbers count as one leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(batch, is_leaf=_is_list_of_numbers)
    found: dict[str, str] = {}
    for path, leaf in leaves:
        fault = _fault(leaf)
        if fault is not None:
            found.setdefault(_owner(path), fault)
    return found


def _is_list_of_numbers(x: Any) -> bool:
    if not isinstance(x, list) or not x:
        return False
    return isinstance(x[0], _NUMBERS) or _is_list_of_numbers(x[0])


def _owner(path: tuple[Any, ...]) -> str:
    """The path without the places in lists at its end: `text` for `text/0`."""
    while path and isinstance(path[-1], jax.tree_util.SequenceKey):
        path = path[:-1]
    return repr(jax.tree_util.keystr(path, simple=True, separator="/") or "the batch")


def _fault(leaf: Any) -> str | None:
    if isinstance(leaf, list):
        return "a list of numbers; make it an array, np.asarray(...)"
    if isinstance(leaf, int | np.ndarray | np.generic):
        return _array_fault(np.asarray(leaf))
    if isinstance(leaf, (*_NUMBERS, jax.Array, jax.ShapeDtypeStruct)):
        return None
    kind = type(leaf)
    name = kind.__name__ if kind.__module__ == "builtins" else _full_name(kind)
    if isinstance(leaf, str | bytes):
        return f"text ({name})"
    if hasattr(leaf, "__array__"):
        return f"{name}; make it a NumPy array, np.asarray(...)"
    return name


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _array_fault(x: np.ndarray) -> str | None:
    if not _is_number(x.dtype):
        named = "objects" if x.dtype == object else f"dtype {x.dtype}"
        kinds = f", the first a {type(x.flat[0]).__name__}" if x.size else ""
        return f"a NumPy array {list(x.shape)} of {named}{kinds}"
    kept = dtypes.canonicalize_dtype(x.dtype)
    if kept == x.dtype or x.dtype.kind not in "iu" or not x.size:
        return None
    for value in (x.max(), x.min()):
        if not np.iinfo(kept).min <= value <= np.iinfo(kept).max:
            return f"{x.dtype} with the number {value}, which {kept} cannot hold"
    return None
