"""`jlora sweep`: a task's runs over a table of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._options import UsageError, option, parse, read_file, read_toml
from jlora.cli._common import end_by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora sweep` takes."""

    config: Path = option(
        about="the file of a task, its settings, and a table [sweep] of lists, such as "
        "rank = [1, 4, 16]; the task's options may follow to override it",
        metavar="CONFIG",
        positional=True,
    )
    json: bool = option(False, "print the results for programs")
    words: tuple[str, ...] = ()


def read(words: Sequence[str], app: Any, program: str) -> Options:
    """Read a command line, of which the task's own options are left as words."""
    if not words or words[0].startswith("-"):
        return Options(**parse(app, words, program)[1])
    config, *rest = words
    own = tuple(word for word in rest if word != "--json")
    return Options(config=Path(config), json="--json" in rest, words=own)


def run(options: Options) -> None:
    """Train every combination, and print them, the best first."""
    from jlora import tasks
    from jlora._text import table
    from jlora.cli import _sweeping
    from jlora.cli._commands.train import checked
    from jlora.train import Interrupted, read_settings

    file = read_toml(options.config)
    source = str(options.config)
    swept = _sweeping.check_table(file.pop("sweep", None), source)
    if "task" not in file:
        raise UsageError(f'{source} names no task.\nBegin it with task = "translate".')
    task = checked(file.pop("task"))
    kind = tasks.KINDS[task].settings
    for key, values in swept.items():  # each value is one that the option takes
        for value in values:
            read_file(kind, {key: value}, f"{source}: [sweep]")
    settings = read_settings(
        kind, options.words, f"Options of the task {task!r}.",
        program=f"jlora sweep {source}", file=file, source=source,
    )  # fmt: skip
    settings.keep_programs()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what runs say is no data
            rows = _sweeping.run(task, settings, swept)
    except Interrupted as place:
        # Its command cannot be gone on with, whatever the runs have saved.
        end_by(Interrupted(f"{place}", place.signal, saved=False))
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    head = (*swept, "validation loss", "steps", "seconds", "together")
    lines = [
        (
            *(str(row.values[key]) for key in swept),
            "diverged" if row.loss is None else f"{row.loss:.4f}",
            f"{row.steps:,}",
            f"{row.seconds:.1f}",
            str(row.together),
        )
        for row in rows
    ]
    print(table([head, *lines]))
