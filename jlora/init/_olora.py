"""OLoRA: orthonormal B from the kernel's QR decomposition."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._tree.initializers import Factors, FromKernel


@dataclasses.dataclass(frozen=True)
class OLoRA(FromKernel):
    """B the first r columns of Q, A the first r rows of R, of `Wᵀ = Q·R`.

    Their product, times the scale, is taken out of the kernel. Costs O(i·o·min(i, o)),
    less than a singular value decomposition by a constant.

    Source: Büyükakyüz 2024, arXiv:2406.01775, section 3; PEFT's
    `init_lora_weights="olora"`.

    >>> kernel = jnp.arange(12.0).reshape(4, 3)
    >>> tree = jlora.lorafy({"w": kernel}, 2, ["w"], init="olora")
    >>> bool(jnp.allclose(jlora.merge(tree)["w"], kernel, atol=1e-5))
    True
    """

    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, *data: Any
    ) -> Factors:
        """The factors of one kernel `[i, o]`."""
        q, r = jnp.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T
