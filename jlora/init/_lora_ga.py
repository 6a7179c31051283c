"""LoRA-GA: the first steps go where those of full fine-tuning would."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora._errors import NonFiniteError, OptionError, ShapeError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array, accumulation_dtype
from jlora._kernel.nodes import LowRank, is_node
from jlora._paths import map_with_path
from jlora._text import listed
from jlora._transform.lora import lora
from jlora._tree import options
from jlora._tree.from_kernel import form_of, gathered
from jlora._tree.initializers import Factors, FromKernel
from jlora.init._inputs import Fn, batches_of, fresh_nodes, plain
from jlora.init._restart import from_kernels

Tree = Any
Direction = Literal["ArB2r", "A2rBr", "ArBr"]
Scale = Literal["stable", "unit", "peft"]


def lora_ga(
    loss_fn: Fn,
    tree: Tree,
    batches: Any,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
) -> Tree:
    """Start adapters with the singular vectors of their kernels' gradients.

    With `U·S·Vᵀ` the decomposition of the loss's mean gradient, A and B take r of the
    first 2r vectors on either side, so that their first update is the best of rank 2r
    to that of full fine-tuning. s·A·B is taken out of the kernel.

    Costs a forward and backward pass a batch, the gradients of all adapted kernels in
    float32, and a decomposition a kernel.

    Args:
      loss_fn: `loss_fn(params, batch)` of plain parameters, the scalar that training
        lowers.
      tree: from `lorafy`, with its default start. Ranks are at most min(i, o)/2.
      batches: an iterable of what `loss_fn` takes; a few training batches do.
      direction: which vectors: A the first r and B the next (`"ArB2r"`, the paper's),
        the other way round (`"A2rBr"`), or each every second one (`"ArBr"`).
      scale: `"stable"` multiplies both factors by `o^(1/4)/sqrt(gamma)`, the paper's
        condition that outputs and gradients neither grow nor vanish with width;
        `"unit"` leaves them orthonormal; `"peft"` is what PEFT 0.21 calls stable: A is
        left, B times its singular values and that factor.
      gamma: of the factor; larger is a smaller start.

    Returns:
      The tree, which computes what it did.

    Raises:
      OptionError: a setting that cannot be, no batches, or a loss that is no scalar.
      ShapeError: a rank above min(i, o)/2.
      StructureError: a tree without adapters, or with adapters that have begun.
      NonFiniteError: NaN or infinity in a gradient.

    Source: Wang et al. 2024, arXiv:2407.05000, section 3.3 and algorithm 1; PEFT's
    `preprocess_loraga`.

    >>> tree = jlora.lorafy({"w": jnp.eye(4)}, 1, ["w"])
    >>> loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2)
    >>> tree = lora_ga(loss, tree, [jnp.arange(8.0).reshape(2, 4)])
    >>> bool(jnp.allclose(jlora.merge(tree)["w"], jnp.eye(4), atol=1e-5))
    True
    """
    options.one_of("direction", direction, ("ArB2r", "A2rBr", "ArBr"))
    options.one_of("scale", scale, ("stable", "unit", "peft"))
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not gamma > 0:
        raise OptionError(f"gamma={gamma!r}: expected a number above 0.")
    nodes = fresh_nodes("lora_ga", tree, shifts=True)
    for path, x in nodes.items():
        for t in x.adapters.values():
            _check_rank(path, x, t)
    gradients = _gradients(loss_fn, tree, nodes, batches)

    def of_window(path: str, x: LowRank, t: Adapter) -> tuple[Array]:
        return (form_of(t, x.base).matrices(gathered(gradients[path])),)

    return from_kernels(LoRAGA(direction, scale, float(gamma)), tree, of_window)


def _check_rank(path: str, x: LowRank, t: Adapter) -> None:
    form = form_of(t, x.base)
    _, i, o = jax.eval_shape(form.matrices, x.base).shape
    if 2 * t.rank > min(i, o):
        raise ShapeError(
            f"rank={t.rank} for the kernel {path!r}, which maps {i} inputs to {o} "
            f"outputs: LoRA-GA takes twice as many vectors of its gradient, and there "
            f"are {min(i, o)}.\nPass a rank of {min(i, o) // 2} or less."
        )


def _gradients(
    loss_fn: Fn, tree: Tree, nodes: dict[str, LowRank], batches: Any
) -> dict[str, Array]:
    """The mean gradient of every adapted kernel, in float32."""
    kernels = {path: x.base for path, x in nodes.items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: Any, kernels: Any, params: Tree, batch: Any) -> dict[str, Array]:
        def loss(kernels: dict[str, Array]) -> Array:
            put = lambda path, x: kernels.get(path, x)  # noqa: E731
            value = lora(loss_fn)(map_with_path(put, params, is_node), batch)
            if jnp.shape(value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
                raise OptionError(
                    f"jlora.init.lora_ga: loss_fn(params, batch) returns "
                    f"{jax.typeof(value)}.\nReturn a scalar, the loss."
                )
            return value

        found = jax.grad(loss)(kernels)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, found)

    total = {
        path: jnp.zeros_like(w, dtype=accumulation_dtype(w.dtype))
        for path, w in kernels.items()
    }
    count, params = 0, plain(tree)
    for batch in batches_of("lora_ga", batches):
        total = add(total, kernels, params, batch)
        count += 1
    norms = jax.device_get({path: _norm(g) for path, g in total.items()})
    if broken := [path for path, n in norms.items() if not math.isfinite(n)]:
        raise NonFiniteError(
            f"jlora.init.lora_ga: NaN or infinity in the gradients of {len(broken)} "
            f"kernels:\n  {listed(broken)}\nCheck the batches and the checkpoint."
        )
    if still := [path for path, n in norms.items() if not n]:
        raise StructureError(
            f"jlora.init.lora_ga: the loss has no gradient for {len(still)} kernels:\n"
            f"  {listed(still)}\nLeave them out of targets, or look for a "
            "stop_gradient between them and the loss."
        )
    return {path: g / count for path, g in total.items()}


@jax.jit
def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


@dataclasses.dataclass(frozen=True)
class LoRAGA(FromKernel):
    """The factors of one kernel and its gradient."""

    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    gamma: float = 16.0

    def factors(
        self, key: jax.Array, w: jax.Array, rank: int, scale: jax.Array, *data: Any
    ) -> Factors:
        """The factors of a kernel `[i, o]` with the loss's gradient `[i, o]`."""
        (gradient,) = data
        u, s, vt = jnp.linalg.svd(gradient.astype(w.dtype), full_matrices=False)
        first, second = slice(0, rank), slice(rank, 2 * rank)
        of_a, of_b = {
            "ArB2r": (first, second),
            "A2rBr": (second, first),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[self.direction]
        a, b = u[:, of_a], vt[of_b]
        size = w.shape[1] ** 0.25 / self.gamma**0.5
        if self.scale == "stable":
            return a * size, b * size
        return a, b * s[of_b, None] * size if self.scale == "peft" else b
