"""The console: `jlora COMMAND ...`, or `python -m jlora COMMAND ...`.

A command is a line of the table `COMMANDS` and a module of `jlora.cli._commands`, which
imports what it needs when it runs, so that `jlora --help` is quick.
"""

from jlora.cli._main import main as main

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
