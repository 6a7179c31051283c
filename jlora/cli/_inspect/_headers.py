"""The headers of safetensors files: names, shapes and dtypes, without the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from jlora._errors import CheckpointError

try:
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise ImportError(
        "reading PEFT adapters and models needs safetensors, which is not installed: "
        'pip install "jlora[hf]"'
    ) from error


class Header(NamedTuple):
    """What a file says of a tensor; the dtype by safetensors' names, `"BF16"`."""

    shape: list[int]
    dtype: str
    bytes: int


def headers(file: Path) -> dict[str, Header]:
    """The headers of all tensors in a file, in the file's order.

    Raises:
      CheckpointError: the file is missing, cut off or damaged.
    """
    try:
        # Opening checks that the file is whole; it tells no tensor's size in bytes.
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            found = json.loads(opened.read(size))
    except FileNotFoundError:
        raise CheckpointError(f"{str(file)!r} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read: {error}.\nIt is cut off or damaged; copy "
            "or download it again."
        ) from error
    found.pop("__metadata__", None)
    return {
        name: Header(
            x["shape"], x["dtype"], x["data_offsets"][1] - x["data_offsets"][0]
        )
        for name, x in found.items()
    }
