"""Which leaves `lorafy` adapts or trains: entries, roles, coverage."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from jlora._errors import DtypeError, JloraWarning, ShapeError, TargetError
from jlora._kernel.axes import Dims
from jlora._kernel.nodes import LowRank
from jlora._paths import BIAS_NAMES, module_of
from jlora._tree import conventions, matching
from jlora._tree.initializers import Initializer
from jlora._tree.matching import Coverage, Hit

if TYPE_CHECKING:
    from jlora._transform.survey import Survey

Bias = Literal["none", "lora_only", "all"]
Leaves = Mapping[str, Any]


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
    init: str | Initializer | None = None
    in_axes: Dims | None = None
    out_axes: Dims | None = None
    batch_axes: Dims = ()


Targets = str | Sequence[str] | Mapping[str, Target]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One adapter to make: on which leaf, by which entry, with which settings."""

    hit: Hit
    target: Target


def check_survey(survey: Survey | None, leaves: Leaves) -> None:
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


def choose(
    targets: Targets, leaves: Leaves, exclude: Sequence[str], survey: Any
) -> dict[str, list[Choice]]:
    """The adapters to make, by leaf."""
    excluded = matches(exclude, leaves, "exclude")
    chosen: dict[str, list[Choice]] = {}
    reports: list[Coverage] = []
    stacked = conventions.stacked_leaves(leaves)
    # Numbers inside a stacked block count its parts, and not the repeated blocks.
    numbered = [path for path in leaves if path not in stacked]
    for entry, target, hits in _entry_hits(targets, leaves, survey, stacked):
        kernels = _kernels_of(entry, hits, leaves, survey, stacked)
        # What is excluded was meant to be missed, so it counts as covered.
        hit_paths = [h.path for h in kernels if h.path not in stacked]
        reports += matching.coverage(entry, hit_paths, numbered)
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
                own = target
                if survey is None and hit.path in stacked:
                    own = conventions.with_axes(target, leaves[hit.path])
                others.append(Choice(hit, own))
    for report in reports:
        warnings.warn(
            f"targets: {report}. If that is meant, name the blocks in the entry; the "
            "missed ones train nothing.",
            JloraWarning,
            stacklevel=3,
        )
    return chosen


def _entry_hits(
    targets: Targets, leaves: Leaves, survey: Any, stacked: set[str]
) -> Iterable[tuple[str, Target, list[Hit]]]:
    """Each entry of `targets` with its settings and its hits, checked to be some."""
    all_linear: set[str] = set()
    if targets == "all-linear":
        all_linear.update(_all_linear(leaves, survey, stacked))
    match: Callable[[str, str], Hit | None]
    entries: Iterable[tuple[str, Target]]
    if isinstance(targets, str):
        entries, match = [(targets, Target())], matching.match_regex
        if targets == "all-linear":
            match = lambda _, path: Hit(path) if path in all_linear else None  # noqa: E731
    elif isinstance(targets, Mapping):
        entries, match = targets.items(), matching.match_pattern
    else:
        entries, match = [(entry, Target()) for entry in targets], matching.match_entry
    for entry, target in entries:
        hits = [h for path in leaves if (h := match(entry, path)) is not None]
        if not hits:
            raise TargetError(_nothing_hit("targets", entry, leaves))
        yield entry, target, hits


def _all_linear(leaves: Leaves, survey: Any, stacked: set[str]) -> list[str]:
    if survey is not None:
        return survey.matmul_kernels()
    names = [
        n for n in conventions.KERNEL_NAMES if n not in conventions.EMBEDDING_NAMES
    ]
    named = [p for p in leaves if p.rpartition("/")[2] in names]
    return [p for p in named if _ndim(leaves[p]) - (p in stacked) > 1]


def _kernels_of(
    entry: str, hits: list[Hit], leaves: Leaves, survey: Any, stacked: set[str]
) -> list[Hit]:
    """The hits that can carry an adapter."""

    def is_kernel(hit: Hit) -> bool:
        if survey is not None:
            return survey.is_kernel(hit.path)
        ndim = _ndim(leaves[hit.path]) - (hit.path in stacked)
        named = hit.whole or hit.path.rpartition("/")[2] in conventions.KERNEL_NAMES
        return (named and ndim > 1) or conventions.is_experts(hit.path, ndim)

    kernels = [hit for hit in hits if is_kernel(hit)]
    if kernels:
        return kernels
    shown = ", ".join(f"{h.path} {_shape(leaves[h.path])}" for h in hits[:4])
    raise TargetError(
        f"targets: {entry!r} hits no kernel, only {shown}.\nAdapters go on arrays that "
        "are contracted with an input. To train a leaf as it is, name it in "
        "train=[...]; a kernel under an unusual name needs its whole path, or a survey."
    )


def _nothing_hit(argument: str, entry: str, leaves: Leaves) -> str:
    near = "\n".join(f"  {path}" for path in matching.nearest(entry, leaves))
    return (
        f"{argument}: {entry!r} hits nothing in this tree of {len(leaves)} leaves.\n"
        f"The nearest paths:\n{near}\nAn entry of a list matches whole path segments; "
        "a plain string is a regular expression for the whole path."
    )


def matches(entries: Sequence[str], leaves: Leaves, argument: str) -> set[str]:
    """The leaves that a list of entries hits; each entry must hit something."""
    if isinstance(entries, str):
        raise TargetError(f"{argument}={entries!r}: pass a list, [{entries!r}].")
    found: set[str] = set()
    for entry in entries:
        hits = {p for p in leaves if matching.match_pattern(entry, p) is not None}
        if not hits:
            raise TargetError(_nothing_hit(argument, entry, leaves))
        found |= hits
    return found


def trained(
    train: Sequence[str], bias: Bias, leaves: Leaves,
    chosen: Mapping[str, Any],
) -> set[str]:  # fmt: skip
    """The leaves to train as they are."""
    full = matches(train, leaves, "train")
    both = sorted(full & set(chosen))
    if both:
        raise TargetError(
            f"{both[0]!r} is both a target and in train.\nA leaf is adapted or trained "
            "as it is; take it out of one (exclude=[...] takes it out of targets)."
        )
    if bias != "none":
        adapted = {module_of(path) for path in chosen}
        biases = {
            p for p in leaves
            if p.rpartition("/")[2] in BIAS_NAMES
            and (bias == "all" or module_of(p) in adapted)
        }  # fmt: skip
        if not biases:
            raise TargetError(f"bias={bias!r}, but the layers in question have none.")
        full |= biases
    for path in full:
        check_float(path, leaves[path])
    return full


def check_float(path: str, leaf: Any) -> None:
    """Refuse a leaf that can be neither adapted nor trained."""
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
