"""Checks of numbers."""

from __future__ import annotations

import numbers
from typing import Any

import jax

from jlora._errors import OptionError


def positive(**given: Any) -> None:
    """Refuse what is no number above 0; a traced one, of a sweep say, is not known.

    Raises:
      OptionError: it is not.
    """
    for name, x in given.items():
        if isinstance(x, jax.core.Tracer) and x.ndim == 0:
            continue
        real = isinstance(x, numbers.Real) and not isinstance(x, bool)
        if not (real and 0 < x < float("inf")):
            raise OptionError(f"{name}={x!r}: expected a number above 0.")


def whole(least: int, **given: Any) -> None:
    """Refuse what is no whole number from `least` on.

    Raises:
      OptionError: it is not.
    """
    for name, x in given.items():
        is_whole = isinstance(x, numbers.Integral) and not isinstance(x, bool)
        if not is_whole or x < least:
            raise OptionError(f"{name}={x!r}: expected a whole number from {least} on.")


def share(**given: Any) -> None:
    """Refuse what is no number between 0 and 1.

    Raises:
      OptionError: it is not.
    """
    positive(**given)
    for name, x in given.items():
        if x >= 1:
            raise OptionError(f"{name}={x!r}: expected a number between 0 and 1.")
