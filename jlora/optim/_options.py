"""Checks of numbers."""

from __future__ import annotations

import numbers
from typing import Any

from jlora._errors import OptionError


def positive(**given: Any) -> None:
    """Refuse what is no number above 0.

    Raises:
      OptionError: it is not.
    """
    for name, x in given.items():
        real = isinstance(x, numbers.Real) and not isinstance(x, bool)
        if not (real and 0 < x < float("inf")):
            raise OptionError(f"{name}={x!r}: expected a number above 0.")
