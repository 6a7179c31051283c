"""`jlora train`: a run, by a file of settings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._options import UsageError, option, parse, read_toml, template
from jlora.cli._common import end_by

_OWN = frozenset({"resume", "overwrite"})  # options that are no settings


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora train` takes."""

    config: Path | None = option(
        None, "the file of a task and its settings; `jlora train CONFIG --help` "
        "lists them, and each may follow CONFIG to override the file",
        metavar="CONFIG", positional=True)
    template: str | None = option(
        None, "print a file with every setting of a task, and its default",
        metavar="TASK")
    resume: Path | None = option(
        None, "go on with a run that stopped; --steps or --epochs may lengthen it",
        metavar="RUN")
    words: tuple[str, ...] = ()
# fmt: on


def read(words: Sequence[str], app: Any, program: str) -> Options:
    """Read a command line, of which the task's own options are left as words."""
    words = list(words)
    config = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    if config is None and "--resume" not in words:
        return Options(**parse(app, words, program)[1])
    resume = None
    if "--resume" in words:
        at = words.index("--resume")
        if len(words) < at + 2 or words[at + 1].startswith("-"):
            raise UsageError("--resume needs the folder of a run.")
        resume = Path(words[at + 1])
        words[at : at + 2] = ["--output", str(resume), "--resume"]
    return Options(config=config, resume=resume, words=tuple(words))


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
    from jlora import tasks
    from jlora.train import read_settings

    if options.config is None and options.resume is None:
        raise UsageError(
            "CONFIG is missing.\n`jlora train --template "
            f"{next(iter(tasks.KINDS))}` prints one."
        )
    file = None if options.config is None else read_toml(options.config)
    name = _task_of(options, file)
    settings = read_settings(
        tasks.KINDS[name].settings,
        options.words,
        f"Options of the task {name!r}: {tasks.KINDS[name].summary}.",
        program=f"jlora train {options.config or '--resume RUN'}",
        file=file,
        source=str(options.config),
    )
    return name, settings


def _task_of(options: Options, file: dict[str, Any] | None) -> str:
    """The task that a file names, or that a run says it is of."""
    if file is not None and "task" not in file:
        raise UsageError(
            f"{options.config} names no task.\nBegin it with a line such as "
            f'task = "{next(iter(_known()))}".'
        )
    if file is not None:
        return checked(file.pop("task"))
    from jlora.train._run import saved_settings

    folder = options.resume or Path()
    name = saved_settings(folder).get("task")
    if name not in _known():
        raise UsageError(
            f"the run in {folder} is of no task of `jlora train`.\nResume it with the "
            "script that began it."
        )
    return str(name)


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
