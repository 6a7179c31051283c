"""`jlora evaluate`: how well a model knows texts, answers them, or sorts them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jlora._options import option
from jlora._programs import ProgramOptions
from jlora.cli._common import DTYPES

METRICS = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman")


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ProgramOptions):
    """What `jlora evaluate` takes."""

    source: str = option(
        about="a run, a model or an adapter: a folder, or a model's name on the hub",
        metavar="SOURCE", positional=True)
    data: list[Path] | None = option(
        None, "for a model with an encoder FILE.de FILE.en, or tables of pairs; for "
        "one that continues texts, files with one text per line; for a classifier, "
        "tables of labelled texts; otherwise what the run's task reads (the tests of "
        "a run)",
        metavar="FILE")
    direction: str | None = option(
        None, "of pairs, such as en-cs (the run's)", metavar="A-B")
    prefix: str | None = option(
        None, "put before each text (what a run's model was trained with)",
        metavar="TEXT")
    adapter: Path | None = option(
        None, "an adapter to put on the model SOURCE", metavar="DIR")
    base: str | None = option(
        None, "the model that the adapter SOURCE belongs to (as it says)",
        metavar="DIR|NAME")
    dtype: str | None = option(
        None, "of the model's weights (its own)", choices=DTYPES)
    longest: int | None = option(
        None, "tokens of a text; longer ones are cut (512; a run's)", least=2)
    limit: int | None = option(None, "only the first N texts of each file", least=1)
    batch_size: int = option(16, "texts at once (16)", least=1)
    num_beams: int | None = option(
        None, "of the answers; 1 is greedy (1; those of a run on E2E)", least=1)
    loss_only: bool = option(False, "skip the answers, which take longest")
    json: bool = option(False, "print the numbers as JSON")
    text: list[str] | None = option(
        None, "columns of the text, one or two (the run's; sentence)",
        metavar="COLUMN", group="labelled texts")
    label: str | None = option(
        None, "column of the label (the run's; label)", metavar="COLUMN")
    classes: list[str] | None = option(
        None, "names of the classes in the order of their numbers (the run's; the "
        "model's)", metavar="NAME")
    metrics: list[str] | None = option(
        None, "to print (the run's, or by the labels)",
        choices=METRICS, metavar="NAME")
# fmt: on


def run(options: Options) -> None:
    """Print what the model makes of each test, in numbers."""
    from jlora.cli import _judging, _sources

    options.keep_programs()
    source = _sources.find(options.source, base=options.base, adapter=options.adapter)
    judge = _judging.judge_of(options, source)
    found = judge(options, source)
    if options.json:
        print(json.dumps({"model": source.model, "tests": found}, indent=2))
        return
    from jlora._text import table

    columns = list(next(iter(found.values())))
    rows = [(name, *map(_cell, row.values())) for name, row in found.items()]
    print(table([("test", *columns), *rows]))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
