"""A run's log: one JSON object a line, each an event."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jlora._errors import CheckpointError

Row = dict[str, Any]


class MetricsLog:
    """A file of JSON lines, each an event such as `train` or `valid` and its numbers.

    >>> import tempfile
    >>> log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    >>> log.write("train", step=10, loss=1.5)
    >>> log.rows("train")
    [{'event': 'train', 'step': 10, 'loss': 1.5}]
    """

    def __init__(self, file: Path, *, writes: bool = True) -> None:
        """Open a log.

        Args:
          file: it.
          writes: whether this process writes it; of several one does.
        """
        self.file, self.writes = file, writes

    def write(self, event: str, **values: Any) -> None:
        """Append a line.

        Raises:
          CheckpointError: the file cannot be written.
        """
        if not self.writes:
            return
        line = json.dumps({"event": event, **values}, ensure_ascii=False)
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(
                f"the log {str(self.file)!r} cannot be written: {error.strerror}.\nSee "
                "to space and permissions. What was saved before is as it was."
            ) from error

    def rows(self, event: str | None = None) -> list[Row]:
        """Return the events of a kind, or all; a line that was cut off is left out."""
        rows, _ = self.rows_since(0)
        return [row for row in rows if event is None or row["event"] == event]

    def rows_since(self, place: int) -> tuple[list[Row], int]:
        """Return what was logged after a place in the file, and the place to go on at.

        Args:
          place: 0, or what an earlier call returned.
        """
        if not self.file.exists():
            return [], place
        with self.file.open("rb") as file:
            file.seek(place)
            text = file.read()
        rows = []
        for line in text.decode("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the process was killed while it wrote
                continue
        return rows, place + len(text)

    def cut(self, step: int) -> None:
        """Drop what was logged after that step, since it will be run again."""
        if not self.writes:
            return
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        if self.file.exists():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            new = self.file.with_name(self.file.name + ".new")
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.file)
