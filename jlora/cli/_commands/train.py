"""`jlora train`: a run, by a file of settings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._options import UsageError, option, parse, read_toml, template
from jlora.cli._common import RunWords, end_by

_OWN = frozenset({"resume", "overwrite"})  # options that are no settings


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora train` takes."""

    config: Path | None = option(
        None, "a file with a task and its settings; `jlora train CONFIG --help` lists "
        "them, and options after CONFIG override the file",
        metavar="CONFIG", positional=True)
    template: str | None = option(
        None, "print a file with every setting of a task, and its default",
        metavar="TASK")
    resume: Path | None = option(
        None, "resume a run that stopped; --steps or --epochs may lengthen it",
        metavar="RUN")
    words: tuple[str, ...] = ()
# fmt: on


def read(words: Sequence[str], app: Any, program: str) -> Options:
    """Read a command line, of which the task's own options are left as words."""
    own = RunWords.of(words)
    if own.config is None and own.resume is None:
        return Options(**parse(app, words, program)[1])
    return Options(**own._asdict())


def run(options: Options) -> None:
    """Train, or print a file to begin with."""
    from jlora import tasks
    from jlora._processes import one_voice
    from jlora.train import Interrupted

    if options.template is not None:
        print(_template(options.template), end="")
        return
    name, settings = read_task(options)
    settings.keep_programs()
    try:
        tasks.run(name, settings)
    except Interrupted as place:
        with one_voice():
            end_by(place)


def read_task(options: Options) -> tuple[str, Any]:
    """Return a task's name and its settings, from the file and the words.

    Raises:
      OptionError: no such task; settings that are wrong.
    """
    from jlora.train._run import SWEEP

    file, saved = files_of(options)
    if SWEEP in saved:
        raise UsageError(
            f"{options.resume} holds a sweep.\nGo on with it: jlora sweep --resume "
            f"{options.resume}"
        )
    name = task_of(options, file, saved)
    return name, settings_of(name, options, file)


def files_of(options: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return what CONFIG says, and what the run that is resumed has kept.

    Args:
      options: `config` and `resume`, each of which may be None.

    Raises:
      OptionError: both are, or a file cannot be read.
    """
    from jlora.train._run import saved_settings

    if options.config is None and options.resume is None:
        raise UsageError(
            "CONFIG is missing.\n`jlora train --template "
            f"{next(iter(_known()))}` prints one."
        )
    file = None if options.config is None else read_toml(options.config)
    if file is not None and "task" not in file:
        raise UsageError(
            f"{options.config} names no task.\nBegin it with a line such as "
            f'task = "{next(iter(_known()))}".'
        )
    return file, {} if options.resume is None else saved_settings(options.resume)


def task_of(options: Any, file: dict[str, Any] | None, saved: dict[str, Any]) -> str:
    """Return the task that a file names, or a run.

    Args:
      options: `config` and `resume`.
      file: from `files_of`.
      saved: likewise.

    Raises:
      UsageError: there is no such task.
    """
    if file is not None:
        return checked(file["task"])
    if saved.get("task") not in _known():
        raise UsageError(
            f"the run in {options.resume} is of no task of `jlora train`.\nResume it "
            "with the script that began it."
        )
    return str(saved["task"])


def settings_of(
    name: str,
    options: Any,
    file: dict[str, Any] | None,
    *,
    command: str = "train",
    beside: Sequence[str] = (),
) -> Any:
    """Return a task's settings, from a file, a run that is resumed, and the words.

    Args:
      name: the task.
      options: `config`, `resume` and the task's `words`.
      file: from `files_of`.
      command: of the console.
      beside: what the run has kept besides settings.

    Raises:
      OptionError: settings that are wrong.
    """
    from jlora.train import read_settings

    kind = _known()[name]
    return read_settings(
        kind.settings,
        options.words,
        f"Options of the task {name!r}: {kind.summary}.",
        program=f"jlora {command} {options.config or '--resume RUN'}",
        file=file and {key: value for key, value in file.items() if key != "task"},
        source=str(options.config),
        beside=beside,
    )


def checked(name: Any) -> str:
    """Return a task's name.

    Raises:
      UsageError: there is no such task.
    """
    known = list(_known())
    if name in known:
        return str(name)
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
    raise UsageError(f"{name!r} is no task.\n{hint}")


def _known() -> Any:
    from jlora import tasks

    return tasks.KINDS


def _template(name: str) -> str:
    kind = _known()[checked(name)]
    head = f'# {kind.summary}\n\ntask = "{name}"'
    return template(kind.settings, head, leave_out=_OWN)
