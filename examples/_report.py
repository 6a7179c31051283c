"""What a run leaves to read: metrics as JSON lines, a plot of the loss, a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _options import METRICS, PLOT

Row = dict[str, Any]


class Metrics:
    """A file of JSON lines, each an event: `before`, `train`, `valid`, `after`..."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS

    def write(self, event: str, **values: Any) -> None:
        """Append a line."""
        line = json.dumps({"event": event, **values}, ensure_ascii=False)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self, event: str) -> list[Row]:
        """Return the lines of that kind."""
        if not self.file.exists():
            return []
        with self.file.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [row for row in rows if row["event"] == event]

    def cut(self, step: int) -> None:
        """Drop what was logged after that step, since it will be run again."""
        if not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
        self.file.write_text("".join(kept), encoding="utf-8")


def plot_loss(metrics: Metrics, path: Path) -> None:
    """Draw the training and the validation loss over the steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for event, style in (("train", "-"), ("valid", "o-")):
        rows = metrics.rows(event)
        steps = [row["step"] for row in rows]
        axes.plot(steps, [row["loss"] for row in rows], style, label=event)
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; bars within cells are escaped."""
    cells = [head, ["---"] * len(head), *rows]
    lines = (
        " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        for row in cells
    )
    return "\n".join(f"| {line} |" for line in lines)


def write_report(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, Any]],
    files: Sequence[tuple[str, Any]],
    samples: Sequence[Sequence[str]],
    parameters: str,
) -> None:
    """Write the report.

    Args:
      path: the file.
      title: its heading.
      facts: what was measured, name and value.
      files: what lies in the folder, name and size.
      samples: source, reference, before and after of some sentences.
      parameters: the table of trainable parameters, as text.
    """
    parts = [
        f"# {title}",
        markdown_table(["", ""], facts),
        f"![loss]({PLOT})",
        "## Translations of held-out sentences",
        markdown_table(["source", "reference", "before", "after"], samples),
        "## Files",
        markdown_table(["file", "size"], files),
        "## Parameters",
        f"```\n{parameters}\n```",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def human_bytes(count: int) -> str:
    """Return a size to read.

    >>> human_bytes(2_350_000)
    '2.35 MB'
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
