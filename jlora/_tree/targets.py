"""Which leaves `lorafy` adapts or trains: entries, roles, coverage."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jlora._errors import (
    DtypeError,
    JloraWarning,
    OptionError,
    ShapeError,
    TargetError,
)
from jlora._kernel.axes import Dims
from jlora._kernel.nodes import LowRank, is_array, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import BIAS_NAMES, module_of, name_of
from jlora._text import count
from jlora._tree import conventions, matching, options
from jlora._tree.initializers import FromKernel, Initializer
from jlora._tree.matching import Coverage, Hit, coverage
from jlora._tree.variants import Variant, variant_of

if TYPE_CHECKING:
    from jlora._transform.survey import Survey

Bias = Literal["none", "lora_only", "all"]
Leaves = Mapping[str, Any]

ALL_LINEAR, ALL_KERNELS = "all-linear", "all-kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Settings of one target; None takes what `lorafy` was given.

    Attributes:
      rank: r.
      alpha: the scale's numerator.
      dropout: probability of dropping an input of the adapter.
      init: a name, `"default"`, `"gaussian"`, `"embedding"` or one of `jlora.init`; an
        object of that; or a function `(key, a_shape, b_shape, fan_in, dtype) -> (a,
        b)`.
      variant: the update's form, as `lorafy` takes it; `"lora"` where others have one.
      in_axes, out_axes, batch_axes: the kernel's axes, where neither a survey nor the
        naming conventions tell them. Give `in_axes` and the rest follow: axes named
        nowhere are outputs.

    Raises:
      ShapeError: a rank that is no whole number.
      OptionError: another setting that cannot be, or an argument of another name.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    init: str | Initializer | FromKernel | None = None
    variant: Variant | None = None
    in_axes: Dims | None = None
    out_axes: Dims | None = None
    batch_axes: Dims = ()

    def __new__(cls, **settings: Any) -> Target:
        """Refuse arguments of other names, PEFT's among them, in our words."""
        known = [f.name for f in dataclasses.fields(cls)]
        options.refuse_unknown("jlora.Target", settings, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the settings, and hold them as Python's numbers."""
        for name, check in _SETTINGS.items():
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, check(given))


_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "rank": options.whole_rank,
    "alpha": options.positive_alpha,
    "dropout": options.probability,
    "variant": variant_of,
    "in_axes": functools.partial(options.axis_tuple, "in_axes"),
    "out_axes": functools.partial(options.axis_tuple, "out_axes"),
    "batch_axes": functools.partial(options.axis_tuple, "batch_axes"),
}

