"""`jlora sweep`: a task's runs over a table of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._options import UsageError, flag, option, parse, read_file
from jlora.cli._commands.train import files_of, settings_of, task_of
from jlora.cli._common import RunWords, end_by

# fmt: off


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora sweep` takes."""

    config: Path | None = option(
        None,
        "the file of a task, its settings, and a table [sweep] of lists, such as "
        "rank = [1, 4, 16]; the task's options may follow to override it",
        metavar="CONFIG",
        positional=True,
    )
    resume: Path | None = option(
        None, "resume a sweep that stopped", metavar="DIR"
    )
    json: bool = option(False, "print the results as JSON")
    words: tuple[str, ...] = ()


# fmt: on


def read(words: Sequence[str], app: Any, program: str) -> Options:
    """Read a command line, of which the task's own options are left as words."""
    own = RunWords.of([word for word in words if word != "--json"])
    if own.config is None and own.resume is None:
        return Options(**parse(app, words, program)[1])
    return Options(**own._asdict(), json="--json" in words)


def run(options: Options) -> None:
    """Train every combination, and print them, the best first."""
    from jlora.cli import _sweeping
    from jlora.train import Interrupted

    task, settings, swept = _read(options)
    settings.keep_programs()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what runs say is no data
            rows = _sweeping.run(task, settings, swept)
    except Interrupted as place:
        end_by(place)
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print(_table(rows, swept))


def _read(options: Options) -> tuple[str, Any, dict[str, list[Any]]]:
    """Return the task, the settings that all runs have, and what varies.

    Raises:
      OptionError: a table or settings that are wrong, or not those of the sweep that is
        resumed.
    """
    from jlora import tasks
    from jlora.cli import _sweeping
    from jlora.train._run import SWEEP

    file, saved = files_of(options)
    if saved and SWEEP not in saved:
        raise UsageError(
            f"{options.resume} holds a run, and no sweep.\nGo on with it: jlora train "
            f"--resume {options.resume}"
        )
    if file is None:
        swept = _sweeping.check_table(saved[SWEEP], str(options.resume))
    else:
        swept = _sweeping.check_table(file.pop(SWEEP, None), str(options.config))
        if saved and swept != saved[SWEEP]:
            raise UsageError(
                f"the sweep in {options.resume} varies {saved[SWEEP]}, and "
                f"{options.config} {swept}.\nBegin another one with another --output."
            )
        # What varies has no value that all share.
        file = {k: v for k, v in file.items() if k.replace("-", "_") not in swept}
    task = task_of(options, file, saved)
    kind = tasks.KINDS[task].settings
    source = f"{options.config or options.resume}: [sweep]"
    for key, values in swept.items():  # each value is one that the option takes
        for value in values:
            read_file(kind, {key: value}, source)
    asked = {word.partition("=")[0] for word in options.words}
    twice = [flag(key) for key in swept if flag(key) in asked]
    if twice:
        raise UsageError(f"{', '.join(twice)}: the table [sweep] says this already.")
    settings = settings_of(task, options, file, command="sweep", beside=[SWEEP])
    for name, value in settings.kept(task).items():
        if saved and value != saved[name] and name != "log_to":
            raise UsageError(
                f"{flag(name)}: a sweep that is resumed ends as it was begun.\nResume "
                "without it, or begin another one with another --output."
            )
    return task, settings, swept


def _table(rows: list[Any], swept: Any) -> str:
    from jlora._text import table

    head = (*swept, "validation loss", "steps", "seconds", "together")
    lines = [
        (
            *(_cell(row.values[key]) for key in swept),
            "diverged" if row.loss is None else f"{row.loss:.4f}",
            f"{row.steps:,}",
            f"{row.seconds:.1f}",
            str(row.together),
        )
        for row in rows
    ]
    return table([head, *lines])


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
