"""From the command line to cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks._cases import MODEL_FIELDS, SHAPES, Case, case

# A shape, a rank, and targets (`None` is query and value).
Default = tuple[str, int, Sequence[str] | None]


def cases(options: Any, cpu: Sequence[Default], gpu: Sequence[Default]) -> list[Case]:
    """Return what was asked for: the defaults, or every combination of what is given.

    Where `--rank` or `--targets` stand without `--shape`, they go for each shape of
    the defaults.
    """
    defaults = gpu if options.gpu else cpu
    grid: Any = defaults
    if options.shape or options.rank or options.targets:
        shapes = options.shape or dict.fromkeys(shape for shape, _, _ in defaults)
        grid = itertools.product(shapes, options.rank or [8], options.targets or [None])
    return [
        case(
            shape,
            rank=rank,
            targets=targets,
            quick=options.quick,
            batch=options.batch,
            source=options.length,
            target=options.target_length,
            dtype=options.dtype,
            model_fields=model_fields(options, shape),
        )
        for shape, rank, targets in grid
    ]


def model_fields(options: Any, shape: str) -> dict[str, Any]:
    """Return the fields of our Flax modules that the command line sets.

    On a GPU attention is cuDNN's where nothing else is said, as PyTorch's peers have
    a fused one there.
    """
    given = {name: getattr(options, name) for name in MODEL_FIELDS}
    narrow = (options.dtype or SHAPES[shape].dtype) != "float32"
    if options.gpu and not options.dry and narrow:
        given["attn_implementation"] = given["attn_implementation"] or "cudnn"
    # The modules' own default is not worth a word in a title.
    return {k: v for k, v in given.items() if v and v != "einsum"}


def contenders(options: Any, known: Sequence[str]) -> list[str]:
    """Return what `--contenders` says, or all that a command knows."""
    names = list(options.contenders or known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(
            f"{options.command}: no contender {', '.join(unknown)}; there are "
            f"{', '.join(known)}"
        )
    return names


def described(one: Case) -> dict[str, Any]:
    """Return a case as columns of a row."""
    return {
        "case": one.title,
        "shape": one.shape,
        "dtype": one.dtype,
        "rank": one.rank,
        "targets": one.targets_text,
    }
