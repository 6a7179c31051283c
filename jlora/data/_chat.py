"""Conversations and preferences, read from tables to the letter.

messages                      [{"role": "user", "content": "..."}, ...]
prompt, completion            messages, or text: a user's and the assistant's
prompt, chosen, rejected      the same of two answers, of which one is preferred
chosen, rejected              messages that begin alike, with the prompt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora._errors import DataError
from jlora.data._table import Table, read_table

ROLES = ("system", "developer", "user", "assistant")
ASSISTANT = "assistant"


class Message(NamedTuple):
    """What somebody says in a conversation.

    Attributes:
      role: `system`, `developer`, `user` or `assistant`.
      content: the text.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in their order.

    Attributes:
      messages: the messages.
      place: where they were read, for messages to a user; it makes no difference.
      first: the number of the first message whose answers are to be learned; those
        before it are a prompt.
    """

    messages: tuple[Message, ...]
    place: str = dataclasses.field(default="a conversation", compare=False)
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
      prompt: the messages before.
      chosen: the answer that is preferred, most often one message.
      rejected: the other one.
      place: where they were read.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    place: str = dataclasses.field(default="a preference", compare=False)


Files = str | Path | Table | Iterable[str | Path | Table]


def read_conversations(files: Files) -> list[Conversation]:
    """Read conversations to learn answers from.

    Args:
      files: tables as `read_table` reads them, or such tables: with a column
        `messages`, or with `prompt` and `completion`.

    Raises:
      DataError: other columns, messages that are not of that form, or none of the
        assistant's; it names the line.
    """
    return [c for table in _tables(files) for c in _conversations(table)]


def read_preferences(files: Files) -> list[Preference]:
    """Read prompts with an answer that is preferred and one that is not.

    Args:
      files: tables as `read_table` reads them, or such tables: with `chosen` and
        `rejected`, and with `prompt` where these do not begin with it.

    Raises:
      DataError: other columns, messages that are not of that form, answers that are
        not the assistant's; it names the line.
    """
    return [p for table in _tables(files) for p in _preferences(table)]


def _tables(files: Files) -> list[Table]:
    several = [files] if isinstance(files, str | Path | Table) else list(files)
    return [x if isinstance(x, Table) else read_table(x) for x in several]


def _conversations(table: Table) -> Iterable[Conversation]:
    names = _columns_of(table.columns)
    if names is None:
        raise DataError(_no_columns(table, "messages, or prompt and completion"))
    for row, cells in enumerate(_cells(table, *names)):
        yield _conversation(dict(zip(names, cells, strict=True)), table.place(row))


def _columns_of(columns: Iterable[str]) -> tuple[str, ...] | None:
    known = set(columns)
    sides = ("prompt", "completion")
    return (
        ("messages",) if "messages" in known else sides if known >= {*sides} else None
    )


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """Return the conversation of a row with such columns as tables have.

    Raises:
      DataError: as of `read_conversations`.
    """
    if _columns_of(row) is None:
        names = ", ".join(row) or "(none)"
        raise DataError(
            f"{place} has the columns {names}; expected are messages, or prompt and "
            "completion."
        )
    return _conversation(row, place)


def _conversation(row: Mapping[str, Any], place: str) -> Conversation:
    if "messages" in row:
        messages = _messages(row["messages"], f"{place}, column messages")
        return _with_answer(Conversation(messages, place), row)
    prompt = _side(row["prompt"], "user", f"{place}, column prompt")
    answer = _side(row["completion"], ASSISTANT, f"{place}, column completion")
    whole = Conversation((*prompt, *answer), place, len(prompt))
    return _with_answer(whole, row)


def _with_answer(said: Conversation, row: Mapping[str, Any]) -> Conversation:
    if not any(m.role == ASSISTANT for m in said.messages[said.first :]):
        where = "messages" if "messages" in row else "completion"
        raise DataError(
            f"{said.place}, column {where}: no message is the assistant's, and there "
            "is nothing to learn."
        )
    return said


def _preferences(table: Table) -> Iterable[Preference]:
    if not {"chosen", "rejected"} <= set(table.columns):
        raise DataError(_no_columns(table, "prompt, chosen and rejected"))
    has_prompt = "prompt" in table.columns
    names = ("chosen", "rejected", *(("prompt",) if has_prompt else ()))
    for row, cells in enumerate(_cells(table, *names)):
        place = table.place(row)
        chosen, rejected = (
            _side(cell, ASSISTANT, f"{place}, column {name}")
            for cell, name in zip(cells, names[:2], strict=False)
        )
        if has_prompt:
            prompt = _side(cells[2], "user", f"{place}, column prompt")
        else:
            prompt = _common(chosen, rejected, place)
        # Much of the hub repeats the prompt at the head of both answers.
        sides = [_without(prompt, x) for x in (chosen, rejected)]
        for name, side in zip(names, sides, strict=False):
            if not side or any(m.role != ASSISTANT for m in side):
                raise DataError(
                    f"{place}, column {name}: beyond the prompt there is not the "
                    "assistant's answer alone, but "
                    f"{[m.role for m in side] or 'nothing'}."
                )
        yield Preference(prompt, sides[0], sides[1], place)


def _common(
    one: tuple[Message, ...], other: tuple[Message, ...], place: str
) -> tuple[Message, ...]:
    """The messages with which both begin; an answer is left to each."""
    same = 0
    for x, y in zip(one[:-1], other[:-1], strict=False):
        if x != y:
            break
        same += 1
    if not same:
        raise DataError(
            f"{place}: there is no column prompt, and chosen and rejected do not begin "
            "with the same messages."
        )
    return one[:same]


def _without(
    prompt: tuple[Message, ...], answer: tuple[Message, ...]
) -> tuple[Message, ...]:
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _cells(table: Table, *names: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(table.cells(name) for name in names), strict=True)


def _side(cell: Any, role: str, where: str) -> tuple[Message, ...]:
    """Messages, or text that is one message of a role."""
    if isinstance(cell, str):
        return (_message(role, cell, where),)
    return _messages(cell, where)


def _messages(cell: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(cell, list | tuple) or not cell:
        raise DataError(
            f'{where}: {_short(cell)} is no list of messages, each {{"role": "user", '
            '"content": "..."}.'
        )
    return tuple(_read(x, f"{where}, message {n}") for n, x in enumerate(cell, 1))


def _read(x: Any, where: str) -> Message:
    if not isinstance(x, Mapping) or not {"role", "content"} <= x.keys():
        raise DataError(f"{where}: {_short(x)} is no object with role and content.")
    # Parquet gives every message all fields that one of them has.
    more = {k: v for k, v in x.items() if k not in ("role", "content") and v}
    if more:
        raise DataError(
            f"{where} has {', '.join(more)} beside role and content, which would be "
            "lost.\nWrite what it says into the content, or take it out."
        )
    return _message(x["role"], x["content"], where)


def _message(role: Any, content: Any, where: str) -> Message:
    if role not in ROLES:
        raise DataError(
            f"{where}: the role {_short(role)} is none of {', '.join(ROLES)}."
        )
    if not isinstance(content, str):
        raise DataError(f"{where}: the content {_short(content)} is no text.")
    if not content.strip():
        raise DataError(f"{where}: the {role}'s content is empty.")
    return Message(role, content)


def _no_columns(table: Table, wanted: str) -> str:
    names = ", ".join(table.columns) or "(none)"
    return f"{table.name} has the columns {names}; expected are {wanted}."


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:57]}..."
