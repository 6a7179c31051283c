"""A base's fingerprint: what tells the parameters an adapter belongs to from others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._paths import leaves_by_path

Tree = Any

_READERS = 4  # hashing releases the interpreter lock; more threads gain little


@dataclasses.dataclass(frozen=True)
class LeafPrint:
    """What is known of one leaf; digest is None where its values were not read."""

    shape: tuple[int, ...]
    dtype: str
    digest: str | None

    @property
    def kind(self) -> str:
        """Dtype and shape, for messages."""
        return f"{self.dtype} {self.shape}"

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"shape": list(self.shape), "dtype": self.dtype, "digest": self.digest}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LeafPrint:
        """Inverse of `to_json`."""
        return cls(tuple(data["shape"]), data["dtype"], data["digest"])


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The leaves of a base by path.

    Attributes:
      leaves: a `LeafPrint` a leaf. Leaves that are trained as they are keep no value
        to know them by, only shape and dtype.
    """

    leaves: Mapping[str, LeafPrint]

    @functools.cached_property
    def digest(self) -> str:
        """One hexadecimal number for the whole."""
        lines = [f"{p}|{x.kind}|{x.digest}" for p, x in sorted(self.leaves.items())]
        return _blake("\n".join(lines).encode()).hexdigest()

    def differences(self, other: Fingerprint, *, values: bool = True) -> list[str]:
        """How another base differs, one line a leaf, the gravest first.

        Args:
          other: the other one.
          values: whether to compare dtypes and values too, or paths and shapes only.
            Values that were not read on one side are not compared.
        """
        lines = [f"{p!r} is missing" for p in self.leaves if p not in other.leaves]
        lines += [f"{p!r} is new" for p in other.leaves if p not in self.leaves]
        both = [p for p in self.leaves if p in other.leaves]
        pairs = [(p, self.leaves[p], other.leaves[p]) for p in both]
        for path, x, y in pairs:
            if x.shape != y.shape or (values and x.dtype != y.dtype):
                lines.append(f"{path!r} was {x.kind}, is {y.kind}")
        for path, x, y in pairs:
            read = x.digest is not None and y.digest is not None
            if values and read and x.kind == y.kind and x.digest != y.digest:
                lines.append(f"{path!r} {x.kind} has other values")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        leaves = {path: x.to_json() for path, x in self.leaves.items()}
        return {"digest": self.digest, "leaves": leaves}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_json`."""
        leaves = data["leaves"].items()
        return cls({path: LeafPrint.from_json(x) for path, x in leaves})


def fingerprint(params: Tree, *, trained: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of a tree's base: adapters do not count.

    Every byte is read, at about a gigabyte a second and core. It depends on paths,
    shapes, dtypes and values, not on devices or shardings.

    Args:
      params: plain or lorafied parameters; leaves without values (shapes) are known by
        shape and dtype alone.
      trained: paths of leaves whose values are not to count, because they are trained
        as they are. Those of the tree itself are known.

    >>> lorafied = lorafy({"w": jnp.ones((3, 2))}, rank=1, targets=["w"])
    >>> fingerprint(lorafied).digest == fingerprint({"w": jnp.ones((3, 2))}).digest
    True
    """
    leaves: dict[str, tuple[Any, bool]] = {}
    for path, x, is_trained in _base_leaves(params):
        leaves[path] = (x, is_trained or path in trained)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        prints = pool.map(lambda item: leaf_print(item[0], read=not item[1]),
                          leaves.values())  # fmt: skip
        return Fingerprint(dict(zip(leaves, prints, strict=True)))


def _base_leaves(tree: Tree) -> Iterator[tuple[str, Any, bool]]:
    for name, x in leaves_by_path(tree, is_leaf=is_node).items():
        if isinstance(x, Full):
            yield name, x.value, True
        elif isinstance(x, Rows):
            yield name, x.base, False
        elif isinstance(x, LowRank):
            # A quantised base is itself a small tree.
            for inner, leaf in leaves_by_path(x.base).items():
                yield "/".join(filter(None, (name, inner))), leaf, False
        else:
            yield name, x, False


def leaf_print(x: Any, *, read: bool = True) -> LeafPrint:
    """Shape, dtype and (unless `read` is False, or it has none) the values' digest."""
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    shape, dtype = tuple(x.shape), str(x.dtype)
    if not read or isinstance(x, jax.ShapeDtypeStruct):
        return LeafPrint(shape, dtype, None)
    data = np.ascontiguousarray(_on_host(x)).reshape(-1).view(np.uint8)
    return LeafPrint(shape, dtype, _blake(data).hexdigest())


def _on_host(x: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _blake(data: Any) -> Any:
    return hashlib.blake2b(data, digest_size=16)
