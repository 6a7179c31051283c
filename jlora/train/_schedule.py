"""The learning rate over the steps of a run."""

from __future__ import annotations

from typing import Literal

import optax

from jlora._errors import OptionError

Decay = Literal["cosine", "linear", "constant"]


def warmup_schedule(
    peak: float, steps: int, *, warmup: int = 0, decay: Decay = "cosine"
) -> optax.Schedule:
    """Return a linear rise to `peak`, then a fall to 0 at the last step.

    Args:
      peak: the highest rate.
      steps: how many steps the run makes.
      warmup: steps of the rise; at most half of them all.
      decay: how it falls; `"constant"` does not.

    Raises:
      OptionError: an unknown `decay`.

    >>> rate = warmup_schedule(1.0, 12, warmup=4, decay="linear")
    >>> [float(rate(step)) for step in (0, 2, 4, 8, 12)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = min(warmup, steps // 2)
    rest = max(1, steps - warmup)
    falls = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }
    if decay not in falls:
        raise OptionError(f"decay={decay!r}: expected one of {', '.join(falls)}.")
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    return optax.join_schedules([rise, falls[decay]], [warmup])
