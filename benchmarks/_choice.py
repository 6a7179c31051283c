"""From the command line to cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks._cases import Case, case


def cases(options: Any, cpu: Sequence[str], gpu: Sequence[str]) -> list[Case]:
    """Return every combination of shape, targets and rank that was asked for.

    `cpu` and `gpu` are the shapes where `--shape` names none.
    """
    shapes = options.shape or (gpu if options.gpu else cpu)
    grid = itertools.product(shapes, options.targets or [None], options.rank or [8])
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
        )
        for shape, targets, rank in grid
    ]


def described(one: Case) -> dict[str, Any]:
    """Return a case as columns of a row."""
    return {
        "case": one.title,
        "shape": one.shape,
        "dtype": one.dtype,
        "rank": one.rank,
        "targets": one.targets
        if isinstance(one.targets, str)
        else " ".join(one.targets),
    }
