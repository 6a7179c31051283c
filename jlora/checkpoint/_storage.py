"""One checkpoint folder: arrays by Orbax, a checked description, whole or not at all.

    path/arrays    the arrays, an Orbax item (OCDBT)
    path/config    JSON: what it is, the digest of every array, a digest of itself

A folder is written beside its place and renamed into it. What was there before is
moved aside first and deleted last; a reader finds one of the two at any moment. Every
process calls what is here; Orbax has each write its shards, and the first one alone
moves folders, while the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora._errors import CheckpointError
from jlora._files import PathLike as PathLike
from jlora._files import local_path as local_path
from jlora._files import read_json
from jlora._processes import agree, on_first
from jlora._text import first_line
from jlora.checkpoint._arrays import as_arrays, encoded, entries_of, named, refilled
from jlora.checkpoint._arrays import wanted as wanted_arrays
from jlora.checkpoint._digests import IN_BLOCKS, LeafPrint, leaf_kind, leaf_prints
from jlora.checkpoint._failures import brief, clear, failure, quiet

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError(
        "jlora.checkpoint needs orbax-checkpoint, which is not installed: "
        'pip install "jlora[train]"'
    ) from error

Tree = Any
Config = dict[str, Any]

VERSION = 2
LOADERS = {
    "adapter": "jlora.checkpoint.load_adapter",
    "state": "jlora.checkpoint.restore_state",
    "merged": "jlora.checkpoint.load_merged",
}
_PATIENCE = 30.0  # seconds until a shared file system shows what another process wrote


class DamagedError(CheckpointError):
    """A checkpoint that was cut off or changed since it was written."""


# -- writing ---------------------------------------------------------------------------


def save_args(kind: str, arrays: Tree, config: Config) -> Any:
    """The Orbax arguments that save a checkpoint."""
    arrays = as_arrays(arrays)
    described = describe(kind, arrays, config)
    return ocp.args.Composite(
        arrays=ocp.args.StandardSave(encoded(arrays)),
        config=ocp.args.JsonSave(described),
    )


def describe(kind: str, arrays: Tree, config: Config) -> Config:
    """The config, with the digests of the arrays and of itself.

    Raises:
      CheckpointError: JSON cannot hold it.
    """
    described = {
        **config,
        "kind": kind,
        "version": VERSION,
        "jlora": jlora.__version__,
        "arrays": entries_of(named(arrays)),
    }
    try:
        text = json.dumps(described)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata, metrics and data_position are saved as JSON: {error}.\nPass "
            "numbers, strings, lists and dicts; int(x) and float(x) of arrays."
        ) from error
    described = json.loads(text)  # keys are strings from here on
    return {**described, "checksum": _checksum(described)}


def write(path: Path, kind: str, arrays: Tree, config: Config) -> None:
    """Write a checkpoint; what was at `path` stays until the new one is in place.

    Raises:
      CheckpointError: it could not be written, on whichever process.
    """
    what = f"writing the checkpoint {str(path)!r}"
    args = save_args(kind, arrays, config)
    new = path.with_name(f".{path.name}.new")
    error: Exception | None = None
    try:
        on_first(what, lambda: _make_room(path, new))
        agree(what, failure(lambda: _save(new, args)))
        on_first(what, lambda: replace(path, new))
        agree(what, failure(lambda: _await(path)))
    except Exception as raised:
        error = raised
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(new, ignore_errors=True)
        if jax.process_index() == 0 and error is not None:
            clear(path.parent, f"{new.name}*")
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} could not be written: {brief(error)}.\n"
            "What was there before is as it was. See to space and permissions."
        ) from error


def _make_room(path: Path, new: Path) -> None:
    """Clear away what an interrupted write has left, and undo a half replacement."""
    recover(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (new, *path.parent.glob(f"{new.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(left, ignore_errors=True)


def _save(new: Path, args: Any) -> None:
    with quiet(), _checkpointer() as checkpointer:
        checkpointer.save(new, args=args)


def _await(path: Path) -> None:
    """Wait until this process sees what the first one has put in place."""
    patience = time.monotonic() + _PATIENCE
    while not (path / "config").is_dir():
        if time.monotonic() > patience:
            raise CheckpointError(
                f"process {jax.process_index()} does not see the checkpoint "
                f"{str(path)!r} that process 0 has written.\nPass a folder on a file "
                "system that all processes share."
            )
        time.sleep(0.1)


def replace(path: Path, new: Path) -> None:
    """Put `new` in the place of `path`, which is deleted last."""
    if not path.exists():
        os.rename(new, path)
        return
    previous = previous_of(path)
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(path, previous)
    os.rename(new, path)
    shutil.rmtree(previous)


def previous_of(path: Path) -> Path:
    """Where a folder waits while it is being replaced."""
    return path.with_name(f".{path.name}.previous")


def recover(path: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    if not path.exists() and previous_of(path).exists():
        os.rename(previous_of(path), path)


def check_free(path: Path, overwrite: bool) -> None:
    """As `check_place`, of several processes by the first, before it writes.

    Raises:
      CheckpointError: something is there that is not to be replaced.
    """
    what = f"looking for room at {str(path)!r}"
    on_first(what, lambda: check_place(path, overwrite))


def check_place(path: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless told to, or what is no checkpoint.

    Raises:
      CheckpointError: something is there that is not to be replaced.
    """
    recover(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / "config").is_dir() and not (path / "arrays").is_dir():
        raise CheckpointError(
            f"{str(path)!r} exists and is not a checkpoint of jlora; it is left alone."
            "\nPass another path."
        )
    if not overwrite:
        raise CheckpointError(
            f"{str(path)!r} holds a checkpoint already.\nPass another path, or "
            "overwrite=True to replace it."
        )


