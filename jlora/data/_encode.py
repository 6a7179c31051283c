"""What makes columns of a stream's rows: objects that worker processes can be told."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora._errors import DataError
from jlora.data._batches import Column, Shape, is_ragged, shapes_for
from jlora.data._languages import Direction, direction
from jlora.data._parallel import Empty
from jlora.data._shards import Row
from jlora.data._sources import Mixture, Source
from jlora.data._table import as_text
from jlora.data._tokens import Tokenizer, token_rows


@dataclasses.dataclass(frozen=True)
class EncodeTexts:
    """Texts for a language model: `input_ids`, and `labels`, the same.

    Empty texts are left out.

    Attributes:
      tokenizer: from `load_tokenizer`.
      longest: the most tokens of an example, the end token included.
      column: which column of the rows holds the text.
      split: make several examples of a longer text, rather than cut it.
      end: as in `tokenise`.
      vocabulary: as in `tokenise`.
    """

    tokenizer: Tokenizer
    longest: int
    column: str = "text"
    split: bool = False
    end: bool | int = True
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Column]:
        """Return the columns of rows."""
        texts = [text for row in rows if (text := text_of(row, self.column))]
        found = token_rows(
            self.tokenizer,
            texts,
            None if self.split else self.longest,
            end=self.end,
            vocabulary=self.vocabulary,
        )
        parts = [
            ids[start : start + self.longest]
            for ids in found
            for start in range(0, len(ids), self.longest)
        ]
        return {"input_ids": parts, "labels": [ids.copy() for ids in parts]}


@dataclasses.dataclass(frozen=True)
class EncodePairs:
    """Pairs for an encoder-decoder: `input_ids`, and `labels`, the targets.

    Attributes:
      tokenizer: from `load_tokenizer`.
      way: the direction, such as `"de-en"`. A row is WMT's
        `{"translation": {"de": ..., "en": ...}}`, or has the columns `de` and `en`, or
        `source` and `target` (then already in that direction).
      longest: the most tokens of a source, and of a target.
      prefix: put before each source.
      empty: what to do with a pair of which a side is empty: an error, or leave it out.
      end: as in `tokenise`.
      vocabulary: as in `tokenise`.
    """

    tokenizer: Tokenizer
    way: Direction | str
    longest: tuple[int, int]
    prefix: str = ""
    empty: Empty = "error"
    end: bool | int = True
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Column]:
        """Return the columns of rows."""
        pairs = [self._pair(row) for row in rows]
        if self.empty == "error":
            bad = next((i for i, pair in enumerate(pairs) if not all(pair)), None)
            if bad is not None:
                raise DataError(
                    f"a side of the pair {rows[bad]} is empty.\nMend the corpus, or "
                    'leave such pairs out with empty="skip".'
                )
        pairs = [pair for pair in pairs if all(pair)]
        sides = [[source for source, _ in pairs], [target for _, target in pairs]]
        sources, targets = (
            token_rows(
                self.tokenizer,
                texts,
                longest,
                prefix=prefix,
                end=self.end,
                vocabulary=self.vocabulary,
            )
            for texts, longest, prefix in zip(
                sides, self.longest, (self.prefix, ""), strict=True
            )
        )
        return {"input_ids": sources, "labels": targets}

    def _pair(self, row: Row) -> tuple[str, str]:
        one, two = direction(self.way) if isinstance(self.way, str) else self.way
        if isinstance(row.get("translation"), Mapping):
            row = row["translation"]
        if one not in row and {"source", "target"} <= row.keys():
            one, two = "source", "target"
        return text_of(row, one), text_of(row, two)


def text_of(row: Row, column: str) -> str:
    """Return the text in a row's column.

    Raises:
      DataError: there is no such column, or no text in it.
    """
    if column not in row:
        names = ", ".join(row) or "(none)"
        raise DataError(f"a row has the columns {names}, not {column!r}.")
    try:
        return as_text(row[column])
    except DataError as error:
        raise DataError(f"the column {column!r} {error}") from None


def sample_shapes(
    source: Source,
    encode: Callable[[list[Row]], Mapping[str, Column]],
    longest: int | Sequence[int],
    buckets: int = 3,
    *,
    rows: int = 2000,
) -> list[Shape]:
    """Return shapes for a `Streaming` from the first rows of a source.

    Args:
      source: the source.
      encode: as in `Streaming`.
      longest: the most tokens of any example; one number, or one for each column of
        sequences in their order. The last shape holds so many.
      buckets: the most shapes.
      rows: how many rows to look at.

    Raises:
      DataError: what reading and encoding raise.
    """
    first = Mixture([source], [1.0], None, endless=False).take(rows, 0)
    ragged = {n: list(c) for n, c in encode(first).items() if is_ragged(c)}
    most = itertools.repeat(longest) if isinstance(longest, int) else longest
    lengths: dict[str, Any] = {
        name: [*column, np.zeros(length, np.int32)]
        for (name, column), length in zip(ragged.items(), most, strict=False)
    }
    return shapes_for([lengths], buckets)
