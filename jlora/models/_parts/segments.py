"""Several texts in a row, one behind the other: who sees whom, and who stands where.

A row's segments are numbered, `jlora.data.pack` from 1 on with 0 at padding. Tokens of
a segment stand together, so that the distance of two of them is that in their text.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jlora._errors import ShapeError


def positions_in(segments: Array) -> Array:
    """Return the position of every token in its segment of `[B, T]`.

    >>> positions_in(jnp.array([[1, 1, 1, 2, 2, 0]]))
    Array([[0, 1, 2, 0, 1, 0]], dtype=int32)
    """
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return places - lax.cummax(jnp.where(begins, places, 0), axis=1)


def keys_seen(
    mask: Array | None, queries: Array | None = None, keys: Array | None = None
) -> Array | None:
    """Return the keys that queries may look at, `[B, 1 or T, S]`; `None` is all.

    Args:
      mask: `[B, S]`, off at padding; `None` is no padding.
      queries: `[B, T]`, the segment of each query; `None` where rows are of one text.
      keys: `[B, S]`, the segment of each key.
    """
    seen = None if mask is None else mask.astype(bool)[:, None]
    if queries is None or keys is None:
        return seen
    same = queries[:, :, None] == keys[:, None]
    return same if seen is None else same & seen


def check_segments(name: str, segments: Array | None, ids: Array) -> None:
    """Refuse segments of another shape than the tokens they number.

    Raises:
      ShapeError: they are.
    """
    if segments is not None and segments.shape != ids.shape:
        raise ShapeError(
            f"{name} {segments.shape} must have the shape of its tokens {ids.shape}: "
            "for each token the number of its text."
        )
