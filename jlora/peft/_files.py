"""A PEFT adapter's folder: found, read with suspicion, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import _files
from jlora._errors import CheckpointError
from jlora._files import PathLike, local_path
from jlora._processes import on_first

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_FLOATS = {"F32", "F16", "BF16"}


def adapter_folder(folder: PathLike, adapter: str | None) -> Path:
    """Where an adapter lies: PEFT keeps all but the one called "default" in subfolders.

    Raises:
      CheckpointError: `adapter` is not the name of a folder inside `folder`.
    """
    place = local_path(folder)
    if adapter is None or adapter == "default":
        return place
    inside = place / str(adapter)
    plain = isinstance(adapter, str) and adapter == inside.name
    plain = plain and adapter not in ("", ".", "..")
    if not plain or "\\" in adapter or "\0" in adapter:
        raise CheckpointError(
            f"adapter={adapter!r} is not the name of an adapter in {str(place)!r}."
            "\nPass the name of a subfolder, or that folder's path as the first "
            "argument."
        )
    if not inside.resolve().is_relative_to(place.resolve()):
        raise CheckpointError(
            f"{str(inside)!r} leads out of its folder, to {str(inside.resolve())!r}."
            "\nIf that is meant, pass that path itself."
        )
    return inside


def adapters_in(folder: PathLike) -> list[str]:
    """The names of a folder's adapters; its own is called "default".

    Raises:
      CheckpointError: there are none.
    """
    place = adapter_folder(folder, None)
    inner = sorted(p.parent.name for p in place.glob(f"*/{CONFIG}"))
    own = ["default"] if (place / CONFIG).exists() else []
    if not own and not inner:
        read_json(place)  # says what is missing
    return own + inner


# -- reading ---------------------------------------------------------------------------


def read_json(place: Path) -> dict[str, Any]:
    """An adapter's configuration, as it is in the file.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    file = place / CONFIG
    if not file.exists():
        inner = sorted(p.parent.name for p in place.glob(f"*/{CONFIG}"))
        named = ", ".join(f"adapter={name!r}" for name in inner)
        raise CheckpointError(
            f"there is no PEFT adapter at {str(place)!r}: it has no {CONFIG}.\n"
            + (f"Pass one of those inside it: {named}." if inner else "Is it right?")
        )
    return _files.read_json(file)


def read_tensors(place: Path) -> dict[str, np.ndarray]:
    """An adapter's tensors by name.

    Raises:
      CheckpointError: there are none, they are damaged, a pickle, or not of floats.
    """
    file = place / WEIGHTS
    if not file.is_file():
        pickled = (place / PICKLE).exists()
        raise CheckpointError(
            f"{str(place)!r} has no {WEIGHTS}"
            + (
                f", only {PICKLE}: a pickle, which can run code when read.\nConvert "
                "it where you trust it: load it with PEFT and save_pretrained(...)."
                if pickled
                else ".\nCopy or download it beside the configuration."
            )
        )
    for key, header in _files.tensor_headers(file).items():
        is_double = header.dtype == "F64" and jax.config.read("jax_enable_x64")
        if header.dtype not in _FLOATS and not is_double:
            raise CheckpointError(
                f"{str(file)!r}: {key} is of dtype {header.dtype}; jlora reads F32, "
                "F16 and BF16, and F64 with jax_enable_x64."
            )
    return _files.read_tensors(file)


# -- writing ---------------------------------------------------------------------------


def check_free(place: Path, overwrite: bool) -> None:
    """Refuse a file, and to replace an adapter unasked.

    Raises:
      CheckpointError: a file is at `place`, or an adapter and `overwrite` is off.
    """
    what = f"looking for room at {str(place)!r}"
    on_first(what, lambda: _check_free(place, overwrite))


def _check_free(place: Path, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{str(place)!r} is a file; pass a folder.")
    held = [name for name in (CONFIG, WEIGHTS, PICKLE) if (place / name).exists()]
    if held and not overwrite:
        raise CheckpointError(
            f"{str(place)!r} holds an adapter already ({held[0]}).\nPass another "
            "folder, or overwrite=True to replace it."
        )


def write(
    place: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write an adapter beside its place, then put it there.

    Other files in the folder stay. Of several processes the first one writes.

    Raises:
      CheckpointError: it cannot be written; what was there is as it was.
    """

    def on_disk() -> None:
        names = {CONFIG, WEIGHTS, PICKLE}
        with _files.staged(
            place, "the adapter", mark=CONFIG, stale=names.__contains__
        ) as folder:
            _files.write_json(folder / CONFIG, config, "config")
            _files.write_tensors(folder / WEIGHTS, tensors)

    on_first(f"writing the adapter {str(place)!r}", on_disk)
