"""A base's fingerprint: what tells the parameters an adapter belongs to from others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._paths import leaves_by_path
from jlora.checkpoint._digests import LeafPrint, blake, has_numbers, leaf_prints

Tree = Any


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
        return blake("\n".join(lines).encode()).hexdigest()

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

    Every byte is read, at about a gigabyte a second and core; of a sharded array each
    process reads its own shards. It depends on paths, shapes, dtypes and values, not on
    devices or shardings. Leaves that hold no numbers, such as Equinox's activations,
    are not part of it.

    Args:
      params: plain or lorafied parameters; leaves without values (shapes) are known by
        shape and dtype alone.
      trained: paths of leaves whose values are not to count, because they are trained
        as they are. Those of the tree itself are known.

    Raises:
      CheckpointError: two leaves have one path.

    >>> lorafied = lorafy({"w": jnp.ones((3, 2))}, rank=1, targets=["w"])
    >>> fingerprint(lorafied).digest == fingerprint({"w": jnp.ones((3, 2))}).digest
    True
    """
    return fingerprint_of(params, trained)


def fingerprint_of(
    params: Tree, trained: Collection[str] = (), *, in_blocks: bool = True
) -> Fingerprint:
    """As `fingerprint`; without blocks, that of the first version of the format."""
    leaves: dict[str, tuple[Any, bool]] = {}
    for path, x, is_trained in _base_leaves(params):
        if not has_numbers(x):
            continue
        leaves[path] = (x, is_trained or path in trained)
    prints = leaf_prints(
        [x for x, _ in leaves.values()],
        read=[not is_trained for _, is_trained in leaves.values()],
        in_blocks=in_blocks,
    )
    return Fingerprint(dict(zip(leaves, prints, strict=True)))


def _base_leaves(tree: Tree) -> Iterator[tuple[str, Any, bool]]:
    """Paths and leaves of the base, and whether a leaf is trained as it is."""
    for name, x in leaves_by_path(tree, is_leaf=is_node).items():
        if isinstance(x, Full):
            yield name, x.value, True
            continue
        base = x.base if isinstance(x, LowRank | Rows) else x
        # A quantised base is itself a small tree.
        for inner, leaf in leaves_by_path(base).items():
            yield "/".join(filter(None, (name, inner))), leaf, False
