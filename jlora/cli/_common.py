"""What commands share before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from jlora._errors import CheckpointError
from jlora._options import UsageError

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


class RunWords(NamedTuple):
    """A command line of a run: its file, the run to go on with, and the task's words.

    Words that go on with a run say so as a script's do: `--output RUN --resume`.
    """

    config: Path | None
    resume: Path | None
    words: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> RunWords:
        """Divide the words.

        Raises:
          UsageError: `--resume` without a folder.
        """
        cut = (w.split("=", 1) if w.startswith("--resume=") else [w] for w in words)
        rest = [part for parts in cut for part in parts]
        config = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
        if "--resume" not in rest:
            return cls(config, None, tuple(rest))
        at = rest.index("--resume")
        if len(rest) < at + 2 or not rest[at + 1] or rest[at + 1].startswith("-"):
            raise UsageError("--resume needs the folder of a run.")
        resume = Path(rest[at + 1])
        rest[at : at + 2] = ["--output", str(resume), "--resume"]
        return cls(config, resume, tuple(rest))


def end_by(place: Any) -> NoReturn:
    """End a command whose run was asked to stop, by `jlora.train.Interrupted`."""
    from jlora._processes import is_first
    from jlora.train._command import stopped

    said = stopped(place)
    if is_first():  # of several processes one says it
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
