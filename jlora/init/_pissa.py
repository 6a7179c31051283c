"""PiSSA: the kernel's principal components are trained, the rest is frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import OptionError
from jlora._tree.initializers import Factors, FromKernel

_OVERSAMPLED = 10  # Halko et al. 2011, section 4.2: 5 or 10 more than the rank


@dataclasses.dataclass(frozen=True)
class PiSSA(FromKernel):
    """A and B the r largest singular components of the kernel, halved between them.

    With `W = U·S·Vᵀ`, `A = U_r·sqrt(S_r/s)` and `B = sqrt(S_r/s)·V_rᵀ`. So s·A·B is the
    best approximation of rank r, and is taken out of the kernel.

    Attributes:
      niter: None decomposes exactly, in O(i·o·min(i, o)). A number of power iterations
        takes the randomised decomposition, in O(i·o·r) each; 4 to 16 come close.

    Raises:
      OptionError: a `niter` that is no whole number, 0 or more.

    Source: Meng et al. 2024, arXiv:2404.02948, section 3; Halko et al. 2011,
    arXiv:0909.4061, algorithm 4.4; PEFT's `init_lora_weights="pissa"` and
    `"pissa_niter_N"`.

    >>> kernel = jnp.arange(12.0).reshape(4, 3)  # of rank 2
    >>> tree = jlora.lorafy({"w": kernel}, 2, ["w"], init=PiSSA())
    >>> float(jnp.max(jnp.abs(tree["w"].base))) < 1e-4
    True
    """

    niter: int | None = None

    def __post_init__(self) -> None:
        """Check the number."""
        n = self.niter
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 0):
            raise OptionError(
                f"PiSSA(niter={n!r}): expected a number of iterations, 0 or more, or "
                "None for the exact decomposition."
            )

    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, *data: Any
    ) -> Factors:
        """The factors of one kernel `[i, o]`."""
        if self.niter is None:
            u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        else:
            u, s, vt = randomised_svd(key, w, rank, self.niter)
        root = jnp.sqrt(s[:rank] / scale.astype(s.dtype))
        return u[:, :rank] * root, root[:, None] * vt[:rank]


def randomised_svd(
    key: jax.Array, w: jax.Array, rank: int, niter: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values of `w [i, o]` with their vectors, at random.

    Returns:
      `u [i, k]`, `s [k]` and `vt [k, o]` with k a little more than the rank.
    """
    size = min(rank + _OVERSAMPLED, *w.shape)
    start = jax.random.normal(key, (w.shape[1], size), w.dtype)
    q, _ = jnp.linalg.qr(w @ start)
    for _ in range(niter):
        z, _ = jnp.linalg.qr(w.T @ q)
        q, _ = jnp.linalg.qr(w @ z)
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, vt
