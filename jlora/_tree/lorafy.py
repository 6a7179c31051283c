"""`lorafy(params)`: put low-rank nodes on the chosen kernels of a parameter tree."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Never

import jax
import jax.numpy as jnp
import numpy as np

from jlora._errors import OptionError, ShapeError, TargetError
from jlora._kernel.adapter import Adapter, new_adapter
from jlora._kernel.axes import Dims
from jlora._kernel.dora import column_norm
from jlora._kernel.nodes import Full, LowRank, is_array, is_node, with_origin
from jlora._kernel.placement import placed_adapter
from jlora._kernel.quantized import Quantized, is_abstract
from jlora._paths import Tree, leaves_by_path
from jlora._transform.resolve import bias_of
from jlora._tree import conventions, initializers, options
from jlora._tree.from_kernel import start_from_kernel
from jlora._tree.initializers import FromKernel, Initializer
from jlora._tree.kernel_axes import KernelAxes, kernel_axes
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
from jlora._tree.variant_parts import Projections, check_settings, variant_adapter
from jlora._tree.variants import Variant, VeRA, is_form

if TYPE_CHECKING:
    from jlora._transform.survey import Survey


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
    variant: Variant | None = None,
    trainable_tokens: Mapping[str, Sequence[int]] | None = None,
    init: str | Initializer | FromKernel = "default",
    dtype: jax.typing.DTypeLike = jnp.float32,
    survey: Survey | None = None,
    **unknown: Never,
) -> Tree:
    """Put adapters on the chosen kernels.

    Args:
      params: a tree of arrays, of `jax.ShapeDtypeStruct`s, of sharded arrays, or of
        quantised kernels (`jlora.quantize`). Other leaves, such as activation
        functions, stay as they are.
      rank: r, the adapters' inner dimension, of any integer type.
      targets: which kernels. A list: each entry matches whole path segments (one, or a
        dotted or slashed run of them), or is a role that knows the spellings of the
        common families: `query key value out gate up down`. A string: a regular
        expression for the whole path of the leaf or its module. `"all-linear"`: every
        kernel of a matrix product; `"all-kernels"`: those of convolutions and
        embeddings too. A dict: such entries or expressions, each with its own
        `Target`; the first match wins. Every entry must hit something. An empty list
        adapts no kernel; use it if only `train`, `bias="all"` or `trainable_tokens`
        are to train leaves.
      alpha: the scale is alpha/r; None means alpha = r.
      key: seeds the factors, folded with each leaf's path; None is `jax.random.key(0)`.
      train: entries of leaves to train whole, besides the adapters.
      exclude: entries of leaves that `targets` must not touch.
      bias: train no biases, those of adapted layers (`"lora_only"`), or `"all"`.
      dropout: probability of dropping an input of an adapter, once `with_dropout` has
        given the tree keys.
      rslora: scale by alpha/sqrt(r), Kalajdzievski 2023, arXiv:2312.03732.
      dora: train the length of each output column separately from its direction, Liu
        et al. 2024, arXiv:2402.09353. The kernel's columns are read once per step for
        their norms; dropout acts on the low-rank term only.
      lora_bias: give each adapter a bias of its own, which starts at zero. It is scaled
        by alpha/r too, and needs layers that have a bias.
      variant: another form of the update, `"vera"`, `"loha"`, `"lokr"`, `"adalora"`,
        or one with its settings, `LoKr(...)`. None and `"lora"` are LoRA.
      trainable_tokens: entries of tables `[V, d]` and the rows of each to train as they
        are, `{"shared/embedding": [32100, 32101]}`; the table's other rows stay.
      init: how factors start: `"default"`, `"gaussian"` (embeddings start as PEFT's
        do), or a name or an object of `jlora.init`. Some of these, such as `"pissa"`
        and `"olora"`, subtract their product from the kernels. Starts that need data
        are functions of `jlora.init`.
      dtype: the factors' dtype.
      survey: from `jlora.survey`; makes `"all-linear"` and every kernel's axes exact.
      **unknown: no others are taken; for PEFT's names the error gives jlora's.

    Returns:
      The tree, with a low-rank node in the place of each chosen kernel. Its value is
      unchanged until the adapters are trained. Abstract trees give abstract factors;
      factors of sharded kernels are sharded like them.

    Raises:
      TargetError: an entry hits nothing, or only leaves that are not kernels; a leaf
        has an adapter already.
      ShapeError: a rank that is not within 1..min(in, out), or unknown axes; a kernel
        of which a variant's update has no low-rank form.
      DtypeError: a kernel, or a `dtype`, that is not of floating point.
      StructureError: `lora_bias` for a layer without bias; two leaves with one path.
      OptionError: an unknown argument, or one with a value that is not allowed.
      NonFiniteError: `init` decomposes a kernel that holds NaN or infinity.

    Source: Hu et al. 2021, arXiv:2106.09685.

    >>> tree = lorafy({"q": {"kernel": jnp.ones((4, 6))}}, rank=2, targets=["query"])
    >>> tree["q"]["kernel"]
    LowRank('q/kernel', float32[4, 6], rank 2, scale 1)
    """
    options.refuse_unknown("jlora.lorafy", unknown, _ARGUMENTS)
    options.one_of("bias", bias, ("none", "lora_only", "all"))
    options.flags(rslora=rslora, dora=dora, lora_bias=lora_bias)
    _check_variants(dora, lora_bias)
    shared = _Shared(
        Target(
            rank=options.whole_rank(rank), alpha=alpha,
            dropout=options.probability(dropout), init=init, variant=variant,
        ),
        options.single_key(key), rslora, dora, lora_bias, options.factor_dtype(dtype),
        Projections(),
    )  # fmt: skip
    leaves = leaves_by_path(params, is_leaf=is_node)
    check_survey(survey, leaves)
    arrays = {path: x for path, x in leaves.items() if is_array(x) or is_node(x)}
    if not arrays:
        raise TargetError(
            f"params, a {type(params).__name__}, holds no arrays.\nPass the parameters "
            "themselves: those of a Linen module are model.init(key, x)['params'], "
            "those of an NNX module nnx.split(model, nnx.Param, ...)[1]."
        )
    stacked = conventions.stacked_leaves(arrays) if survey is None else set()
    # Without targets there is something to do where leaves are trained as they are.
    no_kernels = not targets and bool(train or trainable_tokens or bias == "all")
    chosen = {} if no_kernels else choose(targets, leaves, exclude, survey, stacked)
    full = trained(train, bias, leaves, chosen)
    tokens = options.token_lists(trainable_tokens)
    tables = token_rows(tokens, leaves, {*chosen, *full})
    if lora_bias:
        for path in chosen:
            bias_of(path, leaves[path], leaves)

    plans = _plans(chosen, leaves, shared, survey, stacked)

    def place(path: str, leaf: Any) -> Any:
        if path in plans:
            adapters, base = {}, leaf
            for choice, axes in plans[path]:
                name = _adapter_name(choice.hit)
                adapters[name], base = _make_adapter(path, base, choice, axes, shared)
            return LowRank(base, adapters, path)
        if path in tables:
            return make_rows(path, leaf, tables[path], shared.dtype)
        return Full(leaf, path) if path in full else leaf

    structure = jax.tree.structure(params, is_leaf=is_node)
    return with_origin(
        jax.tree.unflatten(structure, [place(*item) for item in leaves.items()])
    )


_ARGUMENTS = [n for n in inspect.signature(lorafy).parameters if n != "unknown"]


def _check_variants(dora: bool, lora_bias: bool) -> None:
    if dora and lora_bias:
        raise OptionError(
            "dora=True and lora_bias=True: PEFT refuses the two together, for DoRA's "
            "norm is of a kernel without bias.\nLeave one out; bias='lora_only' trains "
            "the layers' own biases."
        )


# -- one adapter -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What all adapters of one call have in common; `target` is the default."""

    target: Target
    key: jax.Array
    rslora: bool
    dora: bool
    bias: bool
    dtype: np.dtype
    projections: Projections


