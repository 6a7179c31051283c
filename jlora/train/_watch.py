"""What is out of the ordinary in a run: steps that were skipped, losses that jump."""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from jlora._processes import is_first
from jlora.train._loop import Callback, Loop, Numbers
from jlora.train._metrics import MetricsLog

_LEAST = 20  # losses before which nothing can stand out
_TO_SIGMA = 1.4826  # from a median absolute deviation to a normal's standard deviation


class Watch(Callback):
    """Notes skipped steps and spikes of the loss, in the log and on the screen.

    A loss is a spike if it lies `spread` deviations above the median of the `window`
    losses before it. The deviation is the median absolute one, which a spike does not
    widen as it would a standard deviation. Of spikes in a row the first is noted.

    Args:
      metrics: the log.
      window: how many losses to compare with.
      spread: how many deviations make a spike.
    """

    def __init__(
        self, metrics: MetricsLog, window: int = 50, spread: float = 8.0
    ) -> None:
        self.metrics, self.spread = metrics, spread
        self.recent: collections.deque[float] = collections.deque(maxlen=window)
        self.spikes = 0
        self._is_high = self._is_skipping = False

    def on_step(self, loop: Loop, step: int, metrics: Numbers) -> None:
        """Look at a step."""
        if metrics["nonfinite"]:
            self._note_skipped(step, metrics)
        else:
            self._note_spike(step, metrics["loss"])
            self.recent.append(metrics["loss"])
        self._is_skipping = bool(metrics["nonfinite"])

    def _note_skipped(self, step: int, metrics: Numbers) -> None:
        loss, norm = metrics["loss"], metrics["grad_norm"]
        known = {"loss": loss, "grad_norm": norm}
        finite = {k: v if math.isfinite(v) else None for k, v in known.items()}
        self.metrics.write("skipped", step=step, **finite)
        if not self._is_skipping:
            _say(
                f"step {step} is skipped: the loss is {loss}, the gradient's norm "
                f"{norm}"
            )

    def _note_spike(self, step: int, loss: float) -> None:
        if len(self.recent) < _LEAST:
            return
        median = statistics.median(self.recent)
        away = statistics.median(abs(x - median) for x in self.recent)
        # Of losses that are all the same every other one would stand out.
        deviation = max(_TO_SIGMA * away, 1e-3 * abs(median))
        was_high, self._is_high = (
            self._is_high,
            bool(loss > median + self.spread * deviation),
        )
        if not self._is_high or was_high:
            return
        self.spikes += 1
        self.metrics.write(
            "spike", step=step, loss=loss, median=median, deviation=deviation
        )
        _say(
            f"step {step}: the loss jumps to {loss:.4g}, from a median of {median:.4g} "
            f"(+- {deviation:.2g}) in the {len(self.recent)} steps before"
        )

    def saved(self) -> dict[str, Any]:
        """What has been seen."""
        return {
            "recent": list(self.recent),
            "spikes": self.spikes,
            "states": [self._is_high, self._is_skipping],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with it."""
        self.recent.extend(saved.get("recent", ()))
        self.spikes = saved.get("spikes", 0)
        self._is_high, self._is_skipping = saved.get("states", (False, False))


def _say(text: str) -> None:
    """Print a line above the bar, if one is shown."""
    from tqdm import tqdm

    if is_first():
        tqdm.write(text)
