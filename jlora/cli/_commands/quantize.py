"""`jlora quantize`: a model with its kernels in 8 or 4 bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jlora._options import option
from jlora.cli._common import DTYPES, check_target, stay_on_host


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora quantize` takes."""

    source: str = option(
        about="a model: a folder, or its name on the hub", metavar="MODEL",
        positional=True)
    target: Path = option(
        about="the folder to write", metavar="TARGET", positional=True)
    form: str = option(
        "nf4", "the form of the quantised weights (nf4)",
        choices=("nf4", "fp4", "int8"))
    block: int | None = option(
        None, "weights that share a scale, in 4 bits (64)", least=1)
    double: bool = option(
        True, "quantise the scales too; --no-double keeps them in float32")
    exclude: list[str] | None = option(
        None, "parts of kernels' names to leave as they are (lm_head)", metavar="NAME")
    dtype: str | None = option(
        None, "of what stays dense, and of kernels while in use (its own)",
        choices=DTYPES)
    overwrite: bool = option(False, "replace the model in TARGET")
    json: bool = option(False, "print the report as JSON")
# fmt: on


def run(options: Options) -> None:
    """Quantise, write, and say what that saved and lost."""
    stay_on_host()
    from jlora._text import table
    from jlora.cli import _quantising

    check_target(options.target, options.overwrite, "model")
    report = _quantising.quantise(
        options.source,
        options.target,
        options.form,
        block=options.block,
        double=options.double,
        exclude=options.exclude,
        dtype=options.dtype,
    )
    if options.json:
        print(json.dumps(_quantising.as_json(report), indent=2))
        return
    rows = [("kernel", "bytes before", "after", "relative error", "max error")]
    rows += [
        (r.kernel, f"{r.bytes_before:,}", f"{r.bytes_after:,}",
         f"{r.relative_error:.2%}", f"{r.max_error:.2g}")
        for r in report.rows
    ]  # fmt: skip
    print(table(rows))
    for path, why in report.left.items():
        print(f"left as it is: {path}, {why}")
    print(
        f"\n{options.target}: {report.bytes_before:,} bytes became "
        f"{report.bytes_after:,}, {report.bytes_before / report.bytes_after:.1f} times "
        f"fewer"
    )
