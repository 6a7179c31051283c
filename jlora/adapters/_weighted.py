"""`weighted`: one adapter of several, each with its weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from jlora._errors import OptionError, ShapeError, StructureError
from jlora._kernel.adapter import Adapter
from jlora._kernel.nodes import Full, LowRank, Rows
from jlora._kernel.placement import along
from jlora._kernel.quantized import Quantized
from jlora._paths import leaf_paths
from jlora._text import table
from jlora._tree import options
from jlora._tree.initializers import leaf_key
from jlora.adapters._parts import Part, is_part, put_on
from jlora.adapters._set import AdapterSet
from jlora.adapters._sparse import Drop, Sign, Sparse
from jlora.adapters._terms import Figures, exact_sum, plain_term, sparse_sum
from jlora.adapters._whole import sum_of_rows, sum_of_wholes

# What of the updates is left out, and whether signs are elected.
_SPARSE: dict[str, tuple[Drop, bool]] = {
    "ties": ("smallest", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("smallest", False),
}
_EXACT = ("cat", "linear")
COMBINATIONS = (*_EXACT, "svd", *_SPARSE, *(f"{name}_svd" for name in _SPARSE))


@dataclasses.dataclass(frozen=True)
class SummedKernel:
    """What became of one kernel's updates.

    Attributes:
      path: the kernel; of a slice, with the slice's name.
      joined: the sum of the adapters' ranks.
      rank: that of the result.
      norm: Frobenius norm of the sum, before compression; with DoRA of its low-rank
        part.
      lost: norm of the part lost to compression, over `norm`: 0 is exact.
    """

    path: str
    joined: int
    rank: int
    norm: float
    lost: float


class WeightedReport(tuple[SummedKernel, ...]):
    """One `SummedKernel` a kernel; prints as a table."""

    def __str__(self) -> str:
        rows = [("kernel", "ranks", "rank", "|sum|", "lost to compression")]
        rows += [
            (k.path, str(k.joined), str(k.rank), f"{k.norm:.3g}", f"{k.lost:.2%}")
            for k in self
        ]
        return table(rows)


def weighted(
    adapters: AdapterSet,
    weights: Mapping[str, float],
    combination: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Sign = "total",
    key: jax.Array | None = None,
    report: bool = False,
) -> Any:
    """One adapter whose update is a weighted sum of those of several.

        mixed = jlora.weighted(adapters, {"german": 0.7, "french": 0.3})
        adapters = jlora.add(adapters, "mixed", mixed)

    By default it is exact, for every variant: the ranks are joined, scales and weights
    are in B. A sum with DoRA in it is a DoRA adapter. Biases, whole leaves and rows are
    summed as updates of the base. Weights may be negative, or traced.

    Args:
      adapters: a set.
      weights: by name.
      combination: `"cat"`, or `"linear"`: the sum itself. `"svd"`: the same, compressed
        to `rank`. `"ties"`, `"dare_linear"`, `"dare_ties"`, `"magnitude_prune"`: sums
        of updates of which a part is left out, compressed to `rank` by SVD of the dense
        update, a kernel at a time; they may end in `"_svd"`, as PEFT's that do this.
      rank: of the result, where a kernel's joined ranks are more. None is exact for a
        sum, and the largest of the adapters' for the others.
      density: the part of a kernel's entries that stays, in (0, 1], where some do not.
      majority_sign: of TIES, by the sum of the updates (`"total"`) or by their number
        (`"frequency"`).
      key: for DARE; folded with each kernel's path and adapter's name.
      report: also return a `WeightedReport`: per kernel, what compression has lost.

    Returns:
      The lorafied tree on the set's base; with `report` a tuple of it and the report.

    Raises:
      OptionError: a name that is not there; an argument that cannot be, or that this
        combination does not take.
      StructureError: adapters whose changes of a leaf are of unlike kinds; a sum with
        DoRA at whose weights a column of the base vanishes.
      ShapeError: a whole leaf of another shape than the base's.

    Sources: PEFT's `add_weighted_adapter`, and see `jlora.adapters._sparse`.
    """
    if not isinstance(adapters, AdapterSet):
        raise OptionError(
            f"jlora.weighted takes a set of adapters, and was given a "
            f"{type(adapters).__name__}.\nBegin one with jlora.add(params, name, tree)."
        )
    sums = _Sums(
        {adapters.known(name): w for name, w in _checked_weights(weights).items()},
        *_how(combination, rank, density, majority_sign, key),
    )
    columns = [
        jax.tree.leaves(adapters.adapters[name], is_leaf=is_part)
        for name in sums.weights
    ]
    like = adapters.adapters[next(iter(sums.weights))]
    structure: Any = jax.tree.structure(like, is_leaf=is_part)
    bases = structure.flatten_up_to(adapters.base)
    parts = [
        sums.of_leaf(path, base, dict(zip(sums.weights, held, strict=True)))
        for path, base, *held in zip(
            leaf_paths(like, is_leaf=is_part), bases, *columns, strict=True
        )
    ]
    sums.check_gains()
    tree = put_on(adapters.base, jax.tree.unflatten(structure, parts))
    return (tree, sums.report()) if report else tree


# -- leaf by leaf ----------------------------------------------------------------------


@dataclasses.dataclass
class _Sums:
    """The sums of all leaves, and what is known of those made so far."""

    weights: Mapping[str, Any]
    sparse: Sparse | None
    compress: bool
    rank: int | None
    key: jax.Array | None
    made: dict[str, tuple[int, int, Figures]] = dataclasses.field(default_factory=dict)

    def of_leaf(
        self, path: str, base: Any, parts: Mapping[str, Part | None]
    ) -> Part | None:
        held = {name: p.node for name, p in parts.items() if p is not None}
        if not held:
            return None
        kinds = {type(x) for x in held.values()}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind not in (LowRank, Full, Rows):
            _refuse_kinds(path, held)
        if kind is LowRank:
            return Part(self._of_kernels(path, base, held))
        names = list(held)
        nodes, weights = list(held.values()), [self.weights[name] for name in names]
        keys = self._keys(path, names)
        sum_up = sum_of_wholes if kind is Full else sum_of_rows
        return Part(sum_up(path, base, nodes, weights, self.sparse, keys))

    def _of_kernels(self, path: str, base: Any, held: Mapping[str, LowRank]) -> LowRank:
        groups: dict[Any, list[tuple[str, str, Adapter]]] = {}
        for name, node in held.items():
            for role, held_t in node.adapters.items():
                t = plain_term(held_t, base.shape)
                groups.setdefault(_axes(t), []).append((name, role, t))
        adapters: dict[str, Adapter] = {}
        for members in groups.values():
            names, (role, *_), terms = zip(*members, strict=True)
            while role in adapters:  # the same name on other slices
                role = f"{role}_"
            adapters[role] = self._of_terms(path, role, base, names, terms)
        return LowRank(None, adapters)

    def _of_terms(
        self, path: str, role: str, base: Any, names: Any, terms: Any
    ) -> Adapter:
        where = "/".join(filter(None, (path, role)))
        joined = sum(t.rank for t in terms)
        weights = [jnp.asarray(self.weights[name], jnp.float32) for name in names]
        rank = self.rank or max(t.rank for t in terms)
        needs_base = self.sparse or any(t.magnitude is not None for t in terms)
        kernel = base if needs_base else None
        if isinstance(kernel, Quantized):  # alike ones share a program
            kernel = dataclasses.replace(kernel, path="")
        if self.sparse:
            _check_spans(where, base, terms[0])
            keys = self._keys(where, names)
            out, figures = sparse_sum(
                kernel, terms, weights, keys, sparse=self.sparse, rank=rank
            )
        else:
            to = rank if self.compress and rank < joined else None
            out, figures = exact_sum(kernel, terms, weights, rank=to)
        out = out.map(lambda x, dims: (along(x, dims, base), dims))
        self.made[where] = (joined, out.rank, figures)
        return dataclasses.replace(out, role=terms[0].role)

    def _keys(self, where: str, names: Any) -> jax.Array | None:
        if self.key is None:
            return None
        own = leaf_key(self.key, where)
        return jnp.stack([leaf_key(own, name) for name in names])

    def check_gains(self) -> None:
        """Refuse a sum in which a column of a base has no gain left."""
        flags = {
            path: figures["vanishes"]
            for path, (_, _, figures) in self.made.items()
            if "vanishes" in figures
        }
        if any(isinstance(x, jax.core.Tracer) for x in flags.values()):
            return
        gone = [path for path, flag in jax.device_get(flags).items() if flag]
        if gone:
            raise StructureError(
                f"at these weights the gains of DoRA adapters cancel a column of "
                f"{gone[0]!r}, and no DoRA adapter is their sum.\nChange a weight, or "
                "merge them one after the other."
            )

    def report(self) -> WeightedReport:
        """What compression has lost."""
        figures = jax.device_get({path: f for path, (_, _, f) in self.made.items()})
        return WeightedReport(
            SummedKernel(
                path, joined, rank, float(figures[path]["norm"]),
                float(figures[path]["lost"] / max(figures[path]["norm"], _TINY)),
            )
            for path, (joined, rank, _) in self.made.items()
        )  # fmt: skip


_TINY = 1e-30


def _axes(t: Adapter) -> Any:
    """What terms have in common that are summed as one."""
    sizes = tuple(t.size(d) for d in range(len(t.starts)))
    return frozenset(t.a_dims), frozenset(t.b_dims), t.starts, sizes


# -- arguments -------------------------------------------------------------------------


def _checked_weights(weights: Any) -> Mapping[str, Any]:
    if not isinstance(weights, Mapping) or not weights:
        raise OptionError(
            f"weights={weights!r}: expected a weight for each adapter by its name, "
            "{'german': 0.7, 'french': 0.3}."
        )
    for name, w in weights.items():
        if isinstance(w, jax.core.Tracer):
            continue
        is_number = not isinstance(w, bool | str | list | tuple) and jnp.ndim(w) == 0
        if not is_number or not math.isfinite(w):
            raise OptionError(f"weights: {name!r} has {w!r}; expected a finite number.")
    return weights


def _how(
    combination: str, rank: Any, density: Any, majority_sign: Any, key: Any
) -> tuple[Sparse | None, bool, int | None, jax.Array | None]:
    options.one_of("combination", combination, COMBINATIONS)
    options.one_of("majority_sign", majority_sign, ("total", "frequency"))
    if rank is not None:
        rank = options.whole_rank(rank)
        if rank < 1:
            raise ShapeError(f"rank={rank}: expected 1 or more.")
    method = combination.removesuffix("_svd")
    if method not in _SPARSE:
        _refuse_given(combination, density=density, key=key)
        return None, combination == "svd" or rank is not None, rank, None
    drop, elect = _SPARSE[method]
    if not isinstance(density, float | int) or not 0 < density <= 1:
        raise OptionError(
            f"density={density!r}: {combination!r} keeps a part of the entries, in "
            "(0, 1]; 0.2 is TIES's."
        )
    if drop == "random":
        if key is None:
            raise OptionError(
                f"{combination!r} drops random entries.\nPass key=jax.random.key(0)."
            )
        key = options.single_key(key)
    else:
        _refuse_given(combination, key=key)
    return Sparse(drop, elect, float(density), majority_sign), True, rank, key


def _refuse_given(combination: str, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise OptionError(f"{name}: {combination!r} takes none, and leaves it out.")


def _check_spans(where: str, base: Any, t: Adapter) -> None:
    if any(t.size(d) is None for d in range(len(base.shape))):
        raise ShapeError(
            f"the adapter of {where!r} {tuple(base.shape)} does not span all axes of "
            "its kernel, and a part of its entries is no such adapter's.\nSum it "
            "exactly, with 'cat'."
        )


def _refuse_kinds(path: str, held: Mapping[str, Any]) -> NoReturn:
    each = ", ".join(f"{name!r} has a {x.kind}" for name, x in held.items())
    raise StructureError(
        f"{path!r} is changed in ways of which no sum is an adapter: {each}.\n"
        "Merge one, jlora.merge(adapters[name]), and go on from there."
    )
