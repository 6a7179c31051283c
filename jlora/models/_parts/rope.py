"""Rotary positions: angles by position, and how files scale them for long texts.

Source: Su et al. 2021, arXiv:2104.09864. "linear" divides positions (Chen et al. 2023,
arXiv:2306.15595); "llama3" divides only the slow frequencies (Llama 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora._errors import CheckpointError

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What each kind reads beside theta.
_READS = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3)}


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys.

    Attributes:
      theta: base of the wavelengths.
      kind: `"default"`, `"linear"` or `"llama3"`; the latter read the fields below.
      factor: by how much texts may be longer.
      low_freq_factor: wavelengths above original/low are divided by `factor`.
      high_freq_factor: wavelengths below original/high stay.
      original_max_position_embeddings: the length trained at first.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, width: int) -> np.ndarray:
        """Return the angle a position, `[D/2]`, for heads of `width` D."""
        # float32 step by step, as in the reference.
        powers = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        angles = np.float32(1) / np.float32(self.theta) ** powers
        if self.kind == "linear":
            return (angles / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            return self._llama3(angles)
        return angles

    def _llama3(self, angles: np.ndarray) -> np.ndarray:
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * angles / (2 * math.pi)
        # 0 where the wavelength is long and is divided, 1 where it is short and stays.
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return ((1 - smooth) * angles / self.factor + smooth * angles).astype(
            np.float32
        )

    @classmethod
    def from_dict(
        cls, kind: str, config: Mapping[str, Any], theta: float = 10000.0
    ) -> Rope:
        """Return what a `config.json` says in its old keys or its new one.

        Args:
          kind: the model's name, for errors.
          config: the parsed file; `rope_theta` and `rope_scaling` are the keys of
            releases before 5, `rope_parameters` is that of later ones.
          theta: where the file gives none.

        Raises:
          CheckpointError: a scaling that is not known, or keys that disagree.
        """
        old, scaling = config.get("rope_theta"), config.get("rope_scaling")
        new = config.get("rope_parameters") or {}
        theta = float(old or new.get("rope_theta") or theta)
        ropes = [cls._of(kind, raw, theta, config) for raw in (scaling, new) if raw]
        ropes = ropes or [cls._of(kind, {}, theta, config)]
        if len(set(ropes)) > 1 or old not in (None, ropes[0].theta):
            raise CheckpointError(
                f"{kind} config: rope_parameters {new} says another thing than "
                f"rope_theta {old} and rope_scaling {scaling}.\nRemove what is wrong."
            )
        return ropes[0]

    @classmethod
    def _of(
        cls, kind: str, raw: Mapping[str, Any], theta: float, config: Mapping[str, Any]
    ) -> Rope:
        raw = {key: value for key, value in raw.items() if value is not None}
        theta = float(raw.pop("rope_theta", theta))
        names = {raw.pop(key) for key in ("rope_type", "type") if key in raw}
        name = names.pop() if names else "default"
        if names or name not in _READS:
            raise CheckpointError(
                f"{kind} config: the rope scaling {name!r} is not known.\nKnown are "
                f"{', '.join(sorted(_READS))}."
            )
        if name == "llama3":
            length = config.get("max_position_embeddings", 2048)
            raw.setdefault("original_max_position_embeddings", length)
        if raw.get("partial_rotary_factor") == 1:
            del raw["partial_rotary_factor"]
        if set(raw) != set(_READS[name]):
            raise CheckpointError(
                f"{kind} config: rope scaling {name!r} takes "
                f"{', '.join(_READS[name]) or 'nothing'}, and the file gives "
                f"{', '.join(sorted(raw)) or 'nothing'}."
            )
        if not all(isinstance(value, (int, float)) for value in raw.values()):
            raise CheckpointError(f"{kind} config: {raw} must hold numbers.")
        return cls(theta, name, **raw)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of old and new releases, so that each reads its own."""
        scaling = {name: getattr(self, name) for name in _READS[self.kind]}
        scaling |= {"rope_type": self.kind}
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }


def turning(rope: Rope, positions: Array, width: int) -> tuple[Array, Array]:
    """Return cosine and sine `[B, 1, T, D/2]` in float32 for `positions` `[B, T]`."""
    frequencies = rope.frequencies(width)[None, None]
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def turn(x: Array, by: tuple[Array, Array]) -> Array:
    """Turn `x` `[B, H, T, D]`: its halves are the two axes of D/2 planes."""
    cos, sin = by
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
