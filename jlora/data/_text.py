"""Text files as text: decompressed, decoded as their first bytes say, cut into lines.

Nothing is guessed into other content: text is UTF-8, or what a byte order mark names;
anything else is an error that says what the bytes look like.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from jlora._errors import DataError

# What packs a file: its suffix, the bytes it begins with.
_PACKED: dict[str, bytes] = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
}
# UTF-32's little-endian mark begins with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What else a file may turn out to be.
_KINDS = (
    (b"PAR1", "a Parquet table (its name should end in .parquet)"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"%PDF", "a PDF document"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "packed by gzip (its name should end in .gz)"),
    (b"BZh9", "packed by bzip2 (its name should end in .bz2)"),
    (b"\xfd7zXZ\x00", "packed by xz (its name should end in .xz)"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd (its name should end in .zst)"),
)


def unpacked_name(path: Path) -> str:
    """Return the file's name without the suffix of what packs it.

    >>> unpacked_name(Path("corpus.de.gz"))
    'corpus.de'
    """
    return path.stem if path.suffix.lower() in _PACKED else path.name


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked if its name ends in .gz, .bz2, .xz or .zst.

    Raises:
      DataError: no such file, or one that is not packed as its name says.
    """
    suffix = path.suffix.lower()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if suffix not in _PACKED:
        return data
    _check_packed(path, data)
    try:
        return _unpacked(path, _OPEN[suffix](data), max(_LEAST, _MOST * len(data)))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error}.") from error


def check_packed(path: Path) -> None:
    """Refuse a file that is not there, or not packed as its name says.

    Raises:
      DataError: it is so.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    _check_packed(path, start)


def _check_packed(path: Path, data: bytes) -> None:
    suffix = path.suffix.lower()
    if not data.startswith(_PACKED.get(suffix, b"")):
        raise DataError(
            f"{path} cannot be read: it is not packed as its name says ({suffix}).\n"
            "Rename it, or fetch it again."
        )


def _unpacked(path: Path, stream: Any, limit: int) -> bytes:
    """Return what a stream holds, if that is not out of all proportion.

    A few bytes can be made to unpack to more than a machine has.
    """
    parts, size = [], 0
    with stream:
        while part := stream.read(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise DataError(
                    f"{path} unpacks to more than {_MOST} times its size, which no "
                    "text does.\nUnpack it yourself, if it is what it should be."
                )
    return b"".join(parts)


def open_zstd(stream: BinaryIO) -> Any:
    """Return what a stream packed by zstd unpacks to.

    Raises:
      DataError: the library is not there.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            "to read .zst files pyarrow is needed: pip install pyarrow"
        ) from error
    return pyarrow.CompressedInputStream(stream, "zstd")


_OPEN: dict[str, Callable[[bytes], Any]] = {
    ".gz": lambda data: gzip.GzipFile(fileobj=io.BytesIO(data)),
    ".bz2": lambda data: bz2.BZ2File(io.BytesIO(data)),
    ".xz": lambda data: lzma.LZMAFile(io.BytesIO(data)),  # noqa: SIM115, closed by its reader
    ".zst": lambda data: open_zstd(io.BytesIO(data)),
}
_CHUNK = 2**20  # bytes
_MOST = 200  # times its size that a file may unpack to
_LEAST = 2**28  # bytes that any file may


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8, or the encoding that a byte order mark names.

    Raises:
      DataError: the file cannot be read, or is not such text; the message names the
        line, or what the file looks like.
    """
    data = read_bytes(path)
    mark, encoding = next(
        ((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8")
    )
    data = data.removeprefix(mark)
    kind = next((kind for start, kind in _KINDS if data.startswith(start)), None)
    if kind is not None:
        raise DataError(f"{path} is no text: it looks like {kind}.")
    if encoding == "utf-8" and b"\0" in data:
        raise DataError(f"{path} {_nul_bytes(data)}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(_undecodable(path, data, encoding, error)) from error
    if "\0" in text:
        raise DataError(f"{path} is no text: it holds NUL characters.")
    if "\n" not in text and "\r" in text.strip("\r"):
        raise DataError(
            f"{path}: its lines end in a carriage return alone.\nConvert them, for "
            f"instance with: tr '\\r' '\\n' < {path.name} > NEW"
        )
    return text


def _nul_bytes(data: bytes) -> str:
    """Say what a file with NUL bytes and without a byte order mark looks like."""
    start = data[:4096]
    nuls = [start[offset::4].count(0) for offset in range(4)]
    most = len(start) / 4 * 0.6
    if sum(n > most for n in nuls) == 3:
        name = "UTF-32LE" if nuls[0] <= most else "UTF-32BE"
    elif min(nuls[1], nuls[3]) > max(nuls[0], nuls[2]):
        name = "UTF-16LE"
    elif min(nuls[0], nuls[2]) > max(nuls[1], nuls[3]):
        name = "UTF-16BE"
    else:
        return "is no text: it holds NUL bytes, and so is some binary file."
    return (
        f"is not UTF-8: its NUL bytes look like {name} without a byte order mark.\n"
        f"Convert the text: iconv -f {name} -t UTF-8 FILE > NEW"
    )


def _undecodable(
    path: Path, data: bytes, encoding: str, error: UnicodeDecodeError
) -> str:
    if encoding != "utf-8":
        return (
            f"{path}: its byte order mark says {encoding.upper()}, but it is not "
            f"({error.reason} at byte {error.start})."
        )
    line = data.count(b"\n", 0, error.start) + 1
    column = error.start - data.rfind(b"\n", 0, error.start)
    return (
        f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x} at column "
        f"{column}).\nFind out its encoding (an older one of its language, such as "
        "windows-1252 or windows-1250) and convert the text, for instance with: "
        "iconv -f ENCODING -t UTF-8 FILE > NEW"
    )


def read_lines(path: str | Path) -> list[str]:
    r"""Read a text file's lines, without the white space around each.

    Lines end in `\n` or `\r\n`; other characters that Unicode calls line ends are
    part of a line, so that line n stays line n.

    Args:
      path: the file; unpacked if its name ends in .gz, .bz2, .xz or .zst.

    Raises:
      DataError: as `read_text`.
    """
    return [line.strip().lstrip("\ufeff") for line in raw_lines(read_text(Path(path)))]


def raw_lines(text: str) -> list[str]:
    """Cut text into lines, without their ends."""
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