# -- reading ---------------------------------------------------------------------------


def read_config(path: Path, kind: str | None) -> Config:
    """A checkpoint's description; with None, of whatever kind it is.

    Raises:
      CheckpointError: there is none, it is damaged, or of another kind.
    """
    found = path if path.exists() else previous_of(path)
    if not found.exists():
        raise CheckpointError(
            f"there is no checkpoint at {str(path)!r}.{_neighbours(path)}"
        )
    if not (found / "config").is_dir():
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of jlora: it has no `config`.\nPass "
            "the folder that jlora.checkpoint wrote, not one above or inside it."
        )
    try:
        config = read_json(found / "config" / "metadata")  # Orbax's name for it
    except CheckpointError as error:
        raise DamagedError(_damaged(path, first_line(error))) from error
    stated = config.pop("checksum", None)
    if stated != _checksum(config):
        raise DamagedError(_damaged(path, "its description fails its checksum"))
    if config["version"] > VERSION:
        raise CheckpointError(
            f"{str(path)!r} was written by jlora {config['jlora']}, in a newer format "
            f"than jlora {jlora.__version__} reads.\nUpgrade jlora."
        )
    if kind is not None and config["kind"] != kind:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of kind {config['kind']!r}, not {kind!r}."
            f"\nLoad it with {LOADERS.get(config['kind'], 'what wrote it')}."
        )
    return config


def read_arrays(path: Path, config: Config, template: Tree = None) -> Tree:
    """A checkpoint's arrays, each checked against its digest.

    Args:
      path: the checkpoint.
      config: from `read_config`.
      template: a tree of arrays or shapes to restore into, with their shardings; None
        restores nested dicts and lists onto the default device.

    Raises:
      CheckpointError: leaves are missing, of another shape or dtype, or damaged.
    """
    found = path if path.exists() else previous_of(path)
    saved = {name: LeafPrint.from_json(x) for name, x in config["arrays"].items()}
    if template is None:
        tree = _read(found, arrays=ocp.args.StandardRestore())["arrays"]
    else:
        template = as_arrays(template)
        _check_leaves(path, saved, template)
        some = ocp.args.StandardRestore(wanted_arrays(template))
        restored = _read(found, arrays=some)["arrays"]
        tree = refilled(template, restored, config["arrays"])
    arrays = named(tree)
    prints = leaf_prints(
        list(arrays.values()), in_blocks=config["version"] >= IN_BLOCKS
    )
    for name, x in zip(arrays, prints, strict=True):
        if name not in saved or x.digest != saved[name].digest:
            raise DamagedError(
                _damaged(path, f"the array {name!r} has other values than were saved")
            )
    return tree


def _read(path: Path, **args: Any) -> Any:
    try:
        with quiet(), _checkpointer() as checkpointer:
            return checkpointer.restore(path, args=ocp.args.Composite(**args))
    except Exception as error:
        raise DamagedError(_damaged(path, brief(error))) from error


def _check_leaves(path: Path, saved: Mapping[str, LeafPrint], template: Tree) -> None:
    wanted = {name: leaf_kind(x) for name, x in named(template).items()}
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    other = [
        f"{name!r} is {saved[name].kind} there and {x.kind} here"
        for name, x in wanted.items()
        if name in saved and saved[name].kind != x.kind
    ]
    if not (missing or extra or other):
        return
    lines = [f"the checkpoint {str(path)!r} does not fit what it is restored into."]
    lines += _listing("not in the checkpoint", [repr(x) for x in missing])
    lines += _listing("only in the checkpoint", [repr(x) for x in extra])
    lines += _listing("different", other)
    lines.append(
        "Restore into what was saved: the same model, targets and ranks, the same "
        "optimiser."
    )
    raise CheckpointError("\n".join(lines))


def _listing(title: str, entries: list[str], most: int = 5) -> list[str]:
    if not entries:
        return []
    more = f", and {len(entries) - most} more" if len(entries) > most else ""
    return [f"  {title} ({len(entries)}): " + "; ".join(entries[:most]) + more]


# -- words -----------------------------------------------------------------------------


def _checkpointer() -> Any:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _checksum(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _damaged(path: Path, what: str) -> str:
    return (
        f"the checkpoint {str(path)!r} cannot be read: {what}.\nIt was cut off or "
        "changed since it was written. Restore another one."
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f" Beside it are: {', '.join(names[:8])}." if names else ""