Targets = str | Collection[str] | Mapping[str, Target]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One adapter to make: on which leaf, by which entry, with which settings."""

    hit: Hit
    target: Target


def check_survey(survey: Survey | None, leaves: Leaves) -> None:
    """A survey of another tree would leave the axes to the naming conventions.

    Raises:
      OptionError: it is no survey.
      TargetError: it is one of another tree.
    """
    if survey is None:
        return
    if not hasattr(survey, "knows"):
        raise OptionError(
            f"survey={type(survey).__name__}: expected what jlora.survey(fn, params, "
            "*inputs) returns."
        )
    arrays = [path for path, leaf in leaves.items() if _is_parameter(leaf)]
    unknown = [path for path in arrays if not survey.knows(path)]
    if unknown:
        raise TargetError(
            f"the survey does not know {len(unknown)} of {len(arrays)} arrays, "
            f"{unknown[0]!r} first; it knows {next(iter(survey.leaves), None)!r}.\n"
            "Survey the very tree that you lorafy: survey(fn, params, ...) and "
            "lorafy(params, ...); wrap fn if it takes {'params': params}."
        )


def choose(
    targets: Targets, leaves: Leaves, exclude: Sequence[str], survey: Survey | None,
    stacked: Collection[str],
) -> dict[str, list[Choice]]:  # fmt: skip
    """The adapters to make, by leaf."""
    excluded = matches(exclude, leaves, "exclude")
    chosen: dict[str, list[Choice]] = {}
    reports: list[str] = []
    # Numbers inside a stacked block count its parts, and not the repeated blocks.
    arrays = (path for path, leaf in leaves.items() if _is_parameter(leaf))
    numbered = [path for path in arrays if path not in stacked]
    entries = list(_entry_hits(targets, leaves, survey, stacked))
    for entry, target, hits in entries:
        kernels = _kernels_of(entry, hits, leaves, survey, stacked)
        # What is excluded was meant to be missed, so it counts as covered.
        hit_paths = [h.path for h in kernels if h.path not in stacked]
        reports += map(_coverage_message, coverage(entry, hit_paths, numbered))
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
                others.append(Choice(hit, target))
    if survey is not None and ALL_LINEAR in (entry for entry, _, _ in entries):
        reports += _convolution_messages(survey, {*chosen, *excluded})
    for report in reports:
        warnings.warn(f"targets: {report}", JloraWarning, stacklevel=3)
    return chosen


def kernels(
    targets: Targets, leaves: Leaves, exclude: Sequence[str], survey: Survey | None,
    stacked: Collection[str],
) -> dict[str, Target]:  # fmt: skip
    """The kernels that targets mean, each with the settings of the first that hits.

    Raises:
      TargetError: an entry hits nothing, or only leaves that are no kernels.
    """
    excluded = matches(exclude, leaves, "exclude")
    found: dict[str, Target] = {}
    for entry, target, hits in _entry_hits(targets, leaves, survey, stacked):
        for hit in _kernels_of(entry, hits, leaves, survey, stacked):
            if hit.path not in excluded:
                found.setdefault(hit.path, target)
    return found


def _coverage_message(found: Coverage) -> str:
    return (
        f"{found}. If that is meant, name the blocks in the entry; the missed ones "
        "train nothing."
    )


def _convolution_messages(survey: Survey, meant: Collection[str]) -> list[str]:
    """That `"all-linear"` leaves convolutions out, where it does."""
    left = [path for path in survey.convolutions() if path not in meant]
    if not left:
        return []
    named = ", ".join(f"{p!r} {survey.leaves[p].shape}" for p in left[:4])
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    return [
        f"{ALL_LINEAR!r} is every kernel of a matrix product, and leaves out "
        f"{len(left)} of convolutions: {named}{more}. {ALL_KERNELS!r} adapts them too; "
        "exclude=[...] says that they are meant to be left out."
    ]


def _entry_hits(
    targets: Targets, leaves: Leaves, survey: Survey | None, stacked: Collection[str]
) -> Iterable[tuple[str, Target, list[Hit]]]:
    """Each entry of `targets` with its settings and its hits, checked to be some."""
    entries, match = _entries(targets)
    for entry, target in entries:
        if entry in (ALL_LINEAR, ALL_KERNELS):
            hits = [Hit(path) for path in _all(entry, leaves, survey, stacked)]
        else:
            hits = [h for path in leaves if (h := match(entry, path)) is not None]
        if not hits:
            raise TargetError(_nothing_hit("targets", entry, leaves))
        yield entry, target, hits


def _entries(
    targets: Any,
) -> tuple[list[tuple[str, Target]], Callable[[str, str], Hit | None]]:
    """The entries with their settings, and how each of them is matched."""
    if isinstance(targets, str) and targets:
        return [(targets, Target())], matching.match_regex
    if isinstance(targets, Mapping):
        for entry, target in targets.items():
            if not isinstance(target, Target):
                raise TargetError(
                    f"targets: {entry!r} has {target!r}; expected its settings, "
                    "jlora.Target(rank=...)."
                )
        names = options.entry_list("targets", list(targets))
        entries = [(name, targets[name]) for name in names]
    else:
        names = [] if targets == "" else options.entry_list("targets", targets)
        entries = [(name, Target()) for name in names]
    if not entries:
        raise TargetError(
            f"targets={targets!r} names no kernel.\nPass names, ['query', 'value'], or "
            f"{ALL_LINEAR!r} for every kernel of a matrix product."
        )
    by_pattern = isinstance(targets, Mapping)
    return entries, matching.match_pattern if by_pattern else matching.match_entry


def _all(
    word: str, leaves: Leaves, survey: Survey | None, stacked: Collection[str]
) -> list[str]:
    """The kernels that `"all-linear"` or `"all-kernels"` means."""
    if survey is not None:
        return survey.matmul_kernels() if word == ALL_LINEAR else survey.kernels()
    names = {*conventions.KERNEL_NAMES}
    if word == ALL_LINEAR:
        names -= {*conventions.EMBEDDING_NAMES}
    named = [path for path in leaves if name_of(path) in names]
    return [p for p in named if len(_shape(leaves[p])) - (p in stacked) > 1]


def _kernels_of(
    entry: str, hits: list[Hit], leaves: Leaves, survey: Survey | None,
    stacked: Collection[str],
) -> list[Hit]:  # fmt: skip
    """The hits that can carry an adapter."""

    def is_kernel(hit: Hit) -> bool:
        if not _is_parameter(leaves[hit.path]):
            return False
        if survey is not None:
            return survey.is_kernel(hit.path)
        ndim = len(_shape(leaves[hit.path])) - (hit.path in stacked)
        named = hit.whole or name_of(hit.path) in conventions.KERNEL_NAMES
        return (named and ndim > 1) or conventions.is_experts(hit.path, ndim)

    kernels = [hit for hit in hits if is_kernel(hit)]
    if kernels:
        return kernels
    shown = ", ".join(f"{h.path} {_kind(leaves[h.path])}" for h in hits[:4])
    raise TargetError(
        f"targets: {entry!r} hits no kernel, only {shown}.\nAdapters go on arrays that "
        "are contracted with an input. To train a leaf as it is, name it in "
        "train=[...]; a kernel under an unusual name needs its whole path, or a survey."
    )


def _nothing_hit(argument: str, entry: str, leaves: Leaves) -> str:
    arrays = [path for path, leaf in leaves.items() if _is_parameter(leaf)]
    tree = f"this tree of {count(len(arrays), 'array')}"
    if entry in (ALL_LINEAR, ALL_KERNELS):
        return (
            f"{argument}: {entry!r} finds no kernel in {tree}.\nWithout a survey "
            f"kernels are known by their names, {', '.join(conventions.KERNEL_NAMES)}; "
            "jlora.survey(fn, params, *inputs) finds the others."
        )
    if any(matching.match_entry(entry, path) for path in arrays):
        return (
            f"{argument}={entry!r} is a regular expression for the whole path, and "
            f"matches none in {tree}.\nPass a list to match names: "
            f"{argument}=[{entry!r}]."
        )
    likely = matching.likely_names(entry, arrays)
    meant = f"; did you mean {' or '.join(map(repr, likely))}?" if likely else "."
    near = "\n".join(f"  {path}" for path in matching.nearest(entry, arrays))
    return (
        f"{argument}: {entry!r} hits nothing in {tree}{meant}\n"
        f"The nearest paths:\n{near}\nAn entry of a list matches whole path "
        "segments; a plain string is a regular expression for the whole path."
    )


def matches(entries: Sequence[str], leaves: Leaves, argument: str) -> set[str]:
    """The leaves that a list of entries hits; each entry must hit something."""
    found: set[str] = set()
    for entry in options.entry_list(argument, entries):
        hits = {p for p in leaves if matching.match_pattern(entry, p) is not None}
        if not hits:
            raise TargetError(_nothing_hit(argument, entry, leaves))
        found |= hits
    return found


def trained(
    train: Sequence[str], bias: Bias, leaves: Leaves,
    chosen: Mapping[str, Any],
) -> set[str]:  # fmt: skip
    """The leaves to train as they are.

    What an entry sweeps along and nobody trains, functions and counters beside the
    kernels of a module say, stays as it is.
    """
    full: set[str] = set()
    for entry in options.entry_list("train", train):
        hits = matches([entry], leaves, "train")
        weights = {path for path in hits if _is_weight(leaves[path])}
        full |= weights or hits
    both = sorted(full & set(chosen))
    if both:
        raise TargetError(
            f"{both[0]!r} is both a target and in train.\nA leaf is adapted or trained "
            "as it is; take it out of one (exclude=[...] takes it out of targets)."
        )
    if bias != "none":
        adapted = {module_of(path) for path in chosen}
        biases = {
            p for p, leaf in leaves.items()
            if name_of(p) in BIAS_NAMES and _is_parameter(leaf)
            and (bias == "all" or module_of(p) in adapted)
        }  # fmt: skip
        if not biases:
            raise TargetError(f"bias={bias!r}, but the layers in question have none.")
        full |= biases
    for path in full:
        check_float(path, leaves[path])
        _refuse_codes(path, leaves[path])
    return full


def _refuse_codes(path: str, leaf: Any) -> None:
    if isinstance(leaf, Quantized):
        raise DtypeError(
            f"train: {path!r} is {leaf.layout.form} of {leaf.dtype}{list(leaf.shape)}, "
            "and codes cannot be trained.\nMake it dense, jlora.dequantize(params); "
            "leave it out of jlora.quantize; or give it an adapter."
        )


def check_float(path: str, leaf: Any) -> None:
    """Refuse a leaf that can be neither adapted nor trained."""
    if not _is_parameter(leaf):
        raise DtypeError(
            f"the leaf {path!r} is {_kind(leaf)} and no array; it can be neither "
            "adapted nor trained.\nTake it out of targets or train; a number is "
            "trained as an array, jnp.asarray(...)."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise DtypeError(
            f"the leaf {path!r} {_shape(leaf)} is {leaf.dtype}; only floating-point "
            "leaves can be adapted or trained.\nTake it out of targets or train."
        )
    if 0 in leaf.shape:
        raise ShapeError(f"the leaf {path!r} {_shape(leaf)} is empty.")


def _is_parameter(leaf: Any) -> bool:
    """Whether it is an array, plain or in one of jlora's nodes."""
    return is_array(leaf) or is_node(leaf)


def _is_weight(leaf: Any) -> bool:
    """Whether somebody may want to train it: no key, counter or setting."""
    if not _is_parameter(leaf):
        return False
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return not is_key and (leaf.shape or jnp.issubdtype(leaf.dtype, jnp.floating))


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _kind(leaf: Any) -> str:
    """A leaf's shape, or what else it is."""
    return str(_shape(leaf)) if _is_parameter(leaf) else f"a {type(leaf).__name__}"
