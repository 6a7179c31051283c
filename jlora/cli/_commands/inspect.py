"""`jlora inspect`: what a folder holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jlora._options import UsageError, option
from jlora.cli._common import stay_on_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora inspect` takes."""

    folder: Path = option(about="what to look at", metavar="FOLDER", positional=True)
    values: bool = option(
        False,
        "read an adapter's weights: norms of A, B and s·A·B, singular values, "
        "effective rank",
    )
    plot: Path | None = option(
        None, "draw what --values says, layer by layer", metavar="FILE.png"
    )
    json: bool = option(False, "print JSON, for programs: nothing is cut")


def run(options: Options) -> None:
    """Print a report on each thing in the folder."""
    if options.plot is not None and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {options.plot}: pass a .png, .svg or .pdf file.")
    stay_on_host()
    from jlora.cli._inspect import inspect

    reports = inspect(options.folder)
    if options.values or options.plot is not None:
        from jlora.cli._inspect import _values

        reports = [_values.with_values(report) for report in reports]
        if options.plot is not None:
            _values.plot(reports, options.plot)
    if options.json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        print("\n\n".join(map(str, reports)))
