"""EVA: A spans the directions in which a kernel's inputs vary most."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import OptionError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank
from jlora.init._inputs import Fn, Sums, check_finite, fresh_nodes, input_sums
from jlora.init._restart import map_nodes, with_factors

Tree = Any


def eva(
    fn: Fn,
    tree: Tree,
    batches: Any,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    centered: bool = True,
    whiten: bool = False,
    adjust_scale: bool = True,
) -> Tree:
    """Start adapters with principal components of their inputs, and share out ranks.

    A holds, for each kernel, the components of its inputs over the batches, B is zero.
    The ranks of all adapters together are a budget, spent where components explain most
    of their inputs' variance. Batches are read until the components no longer turn.

    Costs a forward pass a batch, a product XᵀX `[i, i]` a kernel and batch, as many
    float32 numbers of memory, and eigenvectors of it after 1, 2, 4, ... batches.

    Args:
      fn: `fn(params, batch)` of plain parameters, which returns logits or a loss.
      tree: from `lorafy`, with its default start; its ranks are the budget.
      batches: an iterable of what `fn` takes. Padding counts as input: leave it out as
        far as you can.
      rho: no rank grows beyond `rho` times what it was; 1 leaves all ranks.
      tau: components have converged where they and those of half as many batches have
        a cosine above this; then no more batches are read.
      centered: whether the inputs' mean is taken off first, as PEFT does. Without, A
        spans the inputs' largest singular vectors.
      whiten: divide components by the square roots of their singular values.
      adjust_scale: keep alpha/r as ranks change, not alpha.

    Returns:
      The tree with adapters of their new ranks, the kernels unchanged. Kernels that no
      rank was left for are plain again. All layers of a stack have one rank.

    Raises:
      OptionError: a setting that cannot be, or no batches.
      StructureError: a tree without adapters, or with adapters that have begun.
      TargetError: a kernel whose inputs cannot be seen: it is looked up or convolved.
      NonFiniteError: NaN or infinity in what flows into a kernel.

    Source: Paischer et al. 2024, arXiv:2410.07170, algorithm 1; PEFT's
    `initialize_lora_eva_weights`.

    >>> tree = jlora.lorafy({"w": jnp.ones((4, 3))}, 1, ["w"])
    >>> x = jnp.asarray([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    >>> tree = eva(lambda p, x: x @ p["w"], tree, [x])
    >>> [float(abs(a)) for a in tree["w"].adapters[""].a[:, 0]]
    [1.0, 0.0, 0.0, 0.0]
    """
    _check(rho=rho, tau=tau)
    nodes = fresh_nodes("eva", tree)
    units = {
        (path, name): _Unit(t, _most(t, rho))
        for path, x in nodes.items()
        for name, t in x.adapters.items()
    }
    found: dict[Any, _Components] = {}
    ranks: dict[Any, int] = {}
    sums: dict[str, Sums] = {}
    number = looked_at = 0
    for number, sums in enumerate(input_sums("eva", fn, tree, nodes, batches), 1):
        if number < 2 * looked_at:
            continue
        before, found = found, _components(sums, units, number, centered)
        ranks, looked_at = share_out(units, found), number
        if before and all(
            _have_converged(before[u], found[u], ranks[u], tau) for u in units
        ):
            break
    if looked_at < number:
        found = _components(sums, units, number, centered)
        ranks = share_out(units, found)

    def one(path: str, x: LowRank) -> Any:
        adapters = {
            name: _started(t, found[path, name], ranks[path, name], whiten,
                           adjust_scale, x.base)
            for name, t in x.adapters.items() if ranks[path, name]
        }  # fmt: skip
        return LowRank(x.base, adapters, path) if adapters else x.base

    return map_nodes(one, tree)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """An adapter and the most that its rank may be."""

    adapter: Adapter
    most: int

    @property
    def count(self) -> int:
        """How many matrices have a rank together: a stack's layers."""
        return math.prod(self.adapter.scale.shape)


class _Components(NamedTuple):
    """Of a kernel's inputs, the largest first.

    Attributes:
      vectors: `[n, i, k]`, orthonormal.
      explained: `[n, k]`, the part of the variance along each.
      singular: `[n, k]`, the inputs' singular values.
    """

    vectors: Array
    explained: Array
    singular: Array


def _check(*, rho: Any, tau: Any) -> None:
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)  # noqa: E731
    if not (number(rho) and 1 <= rho < math.inf):
        raise OptionError(f"rho={rho!r}: expected a number, 1 or more.")
    if not (number(tau) and 0 <= tau <= 1):
        raise OptionError(f"tau={tau!r}: expected a cosine, within 0 and 1.")


def _most(t: Adapter, rho: float) -> int:
    sides = (math.prod(t.size(d) or 1 for d in x) for x in (t.in_axes, t.out_axes))
    return min(round(t.rank * rho), *sides)


def _components(
    sums: Mapping[str, Sums], units: Mapping[Any, _Unit], number: int, centered: bool
) -> dict[Any, _Components]:
    """The components of every adapter's inputs; of equal inputs they are found once."""
    check_finite("eva", sums, number)
    done: dict[Any, _Components] = {}
    out = {}
    for (path, name), unit in units.items():
        second = np.asarray(sums[path].second)
        key = hashlib.blake2b(second.tobytes()).digest(), unit.most
        if key not in done:
            done[key] = _principal(sums[path], unit.most, centered)
        out[path, name] = done[key]
    return out


@functools.partial(jax.jit, static_argnums=(1, 2))
def _principal(sums: Sums, most: int, centered: bool) -> _Components:
    scatter = sums.second
    if centered:
        n = jnp.maximum(sums.number, 1)[:, None, None]
        scatter = scatter - sums.first[:, :, None] * sums.first[:, None, :] / n
    values, vectors = jax.lax.map(jnp.linalg.eigh, scatter)
    values = jnp.maximum(values[:, ::-1], 0)
    total = jnp.maximum(jnp.sum(values, axis=1, keepdims=True), 1e-30)
    kept = values[:, :most]
    return _Components(vectors[:, :, ::-1][:, :, :most], kept / total, jnp.sqrt(kept))


def share_out(
    units: Mapping[Any, _Unit], found: Mapping[Any, _Components]
) -> dict[Any, int]:
    """The rank of each adapter: the budget goes to what explains most, first.

    A stack has one rank, which costs that many for each of its layers and counts what
    it explains on their average.
    """
    left = sum(unit.adapter.rank * unit.count for unit in units.values())
    explained = {u: np.mean(np.asarray(found[u].explained), axis=0) for u in units}
    order = sorted(
        ((value, u) for u in units for value in explained[u]),
        key=lambda pair: -float(pair[0]),
    )
    ranks = dict.fromkeys(units, 0)
    for _, u in order:
        if units[u].count <= left:
            ranks[u] += 1
            left -= units[u].count
    return ranks


def _have_converged(
    before: _Components, now: _Components, rank: int, tau: float
) -> bool:
    pairs = (x.vectors[:, :, :rank] for x in (before, now))
    cosines = jnp.abs(jnp.einsum("nik,nik->nk", *pairs, precision="highest"))
    return bool(jnp.all(cosines >= tau))


def _started(
    t: Adapter, found: _Components, rank: int, whiten: bool, adjust_scale: bool,
    leaf: Array,
) -> Adapter:  # fmt: skip
    a = found.vectors[:, :, :rank]
    if whiten:
        floor = jnp.finfo(jnp.float32).tiny
        a = a / jnp.sqrt(jnp.maximum(found.singular[:, None, :rank], floor))
    b = jnp.zeros((a.shape[0], rank, t.b.size // (a.shape[0] * t.rank)), t.b.dtype)
    change = rank / t.rank  # of alpha, if it is adjusted
    divisor = math.sqrt(change) if t.rslora else change
    scale = t.scale * ((change if adjust_scale else 1) / divisor)
    return with_factors(t, a, b, scale, leaf)
