"""What tasks that read while they train share: the batches, and what goes together."""

from __future__ import annotations

from typing import Any

from jlora import data


def stream_refusals(settings: Any, *files: str) -> dict[str, Any]:
    """Return what options of streaming do not go together, for `refuse`.

    Args:
      settings: with `streaming`, `workers`, `steps` and `train_size`.
      files: the options that have to name files.
    """
    s = settings
    named = [f"--{name}" for name in files]
    words = f"{', '.join(named[:-1])} and {named[-1]}"
    return {
        f"--streaming needs files for each of {words}": (
            s.streaming and not all(getattr(s, name) for name in files)
        ),
        "--streaming needs --steps: how long an epoch is, nobody has counted": (
            s.streaming and s.steps is None
        ),
        "--train-size chooses from text in memory, not from what is streamed": (
            s.streaming and s.train_size
        ),
        "--workers are for --streaming": s.workers and not s.streaming,
    }


def streamed(
    settings: Any, encode: Any, longest: int | tuple[int, int], pad: int
) -> data.Streaming:
    """Return batches of what is read, tokenised and cut up while training.

    Args:
      settings: with `train`, `pack`, `buckets`, `batch_size`, `seed` and `workers`.
      encode: what makes columns of rows, as `data.Streaming` takes it.
      longest: the most tokens of an example, or of a row of several; of pairs two.
      pad: the token that fills batches.
    """
    s = settings
    source = data.stream_files(s.train or [])
    if s.pack:
        cut: dict[str, Any] = {"length": longest}
    else:
        cut = {"shapes": data.sample_shapes(source, encode, longest, s.buckets)}
    return data.Streaming(
        source,
        encode,
        size=s.batch_size,
        pad=pad,
        seed=s.seed,
        workers=s.workers,
        **cut,
    )


def packed_remark(what: str, packed: data.Packed) -> str:
    """Return what became of examples that were packed, for a report."""
    length = packed.length
    room = length if isinstance(length, int) else " and ".join(map(str, length))
    return (
        f"{what} in {len(packed.members):,} rows of {room}, {packed.fraction:.0%} of "
        "them tokens."
    )
