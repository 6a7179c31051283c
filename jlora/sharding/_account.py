"""What lies on each device, in bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp


def device_bytes(tree: Any = None) -> dict[jax.Device, int]:
    """The bytes that arrays take on each device of this process.

    A buffer that several arrays share counts once. What a program needs while it runs
    is not here; `compiled.memory_analysis()` tells that.

    Args:
      tree: of arrays; None is all that are alive, `jax.live_arrays()`.

    >>> [*device_bytes({"w": jnp.ones((3, 2), jnp.float32)}).values()]
    [24]
    """
    seen: set[tuple[jax.Device, int]] = set()
    found: dict[jax.Device, int] = defaultdict(int)
    for x in jax.live_arrays() if tree is None else jax.tree.leaves(tree):
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            continue
        if x.is_deleted():
            continue
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            x = jax.random.key_data(x)
        for shard in x.addressable_shards:
            data = shard.data
            place = (shard.device, data.unsafe_buffer_pointer())
            if place not in seen:
                seen.add(place)
                found[shard.device] += data.nbytes
    return dict(found)
