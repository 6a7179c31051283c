"""What a folder holds, from its headers: adapters, checkpoints, models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jlora._errors import CheckpointError
from jlora._files import check_local
from jlora.cli._inspect._report import Report as Report

Kind = Literal["peft", "checkpoint", "model"]


def kind_of(path: Path) -> Kind:
    """What a folder is: of PEFT's adapters, a checkpoint of jlora, a model.

    Raises:
      CheckpointError: nothing is there, or nothing that jlora knows.
    """
    _check_folder(path)
    if kind := _kind(path):
        return kind
    known = ", ".join(p.name for p in _known_inside(path))
    raise CheckpointError(
        f"{str(path)!r} holds no PEFT adapter (adapter_config.json), no checkpoint of "
        "jlora (config/) and no model (config.json).\n"
        + (f"Pass one of the folders inside it: {known}." if known else "Is it right?")
    )


def inspect(path: Path) -> list[Report]:
    """What is there, one report an adapter, checkpoint or model.

    Of a folder that holds such folders, a run's for one, there is a report on each.

    Raises:
      CheckpointError: nothing is there, nothing that jlora knows, or it is damaged.
    """
    _check_folder(path)
    places = [path] if _kind(path) else _known_inside(path)
    if not places:
        kind_of(path)  # says what is missing
    return [report for place in places for report in _reports(place)]


def _reports(path: Path) -> list[Report]:
    # Each reader needs a library of its own; none is imported for another's sake.
    kind = _kind(path)
    if kind == "peft":
        from jlora.cli._inspect import _peft

        return [_peft.report(place) for place in _adapters(path)]
    if kind == "checkpoint":
        from jlora.cli._inspect import _checkpoint

        return [_checkpoint.report(place) for place in _checkpoints(path)]
    from jlora.cli._inspect import _model

    return [_model.report(path)]


def _check_folder(path: Path) -> None:
    check_local(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{str(path)!r} {what}.\nPass the path of a folder.")


def _known_inside(path: Path) -> list[Path]:
    return [p for p in sorted(path.iterdir()) if p.is_dir() and _kind(p)]


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
