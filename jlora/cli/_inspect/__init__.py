"""What a folder holds, from its headers: adapters, checkpoints, models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jlora._errors import CheckpointError
from jlora.cli._inspect._report import Report as Report

Kind = Literal["peft", "checkpoint", "model"]


def kind_of(path: Path) -> Kind:
    """What a folder is: of PEFT's adapters, a checkpoint of jlora, a model.

    Raises:
      CheckpointError: nothing is there, or nothing that jlora knows.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{str(path)!r} {what}.\nPass the path of a folder.")
    if kind := _kind(path):
        return kind
    known = [p.name for p in sorted(path.iterdir()) if p.is_dir() and _kind(p)]
    raise CheckpointError(
        f"{str(path)!r} holds no PEFT adapter (adapter_config.json), no checkpoint of "
        "jlora (config/) and no model (config.json).\n"
        + (f"Inside it are {', '.join(known)}." if known else "Is the path right?")
    )


def inspect(path: Path) -> list[Report]:
    """What is there, one report an adapter, checkpoint or model.

    Raises:
      CheckpointError: nothing is there, nothing that jlora knows, or it is damaged.
    """
    kind = kind_of(path)
    # Each reader needs a library of its own; none is imported for another's sake.
    if kind == "peft":
        from jlora.cli._inspect import _peft

        return [_peft.report(place) for place in _adapters(path)]
    if kind == "checkpoint":
        from jlora.cli._inspect import _checkpoint

        return [_checkpoint.report(place) for place in _checkpoints(path)]
    from jlora.cli._inspect import _model

    return [_model.report(path)]


def _kind(path: Path) -> Kind | None:
    """What is in the folder itself comes before what lies in folders inside it."""
    if (path / "adapter_config.json").exists():
        return "peft"
    if (path / "config").is_dir():
        return "checkpoint"
    if (path / "config.json").exists():
        return "model"
    if _checkpoints(path):
        return "checkpoint"
    return "peft" if _adapters(path) else None


def _adapters(path: Path) -> list[Path]:
    """PEFT keeps the first adapter in the folder, others inside it by their names."""
    inner = sorted(p.parent for p in path.glob("*/adapter_config.json"))
    return ([path] if (path / "adapter_config.json").exists() else []) + inner


def _checkpoints(path: Path) -> list[Path]:
    """The folder itself, or the steps of a run in it."""
    if (path / "config").is_dir():
        return [path]
    steps = [p for p in path.iterdir() if p.name.isdigit() and (p / "config").is_dir()]
    return sorted(steps, key=lambda p: int(p.name))
