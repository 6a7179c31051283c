"""`lorafy(params)`: put low-rank nodes on the chosen kernels of a parameter tree."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jlora import _init, _paths
from jlora._errors import DtypeError, JloraWarning, ShapeError, TargetError
from jlora._lowrank import Adapter, Dims, Full, LowRank, is_node, new_adapter
from jlora._paths import Coverage, Hit, path_str
from jlora._rules.layout import factor_spec

if TYPE_CHECKING:
    from jlora._survey import Survey

Tree = Any
Bias = Literal["none", "lora_only", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Settings of one target; None takes what `lorafy` was given.

    Attributes:
      rank: r.
      alpha: the scale's numerator.
      dropout: probability of dropping an input of the adapter.
      init: `"default"`, `"gaussian"`, `"embedding"`, or a function
        `(key, a_shape, b_shape, fan_in, dtype) -> (a, b)`.
      in_axes, out_axes, batch_axes: the kernel's axes, where neither a survey nor the
        naming conventions tell them. Give `in_axes` and the rest follow: axes named
        nowhere are outputs.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    init: str | _init.Initializer | None = None
    in_axes: Dims | None = None
    out_axes: Dims | None = None
    batch_axes: Dims = ()


Targets = str | Sequence[str] | Mapping[str, Target]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One adapter to make: on which leaf, by which entry, with which settings."""

    hit: Hit
    target: Target


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
    init: str | _init.Initializer = "default",
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

    Source: Hu et al. 2021, arXiv:2106.09685.

    >>> tree = lorafy({"q": {"kernel": jnp.ones((4, 6))}}, rank=2, targets=["query"])
    >>> tree["q"]["kernel"]
    LowRank('q/kernel', float32[4, 6], rank 2, scale 1)
    """
    base_target = Target(rank=rank, alpha=alpha, dropout=dropout, init=init)
    leaves = {
        path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    }
    _check_settings(dropout, bias)
    _check_survey(survey, leaves)
    excluded = _matches(exclude, leaves, "exclude")
    chosen = _choose(targets, leaves, excluded, survey)
    full = _trained(train, bias, leaves, chosen)
    key = jax.random.key(0) if key is None else key

    def place(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        if name in chosen:
            adapters = {
                _adapter_name(c.hit): _make_adapter(
                    name, leaf, c, base_target, key, rslora, dtype, survey
                )
                for c in chosen[name]
            }
            return LowRank(leaf, adapters, name)
        return Full(leaf) if name in full else leaf

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_node)


def _check_settings(dropout: float, bias: str) -> None:
    if not 0 <= dropout < 1:
        raise ShapeError(f"dropout={dropout}; it is a probability, in [0, 1).")
    if bias not in ("none", "lora_only", "all"):
        raise TargetError(f"bias={bias!r}; it is 'none', 'lora_only' or 'all'.")


def _check_survey(survey: Survey | None, leaves: Mapping[str, Any]) -> None:
    """A survey of another tree would leave the axes to the naming conventions."""
    if survey is None:
        return
    unknown = [p for p in leaves if not survey.knows(p)]
    if unknown:
        raise TargetError(
            f"the survey does not know {len(unknown)} of {len(leaves)} leaves, "
            f"{unknown[0]!r} first; it knows {next(iter(survey.leaves), None)!r}.\n"
            "Survey the very tree that you lorafy: survey(fn, params, ...) and "
            "lorafy(params, ...); wrap fn if it takes {'params': params}."
        )


# -- which leaves ----------------------------------------------------------------------


def _choose(
    targets: Targets, leaves: Mapping[str, Any], excluded: set[str], survey: Any
) -> dict[str, list[_Choice]]:
    """The adapters to make, by leaf."""
    chosen: dict[str, list[_Choice]] = {}
    reports: list[Coverage] = []
    for entry, target, hits in _entry_hits(targets, leaves, survey):
        kernels = _kernels_of(entry, hits, leaves, survey)
        # What is excluded was meant to be missed, so it counts as covered.
        reports += _paths.coverage(entry, [h.path for h in kernels], list(leaves))
        kernels = [hit for hit in kernels if hit.path not in excluded]
        if not kernels:
            raise TargetError(
                f"targets: everything that {entry!r} hits is in exclude.\nTake one of "
                "the two out."
            )
        for hit in kernels:
            if isinstance(leaves[hit.path], LowRank):
                raise TargetError(
                    f"the kernel {hit.path!r} has an adapter already.\nLorafy the "
                    "plain parameters, or fold the adapter in first: "
                    "jlora.merge(params)."
                )
            others = chosen.setdefault(hit.path, [])
            if not any(c.hit.part == hit.part or c.hit.part is None for c in others):
                others.append(_Choice(hit, target))
    for report in reports:
        warnings.warn(
            f"targets: {report}. If that is meant, name the blocks in the entry; the "
            "missed ones train nothing.",
            JloraWarning,
            stacklevel=3,
        )
    return chosen


def _entry_hits(
    targets: Targets, leaves: Mapping[str, Any], survey: Any
) -> Iterable[tuple[str, Target, list[Hit]]]:
    """Each entry of `targets` with its settings and its hits, checked to be some."""
    all_linear = set(_all_linear(leaves, survey)) if targets == "all-linear" else set()
    match: Callable[[str, str], Hit | None]
    entries: Iterable[tuple[str, Target]]
    if isinstance(targets, str):
        entries, match = [(targets, Target())], _paths.match_regex
        if targets == "all-linear":
            match = lambda _, path: Hit(path) if path in all_linear else None  # noqa: E731
    elif isinstance(targets, Mapping):
        entries, match = targets.items(), _paths.match_pattern
    else:
        entries, match = [(entry, Target()) for entry in targets], _paths.match_entry
    for entry, target in entries:
        hits = [h for path in leaves if (h := match(entry, path)) is not None]
        if not hits:
            raise TargetError(_nothing_hit("targets", entry, leaves))
        yield entry, target, hits


def _all_linear(leaves: Mapping[str, Any], survey: Any) -> list[str]:
    if survey is not None:
        return survey.matmul_kernels()
    names = [n for n in _paths.KERNEL_NAMES if n not in _paths.EMBEDDING_NAMES]
    return [p for p in leaves if p.rpartition("/")[2] in names and _ndim(leaves[p]) > 1]


def _kernels_of(
    entry: str, hits: list[Hit], leaves: Mapping[str, Any], survey: Any
) -> list[Hit]:
    """The hits that can carry an adapter."""

    def is_kernel(hit: Hit) -> bool:
        if survey is not None:
            return survey.is_kernel(hit.path)
        named = hit.whole or hit.path.rpartition("/")[2] in _paths.KERNEL_NAMES
        return named and _ndim(leaves[hit.path]) > 1

    kernels = [hit for hit in hits if is_kernel(hit)]
    if kernels:
        return kernels
    shown = ", ".join(f"{h.path} {_shape(leaves[h.path])}" for h in hits[:4])
    raise TargetError(
        f"targets: {entry!r} hits no kernel, only {shown}.\nAdapters go on arrays that "
        "are contracted with an input. To train a leaf as it is, name it in "
        "train=[...]; a kernel under an unusual name needs its whole path, or a survey."
    )


def _nothing_hit(argument: str, entry: str, leaves: Mapping[str, Any]) -> str:
    near = "\n".join(f"  {path}" for path in _paths.nearest(entry, leaves))
    return (
        f"{argument}: {entry!r} hits nothing in this tree of {len(leaves)} leaves.\n"
        f"The nearest paths:\n{near}\nAn entry of a list matches whole path segments; "
        "a plain string is a regular expression for the whole path."
    )


def _matches(
    entries: Sequence[str], leaves: Mapping[str, Any], argument: str
) -> set[str]:
    """The leaves that a list of entries hits; each entry must hit something."""
    if isinstance(entries, str):
        raise TargetError(f"{argument}={entries!r}: pass a list, [{entries!r}].")
    found: set[str] = set()
    for entry in entries:
        hits = {p for p in leaves if _paths.match_pattern(entry, p) is not None}
        if not hits:
            raise TargetError(_nothing_hit(argument, entry, leaves))
        found |= hits
    return found


def _trained(
    train: Sequence[str], bias: Bias, leaves: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> set[str]:  # fmt: skip
    """The leaves to train as they are."""
    full = _matches(train, leaves, "train")
    both = sorted(full & set(chosen))
    if both:
        raise TargetError(
            f"{both[0]!r} is both a target and in train.\nA leaf is adapted or trained "
            "as it is; take it out of one (exclude=[...] takes it out of targets)."
        )
    if bias != "none":
        adapted = {_paths.module_of(path) for path in chosen}
        biases = {
            p for p in leaves
            if p.rpartition("/")[2] in ("bias", "b")
            and (bias == "all" or _paths.module_of(p) in adapted)
        }  # fmt: skip
        if not biases:
            raise TargetError(f"bias={bias!r}, but the layers in question have none.")
        full |= biases
    for path in full:
        _check_float(path, leaves[path])
    return full


# -- one adapter -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Axes:
    """A kernel's axes by what they do."""

    ins: Dims
    outs: Dims
    batch: Dims
    embedding: bool = False


