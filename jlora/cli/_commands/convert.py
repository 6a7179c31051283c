"""`jlora convert`: PEFT's format as a checkpoint, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jlora._errors import CheckpointError
from jlora._options import UsageError, flag, option
from jlora.cli._common import HEADS, stay_on_host


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora convert` takes."""

    source: Path = option(
        about="a PEFT adapter or a checkpoint", metavar="SOURCE", positional=True)
    target: Path = option(
        about="the folder to write", metavar="TARGET", positional=True)
    base: str | None = option(
        None, "the model it was trained on: a folder or a hub name (what SOURCE says)",
        metavar="DIR|NAME")
    head: str | None = option(
        None, "of BERT and RoBERTa, if not the one the model was saved with",
        choices=HEADS)
    num_labels: int | None = option(None, "of the classification head", least=1)
    adapter: str | None = option(
        None, "the PEFT adapter in the folder of that name", metavar="NAME")
    overwrite: bool = option(False, "replace the adapter in TARGET")
    task_type: str | None = option(
        None, "PEFT's, such as SEQ_2_SEQ_LM, CAUSAL_LM", metavar="TYPE",
        group="to PEFT's format")
    base_name: str | None = option(
        None, "where PEFT finds the model (--base)", metavar="NAME")
    check: str | None = option(
        None, "compare the model's values with those it was trained on (the default), "
        "or shapes only, for a model in another dtype", choices=("values", "shapes"))
# fmt: on


def run(options: Options) -> None:
    """Convert, in the direction that SOURCE asks for."""
    stay_on_host()
    from jlora.cli import _converting
    from jlora.cli._inspect import kind_of

    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("base", "head", "num_labels", "adapter", "overwrite")
    }
    only = {x: getattr(options, x) for x in ("task_type", "base_name", "check")}
    only = {name: value for name, value in only.items() if value is not None}
    kind = kind_of(options.source)
    if kind == "model":
        raise CheckpointError(
            f"{str(options.source)!r} is a model, and what is converted are adapters."
        )
    if kind == "peft" and only:
        said = ", ".join(map(flag, only))
        raise UsageError(f"{said}: for a SOURCE that is a checkpoint of jlora.")
    to_peft = kind == "checkpoint"
    write = _converting.to_peft if to_peft else _converting.to_checkpoint
    base = write(options.source, options.target, **given, **only)
    what = "PEFT adapter" if to_peft else "adapter checkpoint"
    print(f"{options.target}: {what}, on {base}")
