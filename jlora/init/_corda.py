"""CorDA: the kernel's components as its inputs see them."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora._errors import OptionError
from jlora._tree import options
from jlora._tree.initializers import Factors, FromKernel
from jlora.init._inputs import Fn, check_finite, fresh_nodes, input_sums
from jlora.init._restart import from_kernels

Tree = Any


def corda(
    fn: Fn,
    tree: Tree,
    batches: Any,
    *,
    mode: Literal["ipm", "kpm"] = "ipm",
    damp: float = 0.01,
) -> Tree:
    """Start adapters with components of their kernels that are oriented by context.

    With C the second moment of a kernel's inputs, `U·S·Vᵀ` the decomposition of `C·W`,
    s·A·B is `C⁻¹·U_r·S_r·V_rᵀ`, and is taken out of the kernel.

    Costs a forward pass a batch, C `[i, i]` a kernel in float32, and a decomposition a
    kernel.

    Args:
      fn: `fn(params, batch)` of plain parameters, which returns logits or a loss.
      tree: from `lorafy`, with its default start.
      batches: an iterable of what `fn` takes: text of the task for `"ipm"`, text whose
        knowledge is to be kept for `"kpm"`. The paper takes 256 samples of 2,048
        tokens. Padding counts as input.
      mode: `"ipm"` (instruction-previewed) trains the r largest components, `"kpm"`
        (knowledge-preserved) the r smallest.
      damp: what is added to C's diagonal, in parts of its mean, so that it has an
        inverse.

    Returns:
      The tree, which computes what it did.

    Raises:
      OptionError: a setting that cannot be, or no batches.
      StructureError: a tree without adapters, or with adapters that have begun.
      TargetError: a kernel whose inputs cannot be seen: it is looked up or convolved.
      NonFiniteError: NaN or infinity in what flows into a kernel.

    Source: Yang et al. 2024, arXiv:2406.05223, sections 3.2 and 3.3; PEFT's
    `preprocess_corda`, which besides divides every batch's inputs by the largest.

    >>> tree = jlora.lorafy({"w": jnp.ones((4, 3))}, 1, ["w"])
    >>> tree = corda(lambda p, x: x @ p["w"], tree, [jnp.ones((5, 4))])
    >>> bool(jnp.allclose(jlora.merge(tree)["w"], 1, atol=1e-5))
    True
    """
    options.one_of("mode", mode, ("ipm", "kpm"))
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not damp > 0:
        raise OptionError(f"damp={damp!r}: expected a number above 0.")
    nodes = fresh_nodes("corda", tree, shifts=True)
    each = enumerate(input_sums("corda", fn, tree, nodes, batches), 1)
    ((number, sums),) = collections.deque(each, maxlen=1)
    check_finite("corda", sums, number)
    init = CorDA(mode, float(damp))
    return from_kernels(init, tree, lambda path, x, t: (sums[path].second,))


@dataclasses.dataclass(frozen=True)
class CorDA(FromKernel):
    """The factors of one kernel and its inputs' second moment."""

    mode: Literal["ipm", "kpm"] = "ipm"
    damp: float = 0.01

    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, *data: Any
    ) -> Factors:
        """The factors of a kernel `[i, o]` with XᵀX `[i, i]` of its inputs."""
        (c,) = data
        c = c.astype(w.dtype) / jnp.maximum(jnp.mean(jnp.diag(c)), 1e-30)  # by its mean
        c = c + self.damp * jnp.eye(c.shape[0], dtype=c.dtype)
        u, s, vt = jnp.linalg.svd(c @ w, full_matrices=False)
        part = slice(0, rank) if self.mode == "ipm" else slice(len(s) - rank, None)
        root = jnp.sqrt(s[part] / scale.astype(s.dtype))
        a = jax.scipy.linalg.solve(c, u[:, part], assume_a="pos")
        return a * root, root[:, None] * vt[part]
