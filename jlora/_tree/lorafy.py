"""`lorafy(params)`: put low-rank nodes on the chosen kernels of a parameter tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jlora._errors import ShapeError, TargetError
from jlora._kernel.adapter import Adapter, new_adapter
from jlora._kernel.axes import Dims
from jlora._kernel.dora import column_norm
from jlora._kernel.nodes import Full, LowRank, is_node
from jlora._kernel.placement import placed_adapter
from jlora._paths import leaves_by_path
from jlora._transform.resolve import bias_of
from jlora._tree import conventions, initializers
from jlora._tree.matching import Hit
from jlora._tree.rows import make_rows, token_rows
from jlora._tree.targets import (
    Bias,
    Choice,
    Target,
    Targets,
    check_float,
    check_survey,
    choose,
    trained,
)

if TYPE_CHECKING:
    from jlora._transform.survey import Survey

Tree = Any


def lorafy(
    params: Tree,
    rank: int = 8,
    targets: Targets = ("query", "value"),
    *,
    alpha: float | None = None,
    key: jax.Array | None = None,
    train: Sequence[str] = (),
    exclude: Sequence[str] = (),
    bias: Bias = "none",
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    lora_bias: bool = False,
    trainable_tokens: Mapping[str, Sequence[int]] | None = None,
    init: str | initializers.Initializer = "default",
    dtype: Any = jnp.float32,
    survey: Survey | None = None,
) -> Tree:
    """Put adapters on the chosen kernels.

    Args:
      params: a tree of arrays, of `jax.ShapeDtypeStruct`s, or of sharded arrays.
      rank: r, the adapters' inner dimension.
      targets: which kernels. A list: each entry matches whole path segments (one, or a
        dotted or slashed run of them), or is a role that knows the spellings of the
        common families: `query key value out gate up down`. A string: a regular
        expression for the whole path of the leaf or its module. `"all-linear"`: every
        matmul kernel. A dict: such entries or expressions, each with its own `Target`;
        the first match wins. Every entry must hit something.
      alpha: the scale is alpha/r; None means alpha = r.
      key: seeds the factors, folded with each leaf's path; None is `jax.random.key(0)`.
      train: entries of leaves to train as they are, beside the adapters.
      exclude: entries of leaves that `targets` shall not touch.
      bias: train no biases, those of adapted layers (`"lora_only"`), or `"all"`.
      dropout: probability of dropping an input of an adapter, once keys are given by
        `with_dropout`.
      rslora: scale by alpha/sqrt(r), Kalajdzievski 2023, arXiv:2312.03732.
      dora: train each output's length apart from its direction, Liu et al. 2024,
        arXiv:2402.09353. The kernel's columns are read once a step for their norms;
        dropout acts on the low-rank term only.
      lora_bias: give each adapter a bias of its own, which starts at zero. It counts
        alpha/r times and needs layers that have a bias.
      trainable_tokens: entries of tables `[V, d]` and the rows of each to train as they
        are, `{"shared/embedding": [32100, 32101]}`; the table's other rows stay.
      init: how factors start, see `Target`. Embeddings start as PEFT's do.
      dtype: the factors' dtype.
      survey: from `jlora.survey`; makes `"all-linear"` and every kernel's axes exact.

    Returns:
      The tree, with a low-rank node in the place of each chosen kernel. Its value is
      unchanged until the adapters are trained. Abstract trees give abstract factors;
      factors of sharded kernels are sharded along.

    Raises:
      TargetError: an entry hits nothing, or only leaves that are no kernels; a leaf
        has an adapter already.
      ShapeError: a rank that is not within 1..min(in, out), or unknown axes.
      DtypeError: a kernel that is not of floating point.
      StructureError: `lora_bias` for a layer without bias.

    Source: Hu et al. 2021, arXiv:2106.09685.

    >>> tree = lorafy({"q": {"kernel": jnp.ones((4, 6))}}, rank=2, targets=["query"])
    >>> tree["q"]["kernel"]
    LowRank('q/kernel', float32[4, 6], rank 2, scale 1)
    """
    base_target = Target(rank=rank, alpha=alpha, dropout=dropout, init=init)
    leaves = leaves_by_path(params, is_leaf=is_node)
    _check_settings(dropout, bias, dora, lora_bias)
    check_survey(survey, leaves)
    chosen = choose(targets, leaves, exclude, survey)
    full = trained(train, bias, leaves, chosen)
    tables = token_rows(trainable_tokens or {}, leaves, {*chosen, *full})
    variant = _Variant(rslora=rslora, dora=dora, bias=lora_bias)
    if lora_bias:
        for name in chosen:
            bias_of(name, leaves[name], leaves)
    key = jax.random.key(0) if key is None else key

    def place(name: str, leaf: Any) -> Any:
        if name in chosen:
            adapters = {
                _adapter_name(c.hit): _make_adapter(
                    name, leaf, c, base_target, key, variant, dtype, survey
                )
                for c in chosen[name]
            }
            return LowRank(leaf, adapters, name)
        if name in tables:
            return make_rows(name, leaf, tables[name], dtype)
        return Full(leaf, name) if name in full else leaf

    structure = jax.tree.structure(params, is_leaf=is_node)
    return jax.tree.unflatten(structure, [place(*item) for item in leaves.items()])


def _check_settings(dropout: float, bias: str, dora: bool, lora_bias: bool) -> None:
    if dora and lora_bias:
        raise TargetError(
            "dora=True and lora_bias=True: PEFT refuses the two together, for DoRA's "
            "norm is of a kernel without bias.\nLeave one out; bias='lora_only' trains "
            "the layers' own biases."
        )
    if not 0 <= dropout < 1:
        raise ShapeError(f"dropout={dropout}; it is a probability, in [0, 1).")
    if bias not in ("none", "lora_only", "all"):
        raise TargetError(f"bias={bias!r}; it is 'none', 'lora_only' or 'all'.")


# -- one adapter -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Variant:
    """What all adapters of one call have in common."""

    rslora: bool
    dora: bool
    bias: bool


@dataclasses.dataclass(frozen=True)
class _Axes:
    """A kernel's axes by what they do."""

    ins: Dims
    outs: Dims
    batch: Dims
    embedding: bool = False


