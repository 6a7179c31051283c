"""How a head's logits are cut, so that they exist a part at a time.

A processor wants parts that lie in its cache. A GPU wants few: each part is a launch of
every kernel, and adds to sums of the hidden states' shape. Parts are of classes, whose
sums are `[N, d]`, or of tokens, each of which reads the whole kernel `[d, V]`.

What was tried, and what it gave, is in benchmarks/NOTES.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jlora import _compat
from jlora._errors import ShapeError
from jlora._kernel.specs import names_of
from jlora.sharding._batches import batch_spec
from jlora.sharding._rules import ways_of

CACHED = 2048  # classes, of a part for a processor's cache
BYTES = 384 * 2**20  # of the logits of a part, on other devices
_TILE = 128  # classes: products of other widths are read with unaligned loads
_FLOAT32 = 4


class Chunks(NamedTuple):
    """Groups of tokens, and the classes at a time within each."""

    groups: int
    classes: int


class Asked(NamedTuple):
    """Classes at a time, or None; bytes of logits; devices that share the tokens."""

    classes: int | None
    bytes: int
    ways: int = 1

    def check(self) -> None:
        """Refuse what is no size."""
        for name, x in (("chunk", self.classes), ("chunk_bytes", self.bytes)):
            if x is not None and x < 1:
                raise ShapeError(f"{name}={x}: expected a number of at least 1.")


def on_a_cpu(tokens: int, classes: int, asked: Asked) -> Chunks:
    """Parts that lie in a cache, of even sizes."""
    most = max(1, asked.bytes // (_FLOAT32 * max(1, tokens)))
    return Chunks(1, _even(classes, asked.classes or min(CACHED, most)))


def elsewhere(
    tokens: int, classes: int, asked: Asked, *, grouped: bool = True
) -> Chunks:
    """Few parts: as large as may be, of whole tiles, and none left over if it can be.

    Args:
      tokens: of all devices.
      classes: of the head.
      asked: what bounds a part.
      grouped: whether parts may be of tokens.

    >>> elsewhere(4096, 128_256, Asked(None, BYTES))  # six parts
    Chunks(groups=1, classes=21376)
    >>> elsewhere(65_536, 32_128, Asked(None, BYTES))
    Chunks(groups=32, classes=32128)
    """
    if asked.classes:
        return Chunks(1, _even(classes, asked.classes))
    own = max(1, -(-tokens // asked.ways))
    parts = -(-_FLOAT32 * own * classes // asked.bytes)
    if parts == 1:
        return Chunks(1, classes)
    # A group reads the kernel twice. A part of the classes reads the tokens, and reads
    # and writes their sums.
    if grouped and classes < 2 * own and tokens % asked.ways == 0:
        fits = [n for n in range(parts, 2 * parts + 1) if own % n == 0]
        if fits:
            return Chunks(fits[0], classes)
    tiles, rest = divmod(classes, _TILE)
    whole = range(parts, 2 * parts + 1) if not rest else ()
    number = next((n for n in whole if tiles % n == 0), parts)
    return Chunks(1, min(classes, -(-classes // (number * _TILE)) * _TILE))


def _even(classes: int, most: int) -> int:
    return -(-classes // -(-classes // most))


def ways_of_tokens(hidden: jax.Array) -> int:
    """Over how many devices the tokens of `[..., d]` lie, as far as tracing knows."""
    if _compat.is_explicit(hidden):
        return _ways(jax.typeof(hidden).sharding.mesh, _compat.spec(hidden)[:-1])
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    # Within `shard_map` an axis is manual, and shapes are a device's own already.
    names = {name for part in batch_spec(2, mesh) for name in names_of(part)}
    return _ways(mesh, [name for name in names if name in mesh.auto_axes])


def _ways(mesh: Any, parts: Sequence[Any]) -> int:
    return math.prod(ways_of(mesh, part) for part in parts)
