"""A folder's safetensors, whole or in shards, as one mapping of names to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora._errors import CheckpointError
from jlora._files import read_json, tensor_headers
from jlora._text import listed

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_BITS: dict[str, Any] = {"I8": np.int8, "U8": np.uint8}
_AT_ONCE = 2**24  # bytes
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class TensorFolder:
    """The tensors of a checkpoint folder, none of which is read before it is used.

    Args:
      folder: holds `model.safetensors`, or an index and the shards it names.

    Raises:
      CheckpointError: no safetensors, a shard missing or damaged, an index that does
        not describe its shards, or one that leads out of the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: dict[str, _Held] = {}
        self._hidden: dict[str, _Held] = {}
        for file, names in self._shards().items():
            self._held.update(_contents(folder / file, names))

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._held)

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Call tensors by other names from here on; `None` hides one.

        Raises:
          CheckpointError: two tensors would get one name.
        """
        renamed: dict[str, _Held] = {}
        for old, held in self._held.items():
            name = names.get(old, old)
            if name is None:
                continue
            if name in renamed:
                raise CheckpointError(
                    f"{self.folder} holds both {renamed[name].name} and {held.name}, "
                    "two spellings of one tensor.\nRemove the one that does not belong."
                )
            renamed[name] = held
        self._held = renamed

    def repeat(self, name: str, other: str) -> None:
        """Let a tensor be found by another name, too."""
        self._held[other] = self._held[name]

    def repeat_blocks(self, prefix: str, order: Sequence[int]) -> None:
        """Let block i be the one that is held as block `order[i]`.

        Args:
          prefix: what the names of all blocks begin with, before the number.
          order: for each block from here on its number in the files.
        """
        blocks: dict[str, dict[str, _Held]] = {}
        renamed: dict[str, _Held] = {}
        for name, held in self._held.items():
            number, _, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and number.isdigit():
                blocks.setdefault(number, {})[rest] = held
            else:
                renamed[name] = held
        for i, number_there in enumerate(order):
            for rest, held in blocks.get(str(number_there), {}).items():
                renamed[f"{prefix}{i}.{rest}"] = held
        self._held = renamed

    def where(self, name: str) -> str:
        """Return the path of the file that holds a tensor."""
        return str(self._held[name].file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._held[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype without reading it.

        Raises:
          CheckpointError: it does not hold floating-point numbers.
        """
        dtype = self._held[name].dtype
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.where(name)}: {name} is of dtype {dtype}; jlora.models loads "
                "F64, F32, F16 and BF16.\nQuantised checkpoints need their dense "
                "original."
            )
        return np.dtype(_FLOATS[dtype])

    def view(self, name: str) -> np.ndarray:
        """Return a tensor mapped into memory: only what is used of it is read.

        What was read counts as the process's memory as long as the view lives.
        """
        dtype, held = self.dtype(name), self._held[name]
        if 0 in held.shape:
            return np.empty(held.shape, dtype)  # an empty file region has no mapping
        return np.memmap(held.file, dtype, "r", held.offset, held.shape)

    def hide(self, names: Iterable[str]) -> None:
        """Leave tensors out of `names`; `raw` still finds them."""
        self._hidden.update({name: self._held.pop(name) for name in names})

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor of any dtype, hidden or not, mapped into memory.

        Raises:
          CheckpointError: there is none.
        """
        held = self._held.get(name) or self._hidden.get(name)
        dtype = None if held is None else {**_FLOATS, **_BITS}.get(held.dtype)
        if held is None or dtype is None:
            kind = "is missing" if held is None else f"is of dtype {held.dtype}"
            raise CheckpointError(f"{self.folder}: {name} {kind}.")
        if 0 in held.shape:
            return np.empty(held.shape, dtype)
        return np.memmap(held.file, dtype, "r", held.offset, held.shape)

    def same(self, name: str, other: str) -> bool:
        """Return whether two tensors are equal, a few rows at a time."""
        if name == other or self.shape(name) != self.shape(other):
            return name == other
        views = [np.atleast_1d(self.view(n)) for n in (name, other)]
        rows = max(1, _AT_ONCE // max(1, views[0][:1].nbytes))
        starts = range(0, len(views[0]), rows)
        return all(
            np.array_equal(views[0][i : i + rows], views[1][i : i + rows])
            for i in starts
        )

    def _shards(self) -> dict[str, set[str] | None]:
        """Return each file and the names it must hold, or `None` for any."""
        if (self.folder / WEIGHTS).exists():
            return {WEIGHTS: None}
        if (self.folder / INDEX).exists():
            return self._indexed()
        pickles = [name for name in _PICKLES if (self.folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds its weights as {pickles[0]} only, a pickle, "
                "which can run code when read.\nConvert it where you trust it: "
                "AutoModel.from_pretrained(...).save_pretrained(..., "
                "safe_serialization=True) in PyTorch's transformers."
            )
        raise CheckpointError(
            f"{self.folder} holds neither {WEIGHTS} nor {INDEX}.\nDownload the "
            "weights beside config.json."
        )

    def _indexed(self) -> dict[str, set[str] | None]:
        index = self.folder / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again.")
        shards: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            # A shard lies beside its index; anything else could read foreign files.
            if not isinstance(file, str) or not _is_plain(file):
                raise CheckpointError(
                    f"{index} places {name} in {file!r}, which is no file name in "
                    "this folder.\nThe index is damaged or made to mislead."
                )
            names = shards.setdefault(file, set())
            assert names is not None
            names.add(name)
        missing = [file for file in shards if not (self.folder / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {len(missing)} of {len(shards)} shards that are not "
                f"there:\n  {listed(missing)}\nDownload them beside the index."
            )
        return shards


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, whatever the folder."""
    leads_out = name in ("", ".", "..") or name != Path(name).name or "\\" in name
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        return False
    return not leads_out and size < 256 and "\0" not in name


class _Held(NamedTuple):
    """Where a tensor lies: its file, name, dtype and shape there, and first byte."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _contents(path: Path, names: set[str] | None) -> dict[str, _Held]:
    """Return what a safetensors file holds, after checking that it is whole."""
    headers = tensor_headers(path)
    if names is not None and headers.keys() != names:
        raise CheckpointError(
            f"{path} and {INDEX} disagree on what it holds:\n  "
            f"{listed(headers.keys() ^ names)}\nThey belong to different checkpoints."
        )
    return {
        name: _Held(path, name, x.dtype, x.shape, x.start)
        for name, x in headers.items()
    }
