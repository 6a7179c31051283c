"""Files: local paths, JSON, safetensors and their headers, folders that appear whole.

Nothing here knows JAX, and safetensors is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from jlora._errors import CheckpointError

PathLike = str | os.PathLike[str]

# `Path("gs://bucket")` has lost one of the slashes already.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(
    r"(gs|gcs|s3|s3a|hdfs|viewfs|az|abfs|abfss|adl|wasb|wasbs|r2|oss|cos|dbfs|hf|https?"
    r"|ftps?|sftp|ssh|file|memory):/"
)
# What `transformers` and PEFT want to read in a file before they take it for their own.
_METADATA = {"format": "pt"}
# NumPy's names of what a file holds and safetensors', in whose order tensors lie.
_DTYPES = {
    "uint8": "U8", "int8": "I8", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64",
}  # fmt: skip


# -- paths -----------------------------------------------------------------------------


def local_path(path: PathLike) -> Path:
    """Return a path in full, its home directory expanded.

    Raises:
      CheckpointError: `path` is the address of a bucket or another URL. It would become
        a local folder of that name, and a save that seemed to succeed. Or it is empty,
        or no path.

    >>> local_path("/tmp/run/../adapter").as_posix()
    '/tmp/adapter'
    """
    check_local(path)
    return Path(os.path.abspath(os.path.expanduser(os.fsdecode(path))))


def check_local(path: PathLike) -> None:
    """Refuse the address of a bucket, as `local_path` does.

    Raises:
      CheckpointError: `path` is a URL, or no path at all.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CheckpointError(
            f"{path!r} is no path.\nPass the folder as a string or a pathlib.Path."
        )
    text = os.fsdecode(path)
    found = _URL.match(text) or _COLLAPSED.match(text)
    if found is None:
        return
    if found[1] == "file":
        remedy = "Pass the path alone, without file://."
    else:
        remedy = (
            "jlora reads and writes folders of the file system. Mount the bucket "
            "(gcsfuse, mountpoint-s3, ...) and pass the mounted folder, or copy the "
            "folder with the store's own tool."
        )
    raise CheckpointError(
        f"{text!r} is not a local path: it begins with {found[0]!r}.\n{remedy}"
    )


# -- JSON ------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      CheckpointError: the file is missing, cut off or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{file.name} does not exist in {str(file.parent)!r}.\nIs the path right?"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read as JSON: {error}.\nCopy or download it "
            "again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{str(file)!r} must hold a JSON object, not a {type(value).__name__}."
        )
    return value


