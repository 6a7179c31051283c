"""A PEFT adapter's folder: found, read with suspicion, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._errors import CheckpointError

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file
except ImportError as error:
    raise ImportError(
        'jlora.peft needs safetensors, which is not installed: pip install "jlora[hf]"'
    ) from error

PathLike = str | os.PathLike[str]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_FLOATS = {"F32", "F16", "BF16"}


def adapter_folder(folder: PathLike, adapter: str | None) -> Path:
    """Where an adapter lies: PEFT keeps all but the one called "default" in subfolders.

    Raises:
      CheckpointError: `adapter` is not the name of a folder inside `folder`.
    """
    place = Path(os.path.abspath(os.path.expanduser(folder)))
    if adapter is None or adapter == "default":
        return place
    inside = place / adapter
    plain = adapter == Path(adapter).name and adapter not in ("", ".", "..")
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
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        inner = sorted(p.parent.name for p in place.glob(f"*/{CONFIG}"))
        named = ", ".join(f"adapter={name!r}" for name in inner)
        raise CheckpointError(
            f"there is no PEFT adapter at {str(place)!r}: it has no {CONFIG}.\n"
            + (f"Pass one of those inside it: {named}." if inner else "Is it right?")
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read as JSON: {error}.\nCopy or download it "
            "again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(file)!r} holds no JSON object.")
    return config


def read_tensors(place: Path) -> dict[str, np.ndarray]:
    """An adapter's tensors by name.

    Raises:
      CheckpointError: there are none, they are damaged, a pickle, or not of floats.
    """
    file = place / WEIGHTS
    if not file.is_file():
        pickled = (place / _PICKLE).exists()
        raise CheckpointError(
            f"{str(place)!r} has no {WEIGHTS}"
            + (
                f", only {_PICKLE}: a pickle, which can run code when read.\nConvert "
                "it where you trust it: load it with PEFT and save_pretrained(...)."
                if pickled
                else ".\nCopy or download it beside the configuration."
            )
        )
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118, it is no mapping
                dtype = opened.get_slice(key).get_dtype()
                wide = dtype == "F64" and jax.config.read("jax_enable_x64")
                if dtype not in _FLOATS and not wide:
                    raise CheckpointError(
                        f"{str(file)!r}: {key} is of dtype {dtype}; jlora reads F32, "
                        "F16 and BF16, and F64 with jax_enable_x64."
                    )
                tensors[key] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} ({file.stat().st_size} bytes) cannot be read: {error}.\n"
            "It is cut off or damaged; copy or download it again."
        ) from error
    return tensors


# -- writing ---------------------------------------------------------------------------


def check_place(place: Path, overwrite: bool) -> None:
    """Refuse a file, and to replace an adapter unasked.

    Raises:
      CheckpointError: so.
    """
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{str(place)!r} is a file; pass a folder.")
    held = [name for name in (CONFIG, WEIGHTS, _PICKLE) if (place / name).exists()]
    if held and not overwrite:
        raise CheckpointError(
            f"{str(place)!r} holds an adapter already ({held[0]}).\nPass another "
            "folder, or overwrite=True to replace it."
        )


def write(
    place: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write an adapter beside its place, then put it there.

    Other files in the folder stay. While an adapter is replaced there is a moment
    without configuration, and none in which old and new are mixed.

    Raises:
      CheckpointError: it cannot be written; what was there is as it was.
    """
    try:
        text = json.dumps(config, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config is saved as JSON: {error}.\nPass numbers, strings, lists and "
            "dicts."
        ) from error
    place = place.resolve()
    staged = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{place.name}.saving-"
        staged = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
        save_file(dict(tensors), staged / WEIGHTS, metadata={"format": "pt"})
        (staged / CONFIG).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            # Temporary files are closed to others; these shall be as usual.
            (staged / name).chmod(0o666 & ~_umask())
            with (staged / name).open("rb+") as opened:
                os.fsync(opened.fileno())
        _put(staged, place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter {str(place)!r} could not be written: {error}.\nWhat was "
            "there before is as it was. See to space and permissions."
        ) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _put(staged: Path, place: Path) -> None:
    if not place.exists():
        staged.chmod(0o777 & ~_umask())
        staged.rename(place)
        return
    moved, new = [], []
    try:
        for name in (CONFIG, WEIGHTS, _PICKLE):
            if (place / name).exists():
                (place / name).rename(staged / f"{name}.old")
                moved.append(name)
        for name in (WEIGHTS, CONFIG):
            (staged / name).rename(place / name)
            new.append(name)
    except BaseException:
        for name in new:
            (place / name).unlink()
        for name in reversed(moved):
            (staged / f"{name}.old").replace(place / name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
