"""A folder's safetensors, whole or in shards, as one mapping of names to tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora._errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      CheckpointError: the file is missing, cut off or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist.\nA checkpoint folder holds config.json and "
            "model.safetensors; is the path right?"
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as JSON: {error}.\nCopy or download it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(value)}.")
    return value


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return `names` for an error message, the first few and how many more."""
    names = sorted(names)
    more = [f"... and {len(names) - most} more"] if len(names) > most else []
    return "\n  ".join(names[:most] + more)


class TensorFolder:
    """Reads the tensors of a checkpoint folder one at a time.

    A context manager: the files are open inside `with`.

    Args:
      folder: holds `model.safetensors`, or an index and the shards it names.

    Raises:
      CheckpointError: no safetensors, a shard missing or damaged, an index that does
        not describe its shards, or one that leads out of the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, str] = {}
        self._held_as: dict[str, str] = {}  # a name here to the file's, where renamed
        self._open: dict[str, Any] = {}

    def __enter__(self) -> TensorFolder:
        try:
            for file, names in self._shards().items():
                self._open_shard(file, names)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def rename(self, spelling: Mapping[str, str | None]) -> None:
        """Call tensors by other names from here on; `None` hides one.

        Raises:
          CheckpointError: two tensors would get one name.
        """
        file_of: dict[str, str] = {}
        held_as: dict[str, str] = {}
        for old, file in self._file_of.items():
            name = spelling.get(old, old)
            if name is None:
                continue
            held = self._held_as.get(old, old)
            if name in file_of:
                raise CheckpointError(
                    f"{self.folder} holds both {held_as[name]} and {held}, two "
                    "spellings of one tensor.\nRemove the one that does not belong."
                )
            file_of[name], held_as[name] = file, held
        self._file_of, self._held_as = file_of, held_as

    def where(self, name: str) -> str:
        """Return the path of the file that holds a tensor."""
        return str(self.folder / self._file_of[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        file = self._open[self._file_of[name]]
        return file.get_slice(self._held_as.get(name, name))

    def read(self, name: str) -> np.ndarray:
        """Return a tensor.

        Raises:
          CheckpointError: it does not hold floating-point numbers.
        """
        dtype = self._slice(name).get_dtype()
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.where(name)}: {name} is of dtype {dtype}; jlora.models loads "
                "F64, F32, F16 and BF16.\nQuantised checkpoints need their dense "
                "original."
            )
        file = self._open[self._file_of[name]]
        return file.get_tensor(self._held_as.get(name, name))

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
            if not isinstance(file, str) or file != Path(file).name or "\\" in file:
                raise CheckpointError(
                    f"{index} places {name} in {file!r}, which is no file name in "
                    "this folder.\nThe index is damaged or made to mislead."
                )
            names = shards.setdefault(file, set())
            assert names is not None
            names.add(name)
        missing = [file for file in shards if not (self.folder / file).exists()]
        if missing:
            raise CheckpointError(
                f"{index} names {len(missing)} of {len(shards)} shards that are not "
                f"there:\n  {listed(missing)}\nDownload them beside the index."
            )
        return shards

    def _open_shard(self, file: str, names: set[str] | None) -> None:
        path = self.folder / file
        try:
            opened = self._stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes) cannot be read: {error}.\n"
                "It is cut off or damaged; copy or download it again."
            ) from error
        held = set(opened.keys())
        if names is not None and held != names:
            raise CheckpointError(
                f"{path} and {INDEX} disagree on what it holds:\n  "
                f"{listed(held ^ names)}\nThey belong to different checkpoints."
            )
        self._open[file] = opened
        self._file_of.update(dict.fromkeys(held, file))
