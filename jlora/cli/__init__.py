"""The console: `jlora COMMAND ...`, or `python -m jlora COMMAND ...`.

A command is a `Command` in the table at the end: what it takes, and a function of that.
The function imports what it needs when it is called, so that `jlora --help` is quick.
"""

from jlora.cli._main import main as main

__all__ = [name for name in dir() if not name.startswith("_")]


def __dir__() -> list[str]:
    return __all__
