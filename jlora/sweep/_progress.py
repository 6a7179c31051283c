"""How far a sweep is, as a bar: the steps of all jobs together."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar, or nothing.

    Args:
      title: what stands before it; None shows none.
      total: the steps of all jobs.
    """

    def __init__(self, title: str | None, total: int) -> None:
        self._bar: Any = None
        if title is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="step")

    def say(self, running: int, waiting: int) -> None:
        """Say how many jobs are under way, and how many wait."""
        if self._bar is not None:
            queue = f", {waiting} waiting" if waiting else ""
            self._bar.set_postfix_str(f"{running} running{queue}", refresh=False)

    def made(self, steps: int) -> None:
        """Move by so many steps; of a job that ends early, those it does without."""
        if self._bar is not None:
            self._bar.update(steps)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
