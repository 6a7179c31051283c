"""What arrays are known by: shapes, dtypes, and digests of their values.

A digest depends on an array's values and not on where they lie. Large arrays are cut
into blocks that shards seldom cut across, so that each process reads what is its own:

    digest of a small array    BLAKE2b of its bytes, in C order
    digest of a large array    BLAKE2b of its blocks' digests, in C order
"""

from __future__ import annotations

import bisect
import concurrent.futures
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._processes import on_host, read_shard

Box = tuple[tuple[int, int], ...]  # start and stop along each axis

# The version of checkpoints from which on large arrays are hashed in blocks.
IN_BLOCKS = 2
_READERS = 4  # hashing releases the interpreter's lock; more threads gain little
_LEAST = 2**17  # bytes of a block: less, and Python is slower than the hash
_PIECES = 64  # the most blocks along one axis, a power of two as meshes are
_SIZE = 16  # bytes of a digest


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


def has_numbers(x: Any) -> bool:
    """Whether a leaf holds numbers; an activation function, say, does not.

    >>> [has_numbers(x) for x in (jnp.ones(3), 0.5, jax.nn.relu, "relu")]
    [True, True, False, False]
    """
    if isinstance(x, bool | int | float | complex):
        return True
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        return False
    return is_key(x) or np.dtype(x.dtype).kind not in "OSUMm"


def is_key(x: Any) -> bool:
    """Whether x is an array of PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def leaf_kind(x: Any) -> LeafPrint:
    """Shape and dtype of an array, without its values."""
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    return LeafPrint(tuple(x.shape), str(x.dtype), None)


def leaf_prints(
    leaves: Sequence[Any], *, read: Sequence[bool] | None = None, in_blocks: bool = True
) -> list[LeafPrint]:
    """Shapes, dtypes and digests of arrays; every process calls it with its own.

    Args:
      leaves: the arrays; of shapes there is no digest.
      read: whether to read each one's values; None reads all.
      in_blocks: cut large arrays into blocks; False is how the first version of the
        format did it, for which an array must fit into each process's memory.
    """
    found = [leaf_kind(x) for x in leaves]
    wanted = [
        i
        for i, x in enumerate(leaves)
        if (read is None or read[i]) and not isinstance(x, jax.ShapeDtypeStruct)
    ]
    arrays = [_data(leaves[i]) for i in wanted]
    digests = _digests(arrays, in_blocks)
    for i, digest in zip(wanted, digests, strict=True):
        found[i] = dataclasses.replace(found[i], digest=digest)
    return found


def leaf_print(x: Any) -> LeafPrint:
    """Shape, dtype and digest of one array."""
    return leaf_prints([x])[0]


def blake(data: Any) -> Any:
    """The hash that everything here is made with."""
    return hashlib.blake2b(data, digest_size=_SIZE)


def _data(x: Any) -> Any:
    if not hasattr(x, "dtype"):
        return np.asarray(x)
    return jax.random.key_data(x) if is_key(x) else x


# -- blocks ----------------------------------------------------------------------------


def _digests(arrays: Sequence[Any], in_blocks: bool) -> list[str]:
    pieces = [pieces_of(x.shape, x.dtype.itemsize if in_blocks else 0) for x in arrays]
    blocks = [blocks_of(x.shape, p) for x, p in zip(arrays, pieces, strict=True)]
    owners = [_owners(x, own) for x, own in zip(arrays, blocks, strict=True)]
    tables: dict[int, np.ndarray] = {}
    for i, x in enumerate(arrays):
        # Moved one at a time and in the same order by all processes: not by threads.
        if owners[i] is None and not _is_readable(x):
            moved = _resharded(x, pieces[i])
            owners[i] = _owners(moved, blocks[i])
            tables[i] = _hashed(moved, blocks[i], owners[i])
    rest = [i for i in range(len(arrays)) if i not in tables]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        hashed = pool.map(lambda i: _hashed(arrays[i], blocks[i], owners[i]), rest)
        tables.update(zip(rest, hashed, strict=True))
    return [_digest(tables[i], owners[i]) for i in range(len(arrays))]


def pieces_of(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Into how many blocks an array is cut along each axis: a matter of its shape.

    A power of two that divides the axis, as meshes do; less where blocks would become
    small.

    >>> pieces_of((4096, 4096), 2), pieces_of((5, 7), 4)
    ([16, 16], [1, 1])
    """
    pieces = [math.gcd(n, _PIECES) or 1 for n in shape]
    size = math.prod(shape) * itemsize
    while math.prod(pieces) > 1 and size < _LEAST * math.prod(pieces):
        pieces[pieces.index(max(pieces))] //= 2
    return pieces