def _plans(
    chosen: Mapping[str, list[Choice]], leaves: Mapping[str, Any], shared: _Shared,
    survey: Survey | None, stacked: Collection[str],
) -> dict[str, list[tuple[Choice, KernelAxes]]]:  # fmt: skip
    """The adapters to make, with their kernels' axes; makes room for VeRA's."""
    plans: dict[str, list[tuple[Choice, KernelAxes]]] = {}
    convolutions = set() if survey is None else {*survey.convolutions()}
    for path, choices in chosen.items():
        check_float(path, leaves[path])
        for choice in choices:
            axes = kernel_axes(path, leaves, choice.target, survey, stacked)
            if path in convolutions:
                axes = dataclasses.replace(axes, is_convolution=True)
            plans.setdefault(path, []).append((choice, axes))
            settings = _with_defaults(choice.target, shared.target)
            if isinstance(settings.variant, VeRA):
                _, shape = _part_window(path, leaves[path], choice.hit, axes)
                shared.projections.widen(settings.variant, settings.rank, axes, shape)
    return plans


def _make_adapter(
    path: str, leaf: Any, choice: Choice, axes: KernelAxes, shared: _Shared
) -> tuple[Adapter, Any]:
    """The adapter, and the base that it is on."""
    settings, dtype = _with_defaults(choice.target, shared.target), shared.dtype
    starts, shape = _part_window(path, leaf, choice.hit, axes)
    ins, outs, batch = (
        tuple(shape[d] for d in dims) for dims in (axes.ins, axes.outs, axes.batch)
    )
    name = f"{path}/{choice.hit.role}" if choice.hit.part else path
    own_key = initializers.leaf_key(shared.key, name)
    if is_form(form := settings.variant):
        check_settings(
            path, form, settings.init, settings.alpha, rslora=shared.rslora,
            dora=shared.dora, lora_bias=shared.bias,
        )  # fmt: skip
        return variant_adapter(
            path, leaf, axes, shape, form, settings.rank, settings.alpha, own_key,
            dtype, shared.projections, starts=starts, dropout=settings.dropout,
            role=choice.hit.role,
        ), leaf  # fmt: skip
    rank = _fitting_rank(path, settings.rank, ins, outs)
    alpha = rank if settings.alpha is None else settings.alpha
    scale = alpha / (math.sqrt(rank) if shared.rslora else rank)
    per_output = jax.ShapeDtypeStruct((*batch, *outs), dtype)
    init = initializers.initializer(settings.init, is_embedding=axes.is_embedding)
    of_kernel = isinstance(init, FromKernel)
    adapter = new_adapter(
        jax.ShapeDtypeStruct((*batch, *ins, rank), dtype),
        jax.ShapeDtypeStruct((*batch, rank, *outs), dtype),
        jax.ShapeDtypeStruct(batch, jnp.float32),
        batch=axes.batch, ins=axes.ins, outs=axes.outs, starts=starts,
        magnitude=per_output if shared.dora else None,
        bias=per_output if shared.bias else None,
        dropout=settings.dropout, rslora=shared.rslora, shifted=of_kernel,
        role=choice.hit.role,
    )  # fmt: skip
    abstract = placed_adapter(adapter, leaf)
    if is_abstract(leaf):
        return abstract, leaf
    base, given = leaf, None
    if isinstance(init, FromKernel):
        _refuse_codes(path, leaf, settings.init)
        scaled = dataclasses.replace(adapter, scale=jnp.full(batch, scale, jnp.float32))
        started, base = start_from_kernel(init, own_key, leaf, scaled, path)
        given = started.a, started.b

    def make(key: Any, kernel: Any, given: Any) -> Adapter:
        if isinstance(init, FromKernel):
            a, b = given
        else:
            a, b = init(key, adapter.a.shape, adapter.b.shape, math.prod(ins), dtype)
        _check_factors(path, (a, b), adapter)
        made = dataclasses.replace(
            adapter, a=a, b=b, scale=jnp.full(batch, scale, jnp.float32)
        )
        if shared.bias:
            made = dataclasses.replace(made, bias=jnp.zeros(per_output.shape, dtype))
        if not shared.dora:
            return made
        length = column_norm(kernel, made).astype(dtype)  # so that W' begins as W
        return dataclasses.replace(made, magnitude=length)

    kernel = base if shared.dora else None
    if abstract.a.sharding is None:
        return make(own_key, kernel, given), base
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    placed = jax.jit(make, out_shardings=shardings)
    return placed(own_key, kernel, given), base


