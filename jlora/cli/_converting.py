"""Adapters from PEFT's format to jlora's checkpoints, and back, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlora import checkpoint, models, peft
from jlora._errors import CheckpointError
from jlora.checkpoint import _storage
from jlora.checkpoint._entries import Check
from jlora.cli._sources import load_model, naming_of
from jlora.peft._files import adapter_folder, adapters_in

# The keys of a checkpoint's metadata that keep what PEFT's format says besides.
_PEFT, _BASE = "peft", "base"


def to_checkpoint(
    source: Path,
    target: Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write PEFT's adapter as a checkpoint, its configuration in the metadata.

    Args:
      source: the folder of a PEFT adapter.
      target: the checkpoint to write.
      base: the model it was trained on, a folder or a hub's name; None takes the one
        that the configuration names.
      adapter: the adapter in the subfolder of that name.
      head: of the base, as `jlora.models.load` takes it.
      num_labels: as well.
      overwrite: replace a checkpoint that is there already.

    Returns:
      The base that was taken.

    Raises:
      CheckpointError: a source that is damaged, cannot be honoured or is of another
        base; no base; a target that exists.
    """
    _check_places(source, target, overwrite)
    held = adapters_in(source)
    if adapter is None and "default" not in held:
        raise CheckpointError(
            f"{str(source)!r} holds adapters in folders of their own: "
            f"{', '.join(held)}.\nPass --adapter with one of these names."
        )
    config = peft.read_config(source, adapter=adapter)
    base = base or config.get("base_model_name_or_path")
    model, params = _loaded(base, source, head, num_labels)
    tree = peft.load(source, params, model=naming_of(model), adapter=adapter)
    metadata = {_PEFT: config, _BASE: _lasting(base)}
    checkpoint.save_adapter(target, tree, metadata=metadata, overwrite=overwrite)
    return str(base)


def to_peft(
    source: Path,
    target: Path,
    *,
    base: str | None = None,
    adapter: str | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    task_type: str | None = None,
    base_name: str | None = None,
    check: Check = "values",
    overwrite: bool = False,
) -> str:
    """Write an adapter's checkpoint in PEFT's format.

    The configuration is the one it was converted from, if it was, else the smallest
    that says what the adapter is.

    Args:
      source: a checkpoint of `jlora.checkpoint.save_adapter`.
      target: the folder to write.
      base: the model it was trained on; None takes the one it was converted with.
      adapter: write the subfolder of that name.
      head: of the base, as `jlora.models.load` takes it.
      num_labels: as well.
      task_type: PEFT's, `"SEQ_2_SEQ_LM"`; None keeps what the configuration says.
      base_name: where PEFT finds the base; None keeps what the configuration says, or
        is `base` where there is none.
      check: how to compare the base, as `jlora.checkpoint.load_adapter` takes it.
      overwrite: replace an adapter that is there already.

    Returns:
      The base that was taken.

    Raises:
      CheckpointError: a source that is damaged or of another base; no base; a target
        that exists.
      StructureError: what PEFT's format cannot hold.
    """
    _check_places(source, adapter_folder(target, adapter), overwrite)
    # Not `load_metadata`, which takes merged parameters too.
    place = _storage.local_path(source)
    metadata = _storage.read_config(place, "adapter")["metadata"]
    config = metadata.get(_PEFT)
    base = base or metadata.get(_BASE)
    model, params = _loaded(base, source, head, num_labels)
    tree = checkpoint.load_adapter(source, params, check=check)
    given: dict[str, Any] = {"config": config}
    if config is None:
        base_name = base_name or base
        given = {"fan_in_fan_out": isinstance(model, models.GPT2)}
    peft.save(
        target,
        tree,
        model=naming_of(model),
        adapter=adapter,
        base_model_name_or_path=base_name,
        task_type=task_type,
        overwrite=overwrite,
        **given,
    )
    return str(base)


def _check_places(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse, before anything is loaded, a target that would cost something."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"TARGET {str(target)!r} and SOURCE {str(source)!r} lie in each other.\n"
            "Pass a TARGET beside it."
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() and not overwrite:
        raise CheckpointError(
            f"{str(target)!r} exists already.\nPass another TARGET, or --overwrite to "
            "replace the adapter in it."
        )


def _loaded(
    base: Any, source: Path, head: str | None, num_labels: int | None
) -> tuple[Any, Any]:
    """The base's model and parameters."""
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{str(source)!r} does not say what it was trained on.\nPass the model: "
            "--base DIR, or --base with its name on the Hugging Face hub."
        )
    return load_model(base, head=head, num_labels=num_labels)


def _lasting(base: Any) -> str:
    """The base's name, a folder's in full, so that it means the same elsewhere."""
    folder = Path(base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(base)