def _make_adapter(
    path: str, leaf: Any, choice: _Choice, base: Target, key: Any, rslora: bool,
    dtype: Any, survey: Any,
) -> Adapter:  # fmt: skip
    _check_float(path, leaf)
    axes = _axes(path, leaf, choice.target, survey)
    settings = _merged_target(choice.target, base)
    starts, shape = _part_window(path, leaf, choice.hit, axes)
    ins, outs, batch = (
        tuple(shape[d] for d in dims) for dims in (axes.ins, axes.outs, axes.batch)
    )
    rank = _check_rank(path, settings.rank, ins, outs)
    alpha = rank if settings.alpha is None else settings.alpha
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    init = _initializer(settings.init, axes)
    name = f"{path}/{choice.hit.role}" if choice.hit.part else path
    own_key = _init.leaf_key(key, name)
    adapter = new_adapter(
        jax.ShapeDtypeStruct((*batch, *ins, rank), dtype),
        jax.ShapeDtypeStruct((*batch, rank, *outs), dtype),
        jax.ShapeDtypeStruct(batch, jnp.float32),
        batch=axes.batch, ins=axes.ins, outs=axes.outs, starts=starts,
        dropout=settings.dropout, rslora=rslora, role=choice.hit.role,
    )  # fmt: skip
    abstract = _with_shardings(adapter, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return abstract

    def make(key: Any) -> Adapter:
        a, b = init(key, adapter.a.shape, adapter.b.shape, math.prod(ins), dtype)
        return dataclasses.replace(
            adapter, a=a, b=b, scale=jnp.full(batch, scale, jnp.float32)
        )

    if abstract.a.sharding is None:
        return make(own_key)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(make, out_shardings=shardings)(own_key)


def _merged_target(own: Target, base: Target) -> Target:
    names = ("rank", "alpha", "dropout", "init")
    given = {n: getattr(own, n) for n in names if getattr(own, n) is not None}
    return dataclasses.replace(base, **given)


def _initializer(init: Any, axes: _Axes) -> _init.Initializer:
    if callable(init):
        return init
    if init not in _init.INITIALIZERS:
        raise TargetError(
            f"init={init!r}; it is one of {sorted(_init.INITIALIZERS)} or a function "
            "(key, a_shape, b_shape, fan_in, dtype) -> (a, b)."
        )
    return _init.INITIALIZERS["embedding" if axes.embedding else init]


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
        if name in _paths.EMBEDDING_NAMES:
            return _Axes((0,), (1,), (), embedding=True)
        return _Axes((1,), (0,), ()) if name == "weight" else _Axes((0,), (1,), ())
    if ndim == 3 and name == "kernel" and owner in ("query", "key", "value"):
        return _Axes((0,), (1, 2), ())
    if ndim == 3 and name == "kernel" and owner == "out":
        return _Axes((0, 1), (2,), ())
    raise ShapeError(
        f"the kernel {path!r} {tuple(leaf.shape)} has {ndim} axes, and its name does "
        "not tell which are inputs.\nLet jlora find out, lorafy(params, "
        "survey=jlora.survey(fn, params, *args)), or say it: targets={"
        f"{path!r}: jlora.Target(in_axes=(...), out_axes=(...), batch_axes=(...))}}."
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


def _with_shardings(adapter: Adapter, leaf: Any) -> Adapter:
    """The abstract adapter, sharded along with a kernel on a named mesh."""
    sharding = (
        None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    )
    if not isinstance(sharding, NamedSharding):
        return adapter

    def one(x: Any, dims: Dims) -> tuple[Any, Dims]:
        spec = factor_spec(sharding.spec, dims)
        placed = NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), dims

    return adapter.map(one)


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


def _check_float(path: str, leaf: Any) -> None:
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        kind = getattr(leaf, "dtype", type(leaf).__name__)
        raise DtypeError(
            f"the leaf {path!r} {_shape(leaf)} is {kind}; only floating-point leaves "
            "can be adapted or trained.\nTake it out of targets or train."
        )
    if 0 in leaf.shape:
        raise ShapeError(f"the leaf {path!r} {_shape(leaf)} is empty.")


def _ndim(leaf: Any) -> int:
    return len(getattr(leaf, "shape", ()))


def _shape(leaf: Any) -> str:
    return str(tuple(getattr(leaf, "shape", ())))