def _make_adapter(
    path: str, leaf: Any, choice: Choice, base: Target, key: Any, variant: _Variant,
    dtype: Any, survey: Any,
) -> Adapter:  # fmt: skip
    check_float(path, leaf)
    axes = _axes(path, leaf, choice.target, survey)
    settings = _merged_target(choice.target, base)
    starts, shape = _part_window(path, leaf, choice.hit, axes)
    ins, outs, batch = (
        tuple(shape[d] for d in dims) for dims in (axes.ins, axes.outs, axes.batch)
    )
    rank = _check_rank(path, settings.rank, ins, outs)
    alpha = rank if settings.alpha is None else settings.alpha
    scale = alpha / (math.sqrt(rank) if variant.rslora else rank)
    wide = jax.ShapeDtypeStruct((*batch, *outs), dtype)
    init = _initializer(settings.init, axes)
    name = f"{path}/{choice.hit.role}" if choice.hit.part else path
    own_key = initializers.leaf_key(key, name)
    adapter = new_adapter(
        jax.ShapeDtypeStruct((*batch, *ins, rank), dtype),
        jax.ShapeDtypeStruct((*batch, rank, *outs), dtype),
        jax.ShapeDtypeStruct(batch, jnp.float32),
        batch=axes.batch, ins=axes.ins, outs=axes.outs, starts=starts,
        magnitude=wide if variant.dora else None, bias=wide if variant.bias else None,
        dropout=settings.dropout, rslora=variant.rslora, role=choice.hit.role,
    )  # fmt: skip
    abstract = placed_adapter(adapter, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract

    def make(key: Any, kernel: Any) -> Adapter:
        a, b = init(key, adapter.a.shape, adapter.b.shape, math.prod(ins), dtype)
        made = dataclasses.replace(
            adapter, a=a, b=b, scale=jnp.full(batch, scale, jnp.float32)
        )
        if variant.bias:
            made = dataclasses.replace(made, bias=jnp.zeros(wide.shape, dtype))
        if not variant.dora:
            return made
        length = column_norm(kernel, made).astype(dtype)  # so that W' begins as W
        return dataclasses.replace(made, magnitude=length)

    kernel = leaf if variant.dora else None
    if abstract.a.sharding is None:
        return make(own_key, kernel)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(make, out_shardings=shardings)(own_key, kernel)


def _merged_target(own: Target, base: Target) -> Target:
    names = ("rank", "alpha", "dropout", "init")
    given = {n: getattr(own, n) for n in names if getattr(own, n) is not None}
    return dataclasses.replace(base, **given)


def _initializer(init: Any, axes: _Axes) -> initializers.Initializer:
    if callable(init):
        return init
    known = initializers.INITIALIZERS
    if init not in known:
        raise TargetError(
            f"init={init!r}; it is one of {sorted(known)} or a function "
            "(key, a_shape, b_shape, fan_in, dtype) -> (a, b)."
        )
    return known["embedding" if axes.embedding else init]


def _axes(path: str, leaf: Any, target: Target, survey: Any) -> _Axes:
    """The kernel's axes: as told, as surveyed, or as the frameworks name them."""
    ndim = len(leaf.shape)
    if target.in_axes is not None:
        return _told_axes(path, leaf, target)
    if survey is not None:
        return _Axes(*survey.axes(path))
    module, _, name = path.rpartition("/")
    owner = module.rpartition("/")[2]
    if ndim == 2:
        if name in conventions.EMBEDDING_NAMES:
            return _Axes((0,), (1,), (), embedding=True)
        return _Axes((1,), (0,), ()) if name == "weight" else _Axes((0,), (1,), ())
    if ndim == 3 and name == "kernel" and owner in ("query", "key", "value"):
        return _Axes((0,), (1, 2), ())
    if ndim == 3 and name == "kernel" and owner == "out":
        return _Axes((0, 1), (2,), ())
    if conventions.is_experts(path, ndim):
        return _Axes((ndim - 2,), (ndim - 1,), tuple(range(ndim - 2)))
    raise ShapeError(
        f"the kernel {path!r} {tuple(leaf.shape)} has {ndim} axes, and its name does "
        "not tell which are inputs.\nLet jlora find out, lorafy(params, "
        "survey=jlora.survey(fn, params, *args)), or say it: targets={"
        f"{path!r}: jlora.Target(in_axes=(...), out_axes=(...), batch_axes=(...))}}. "
        "For scanned layers [L, in, out] that is jlora.Target(in_axes=(1,), "
        "out_axes=(2,), batch_axes=(0,))."
    )


def _told_axes(path: str, leaf: Any, target: Target) -> _Axes:
    ndim = len(leaf.shape)
    ins = tuple(d % ndim for d in target.in_axes or ())
    batch = tuple(d % ndim for d in target.batch_axes)
    rest = tuple(d for d in range(ndim) if d not in (*ins, *batch))
    outs = rest if target.out_axes is None else tuple(d % ndim for d in target.out_axes)
    if sorted((*ins, *outs, *batch)) != list(range(ndim)) or not ins or not outs:
        raise ShapeError(
            f"Target for {path!r} {tuple(leaf.shape)}: in_axes={target.in_axes}, "
            f"out_axes={target.out_axes}, batch_axes={target.batch_axes} do not name "
            f"each of the {ndim} axes once, with at least one input and one output."
        )
    return _Axes(ins, outs, batch)


def _part_window(
    path: str, leaf: Any, hit: Hit, axes: _Axes
) -> tuple[Dims, tuple[int, ...]]:
    """Where the adapter's window starts, and its shape: a slice of a fused kernel."""
    shape, starts = list(leaf.shape), [0] * len(leaf.shape)
    if hit.part is not None:
        number, count = hit.part
        out = axes.outs[-1]
        if len(axes.outs) != 1 or shape[out] % count:
            raise ShapeError(
                f"the fused kernel {path!r} {tuple(shape)} does not fall into {count} "
                f"equal parts along its outputs, so the role {hit.role!r} names no "
                "slice of it.\nTarget the whole kernel by its own name."
            )
        shape[out] //= count
        starts[out] = number * shape[out]
    return tuple(starts), tuple(shape)


def _adapter_name(hit: Hit) -> str:
    """Slices of a fused kernel are told apart by role; else there is one adapter."""
    return hit.role or "" if hit.part is not None else ""


def _check_rank(path: str, rank: Any, ins: Dims, outs: Dims) -> int:
    most = min(math.prod(ins), math.prod(outs))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ShapeError(
            f"rank={rank!r} for the kernel {path!r}, which maps {math.prod(ins)} "
            f"inputs to {math.prod(outs)} outputs.\nPass a whole number from 1 to "
            f"{most}; give small kernels their own by targets={{pattern: "
            "jlora.Target(rank=...)}."
        )
    return rank
