"""What commands share before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jlora._errors import CheckpointError

T = TypeVar("T")

HEADS = ("base", "classification", "masked_lm")
DTYPES = ("float32", "bfloat16", "float16")


def stay_on_host() -> None:
    """Leave accelerators alone, which may be training what is looked at."""
    if "JAX_PLATFORMS" not in os.environ:
        import jax

        jax.config.update("jax_platforms", "cpu")


def progress(items: Iterable[T], total: int, unit: str, *, show: bool) -> Iterator[T]:
    """Go over items; where a person looks at stderr, a bar says how far it is."""
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, total=total, unit=unit)


def end_by(place: Any) -> NoReturn:
    """End a command whose run was asked to stop, by `jlora.train.Interrupted`."""
    from jlora.train._command import stopped

    said = stopped(place)
    print(f"jlora: {said[0].lower()}{said[1:]}", file=sys.stderr)
    raise SystemExit(place.status)


def check_target(target: Path, overwrite: bool, what: str) -> None:
    """Refuse, before anything is loaded, what would be refused after a long time."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not (overwrite and target.is_dir()):
        raise CheckpointError(
            f"{str(target)!r} exists already.\nPass another TARGET, or --overwrite to "
            f"replace the {what} in it."
        )