def write_json(file: Path, value: Mapping[str, Any], what: str = "a JSON file") -> None:
    """Write a JSON object with its keys in order.

    Raises:
      CheckpointError: JSON cannot hold the values of `what`.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} is saved as JSON: {error}.\nPass numbers, strings, lists and "
            "dicts."
        ) from error
    file.write_text(text + "\n", encoding="utf-8")


# -- safetensors -----------------------------------------------------------------------


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor.

    Attributes:
      dtype: the dtype by safetensors' names, `"BF16"`.
      shape: the shape.
      start: the first byte in the file.
      nbytes: the size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def tensor_headers(file: Path) -> dict[str, TensorHeader]:
    """Return the headers of a safetensors file's tensors, in the file's order.

    Raises:
      CheckpointError: the file is missing, cut off or damaged.
    """
    safetensors = _safetensors()
    try:
        # Opening checks that the file is whole, but does not say where tensors lie.
        with (
            safetensors.safe_open(file, framework="numpy"),
            file.open("rb") as opened,
        ):
            # The format: the header's size, the header, and then the tensors.
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} does not exist.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(_cut_off(file, error)) from error
    header.pop("__metadata__", None)
    found = {}
    for name, x in header.items():
        first, end = x["data_offsets"]
        found[name] = TensorHeader(
            x["dtype"], tuple(x["shape"]), 8 + size + first, end - first
        )
    return found


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a safetensors file by name.

    Raises:
      CheckpointError: the file is missing, cut off or damaged.
    """
    safetensors = _safetensors()
    import ml_dtypes  # noqa: F401, teaches NumPy bfloat16

    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} does not exist.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(_cut_off(file, error)) from error


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file as PyTorch's libraries expect it.

    Raises:
      OSError: the file cannot be written.
    """
    safetensors = _safetensors()
    # Of a view, a transposed one say, its writer takes the memory as it lies.
    whole = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    try:
        safetensors.numpy.save_file(whole, file, metadata=_METADATA)
    except safetensors.SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from error


class TensorFile:
    """A safetensors file that is written a tensor at a time, in `order`.

    None of them is in memory before it is written; safetensors' own writer wants all
    at once. The bytes are the same.

    Args:
      specs: dtype and shape of each tensor, by name.
    """

    def __init__(self, specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        dtypes = {name: _DTYPES[dtype.name] for name, (dtype, _) in specs.items()}
        rank = [*_DTYPES.values()].index
        #: Names, in the order in which the file holds them.
        self.order = sorted(specs, key=lambda name: (-rank(dtypes[name]), name))
        header: dict[str, Any] = {"__metadata__": _METADATA}
        end = 0
        for name in self.order:
            dtype, shape = specs[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtypes[name], "shape": list(shape),
                            "data_offsets": [start, end]}  # fmt: skip
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text

    def begin(self, file: Path) -> None:
        """Write the file's header.

        Raises:
          OSError: the file cannot be written.
        """
        file.write_bytes(self._header)

    @staticmethod
    def append(file: Path, tensor: np.ndarray) -> None:
        """Write the next tensor.

        Raises:
          OSError: the file cannot be written.
        """
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        with file.open("ab") as opened:
            opened.write(content.data)


def _cut_off(file: Path, error: Exception) -> str:
    size = f" ({file.stat().st_size} bytes)" if file.is_file() else ""
    return (
        f"{str(file)!r}{size} cannot be read: {error}.\nIt is cut off or damaged; copy "
        "or download it again."
    )


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "PEFT's adapters and Hugging Face's models are safetensors files, and the "
            'package safetensors is not installed: pip install "jlora[hf]"'
        ) from error
    return safetensors


# -- folders that appear whole ---------------------------------------------------------


@contextlib.contextmanager
def staged(
    target: Path, what: str, *, mark: str, stale: Callable[[str], bool]
) -> Iterator[Path]:
    """Give a folder beside `target` to write into; its files then go into `target`.

    Other files in `target` stay. While files are replaced there is a moment without the
    file `mark`, and none in which old and new ones are taken for one whole. A failure
    or an interruption leaves what was there.

    Args:
      target: the folder to write, which may exist.
      what: what is written, for messages: `"the adapter"`.
      mark: the file without which the others count for nothing, `config.json`; it goes
        first and comes last.
      stale: whether a file that was there belongs to what is replaced, by its name.

    Yields:
      The folder to write into, which holds files alone.

    Raises:
      CheckpointError: something could not be written, and was not.
    """
    target = target.resolve()
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.saving-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        yield folder
        _finish(folder)
        if target.exists():
            _move_in(folder, target, mark, stale)
        else:
            folder.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{what} {str(target)!r} could not be written: {error}.\nWhat was there "
            "before is as it was. See to space and permissions."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _finish(folder: Path) -> None:
    """See that the files are on the disk, and are open to those to whom files are."""
    mask = _umask()
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)  # temporary files are closed to others
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    folder.chmod(0o777 & ~mask)


def _move_in(
    folder: Path, target: Path, mark: str, stale: Callable[[str], bool]
) -> None:
    """Put the files of `folder` in the place of those they replace, or undo it all."""
    new = sorted((p.name for p in folder.iterdir()), key=lambda name: name == mark)
    old = [p.name for p in target.iterdir() if p.name in new or stale(p.name)]
    old.sort(key=lambda name: name != mark)
    replaced = folder / ".replaced"
    replaced.mkdir()
    away, placed = [], []
    try:
        for name in old:
            (target / name).rename(replaced / name)
            away.append(name)
        for name in new:
            (folder / name).rename(target / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (target / name).unlink()
        for name in reversed(away):
            (replaced / name).replace(target / name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
