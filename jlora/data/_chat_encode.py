"""Conversations of a stream's rows to columns: an object that processes can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from jlora.data._batches import Column
from jlora.data._chat import conversation_of
from jlora.data._chat_tokens import Answers, Tokenizer, chat_tokens
from jlora.data._shards import Row


@dataclasses.dataclass(frozen=True)
class EncodeChats:
    """Conversations for a language model: `input_ids`, and `labels` on the answers.

    Those without an answer within `longest` tokens are left out.

    Attributes:
      tokenizer: with a chat template (`with_template`).
      longest: the most tokens; what is longer loses its end.
      answers: whether all of the assistant's messages are learned, or the last.
      stops: as in `tokenise_chats`.
      vocabulary: as in `tokenise_chats`.
    """

    tokenizer: Tokenizer
    longest: int
    answers: Answers = "all"
    stops: Collection[int] = ()
    vocabulary: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Column]:
        """Return the columns of rows.

        Raises:
          DataError: a row that is no conversation, and as of `tokenise_chats`.
        """
        said = [conversation_of(row, f"row {n}") for n, row in enumerate(rows, 1)]
        found = chat_tokens(
            self.tokenizer, said, self.longest, self.answers, self.stops,
            self.vocabulary,
        )  # fmt: skip
        return dict(found.columns)
