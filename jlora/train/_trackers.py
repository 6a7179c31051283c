"""A run's log, sent on to TensorBoard or Weights & Biases while it is written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from jlora._errors import OptionError
from jlora.train._loop import Callback, Loop
from jlora.train._run import RunFolder

Row = Mapping[str, Any]


class Tracker(Callback):
    """Sends each row of a run's log on; a subclass says where.

    A resumed run goes on where the log does.

    Args:
      run: the folder of the run.
      every: steps between.
    """

    def __init__(self, run: RunFolder, every: int = 10) -> None:
        self.run, self.every = run, every
        self.sent = 0  # a place in the log

    def open(self, loop: Loop) -> None:
        """Begin, at `loop.position`."""
        raise NotImplementedError

    def send(self, values: dict[str, float], step: int) -> None:
        """Send what was measured at a step, by names such as `train/loss`."""
        raise NotImplementedError

    def close(self) -> None:
        """End."""
        raise NotImplementedError

    def on_start(self, loop: Loop) -> None:
        """Begin; what an earlier process logged is there already."""
        self.open(loop)
        self.sent = self.run.metrics.rows_since(0)[1] if loop.position else 0

    def on_interval(self, loop: Loop) -> None:
        """Send what was logged since."""
        self._send()

    def on_end(self, loop: Loop) -> None:
        """Send the rest, and end."""
        self._send()
        self.close()

    def _send(self) -> None:
        rows, self.sent = self.run.metrics.rows_since(self.sent)
        for row in rows:
            values = {
                f"{row['event']}/{name}": float(value)
                for name, value in row.items()
                if name not in ("event", "step") and _is_number(value)
            }
            self.send(values, int(row.get("step", 0)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class TensorBoard(Tracker):
    """Writes event files into the run's folder `tensorboard`.

    Needs `pip install "jlora[tensorboard]"`; `tensorboard --logdir runs` shows them.

    Raises:
      OptionError: tensorboardX is not installed.
    """

    def __init__(self, run: RunFolder, every: int = 10) -> None:
        super().__init__(run, every)
        try:
            import tensorboardX
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX") from error
        self._library: Any = tensorboardX

    def open(self, loop: Loop) -> None:
        """Open an event file; what a process wrote beyond the last save is dropped."""
        purge = {"purge_step": loop.position + 1} if loop.position else {}
        folder = str(self.run.path / "tensorboard")
        # Files are named by the second: two of one would overwrite each other.
        own = f".{os.getpid()}.{loop.position}"
        self._writer = self._library.SummaryWriter(folder, filename_suffix=own, **purge)

    def send(self, values: dict[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB(Tracker):
    """Logs to Weights & Biases, with the run's settings; a resumed run is the same run.

    Its own variables say where and how: `WANDB_PROJECT` (jlora), `WANDB_MODE=offline`.
    Needs `pip install "jlora[wandb]"`.

    Raises:
      OptionError: wandb is not installed.
    """

    def __init__(self, run: RunFolder, every: int = 10) -> None:
        super().__init__(run, every)
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        self._library: Any = wandb
        self._id: str | None = None

    def open(self, loop: Loop) -> None:
        """Begin a run there, or go on with it."""
        import os

        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", "jlora"),
            name=self.run.path.name,
            dir=str(self.run.path),
            config=self.run.settings,
            id=self._id,
            resume="allow" if self._id else None,
        )
        self._id = self._run.id

    def send(self, values: dict[str, float], step: int) -> None:
        """Log them."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()

    def saved(self) -> dict[str, Any]:
        """The run's id there."""
        return {"id": self._id}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with that run."""
        self._id = saved.get("id")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def trackers_of(run: RunFolder, every: int) -> list[Callback]:
    """Return those that a run's setting `log_to` names."""
    return [TRACKERS[name](run, every) for name in run.settings.get("log_to") or ()]


def _missing(name: str, library: str) -> OptionError:
    return OptionError(
        f"--log-to {name} needs {library}, which is not installed: "
        f'pip install "jlora[{name}]"'
    )