def blocks_of(shape: tuple[int, ...], pieces: Sequence[int]) -> list[Box]:
    """The blocks of an array in C order."""
    spans = [
        [(i * (n // p), (i + 1) * (n // p)) for i in range(p)]
        for n, p in zip(shape, pieces, strict=True)
    ]
    return list(itertools.product(*spans))


def _is_readable(x: Any) -> bool:
    """Whether this process, like every other, has all values of an array."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable or x.is_fully_replicated


def _resharded(x: jax.Array, pieces: Sequence[int]) -> Any:
    """An array whose shards cut across blocks, in shards that do not.

    Each process then holds a part of it; all of it only where it cannot be cut so.
    """
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        devices = x.sharding.mesh.devices.reshape(-1)
        counts = [math.gcd(n, devices.size) for n in pieces]
        if (most := max(counts, default=1)) > 1:
            axes = [None] * counts.index(most) + ["part"]
            mesh = jax.sharding.Mesh(devices.reshape(most, -1), ("part", "copy"))
            spec = jax.sharding.PartitionSpec(*axes)
            return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    return on_host(x)


def _owners(x: Any, blocks: Sequence[Box]) -> list[int] | None:
    """Which process reads each block, where no process can read them all.

    None where each can, or where shards cut across blocks.
    """
    if _is_readable(x):
        return None
    shards = x.sharding.devices_indices_map(x.shape)
    first: dict[Box, int] = {}
    for device in sorted(shards, key=lambda device: device.id):
        first.setdefault(_box(shards[device], x.shape), device.process_index)
    holders = _holders(list(first), blocks)
    processes = list(first.values())
    return None if None in holders else [processes[n] for n in holders if n is not None]


def _holders(boxes: Sequence[Box], blocks: Sequence[Box]) -> list[int | None]:
    """For each block the number of the box that holds it; None where it is cut."""
    starts = [sorted({start for start, _ in axis}) for axis in zip(*boxes, strict=True)]
    by_start = {tuple(start for start, _ in box): n for n, box in enumerate(boxes)}
    found: list[int | None] = []
    for block in blocks:
        before = [
            axis[max(bisect.bisect_right(axis, start) - 1, 0)]
            for axis, (start, _) in zip(starts, block, strict=True)
        ]
        n = by_start.get(tuple(before))
        found.append(n if n is not None and _holds(boxes[n], block) else None)
    return found


def _hashed(x: Any, blocks: Sequence[Box], owners: Sequence[int] | None) -> np.ndarray:
    """The digests of the blocks that are this process's to read, [blocks, 16]."""
    table = np.zeros((len(blocks), _SIZE), np.uint8)
    mine = [
        i
        for i in range(len(blocks))
        if owners is None or owners[i] == jax.process_index()
    ]
    shards = _shards(x)
    holders = _holders([box for box, _ in shards], [blocks[i] for i in mine])
    if None in holders:  # shards cut across blocks
        shards, holders = [(_whole(x.shape), on_host(x))], [0] * len(mine)
    for n, (box, values) in enumerate(shards):
        inside = [i for i, holder in zip(mine, holders, strict=True) if holder == n]
        held = read_shard(values) if inside else None
        for i in inside:
            table[i] = _block_digest(held, box, blocks[i])
    return table


def _block_digest(held: Any, box: Box, block: Box) -> np.ndarray:
    """The digest of a block of which `held` has the values, from `box`'s start on."""
    place = tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(block, box, strict=True)
    )
    data = np.ascontiguousarray(held[place]).reshape(-1).view(np.uint8)
    return np.frombuffer(blake(data).digest(), np.uint8)


def _digest(table: np.ndarray, owners: Sequence[int] | None) -> str:
    """An array's digest from those of its blocks, all of which come together here."""
    if owners is not None:
        from jax.experimental import multihost_utils

        table = multihost_utils.process_allgather(table)[
            np.asarray(owners), np.arange(len(owners))
        ]
    data = table.tobytes()
    return data.hex() if len(table) == 1 else blake(data).hexdigest()


def _shards(x: Any) -> list[tuple[Box, Any]]:
    """The parts of an array that this process holds, each once."""
    if not isinstance(x, jax.Array):
        return [(_whole(x.shape), x)]
    return list(
        {
            _box(shard.index, x.shape): shard.data for shard in x.addressable_shards
        }.items()
    )


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


def _holds(box: Box, block: Box) -> bool:
    return all(
        a <= start and stop <= b
        for (a, b), (start, stop) in zip(box, block, strict=True)
    )
