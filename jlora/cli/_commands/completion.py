"""`jlora completion`: what a shell needs to complete command lines."""

from __future__ import annotations

import dataclasses

from jlora._options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora completion` takes."""

    shell: str = option(
        about="the shell",
        choices=("bash", "zsh", "fish"),
        metavar="SHELL",
        positional=True,
    )


def run(options: Options) -> None:
    """Print the script."""
    from typing import Any, cast

    from jlora.cli._main import app

    shell = cast(Any, options.shell)
    print(app(whole=True).generate_completion(prog_name="jlora", shell=shell), end="")