def _refuse_codes(path: str, leaf: Any, init: Any) -> None:
    if isinstance(leaf, Quantized):
        raise OptionError(
            f"init={init!r} takes its product out of the kernel, and the codes of "
            f"{path!r}, {leaf.layout.form}, cannot hold the rest.\nGive lorafy the "
            "dense parameters, then call jlora.quantize on what it returns."
        )


def _with_defaults(own: Target, default: Target) -> Target:
    """A target's settings, those it leaves open from the default."""
    names = ("rank", "alpha", "dropout", "init", "variant")
    given = {n: getattr(own, n) for n in names if getattr(own, n) is not None}
    return dataclasses.replace(default, **given)


def _check_factors(path: str, made: Any, wanted: Adapter) -> None:
    """Refuse what an initialiser of the user's makes, if it is not as asked."""
    kinds = [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in made]
    asked = [f"{x.dtype}{list(x.shape)}" for x in (wanted.a, wanted.b)]
    if kinds != asked:
        raise ShapeError(
            f"init for {path!r} made {kinds}, and was asked for {asked}.\nReturn "
            "(a, b) of the two shapes and the dtype that the function is given."
        )


def _part_window(
    path: str, leaf: Any, hit: Hit, axes: KernelAxes
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


def _fitting_rank(path: str, rank: Any, ins: Dims, outs: Dims) -> int:
    most = min(math.prod(ins), math.prod(outs))
    if not 1 <= rank <= most:
        raise ShapeError(
            f"rank={rank} for the kernel {path!r}, which maps {math.prod(ins)} inputs "
            f"to {math.prod(outs)} outputs.\nPass a whole number from 1 to {most}; "
            "give small kernels their own by targets={pattern: jlora.Target(rank=...)}."
        )
    return rank
