"""The parts that the report of every run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import train
from jlora._processes import on_first


def model_name(model: str | None) -> str:
    """Return what a report calls a model: of a run's merged one it is the run.

    >>> model_name("runs/sft-1/merged"), model_name("google/flan-t5-small")
    ('sft-1', 'flan-t5-small')
    """
    path = Path(model or "")
    return path.parent.name if path.name == "merged" else path.name


def training_part(
    report: train.Report,
    folder: train.RunFolder,
    facts: Mapping[str, str],
    title: str,
    loss: str = "loss (nats a label)",
) -> train.Report:
    """Add what training was and came to, and the plot of its losses.

    Args:
      report: to add to.
      folder: of the run.
      facts: lines of a table, those of `jlora.train.Fit.facts` among them.
      title: of the plot.
      loss: what stands beside its axis.
    """
    if folder.writes:
        train.plot_losses(folder.metrics, folder.plot, title, loss)
    report.section("Training").table(("what", ""), facts.items())
    return report.image(folder.plot, "loss")


def closing_part(
    report: train.Report, folder: train.RunFolder, parameters: object
) -> train.Report:
    """Add the run's files, what it was made with, and its parameters; write it all.

    Of several processes the first does.

    Args:
      report: to add to.
      folder: of the run.
      parameters: a `jlora.Summary`.
    """
    on_first("writing the report", lambda: _close(report, folder, parameters))
    return report


def _close(report: train.Report, folder: train.RunFolder, parameters: object) -> None:
    report.section("Files").table(("file", "size"), train.file_sizes(folder.path))
    report.section("Made with").table(("what", ""), train.machine().items())
    report.section("Parameters").code(str(parameters)).write(folder.report)


def print_facts(facts: Mapping[str, str], *tables: Sequence[Sequence[Any]]) -> None:
    """Print facts, a line each, and tables whose first row is a head."""
    for fact, value in facts.items():
        print(f"{fact}: {value}")
    for rows in tables:
        print(f"\n{train.table(rows)}")
