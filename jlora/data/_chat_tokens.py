"""Conversations to tokens by the tokenizer's chat template; answers alone are learned.

Where the template marks what the assistant says (`{% generation %}`), those marks tell
what is an answer. Elsewhere an answer is what the text of the messages up to it has
more than the text before it with the template's call for an answer; that the one
begins with the other is checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jlora._errors import DataError
from jlora.data._batches import IGNORED
from jlora.data._chat import ASSISTANT, Conversation, Message, Preference
from jlora.data._text import read_text

Tokenizer = Any
Span = tuple[int, int]
Answers = Literal["all", "last"]

# Needs no tokens beyond those of any tokenizer with an end token.
PLAIN = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- 'Assistant:' }}
        {%- generation %}
        {{- ' ' + message['content'] + eos_token }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['role'] | capitalize + ': ' + message['content'] + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""


class ChatTokens(NamedTuple):
    """Conversations as tokens.

    Attributes:
      columns: for `Batches` and `pack`: `input_ids` and `labels`, these `IGNORED` but
        at the assistant's answers.
      kept: the numbers of the conversations that are in.
      longest: the most tokens.
      examples: how many conversations there were.
      cut: how many were longer, and lost their ends alone.
      lost: how many had no answer left then, and were left out.
      endless: how many end with an answer after which the model does not stop.
    """

    columns: dict[str, list[np.ndarray]]
    kept: list[int]
    longest: int
    examples: int
    cut: int
    lost: int
    endless: int

    def remarks(self, name: str) -> list[str]:
        """Return what a user should know of these conversations, a sentence each."""
        n, said = self.examples, []
        if self.cut:
            said.append(
                f"{name}: {self.cut:,} of {n:,} conversations are longer than "
                f"{self.longest} tokens; their ends were cut."
            )
        if self.lost:
            said.append(
                f"{name}: {self.lost:,} of {n:,} conversations have no answer within "
                f"{self.longest} tokens and were left out."
            )
        if self.endless:
            said.append(
                f"{name}: {self.endless:,} of {n:,} conversations end with an answer "
                "without a token that generation stops at: the template and the "
                "model's eos_token_id differ."
            )
        return said


def with_template(tokenizer: Tokenizer, template: str | Path | None) -> Tokenizer:
    """Give a tokenizer a chat template; without one see that it has one.

    Args:
      tokenizer: is changed, and saves the template with itself.
      template: a file with a Jinja template; `"plain"`, one that needs no tokens of
        its own; None is that of the tokenizer.

    Raises:
      DataError: there is no such file, no template at all, or no tokenizer of the kind
        that knows where in a text its tokens are.
    """
    if template is not None:
        plain = str(template) == "plain"
        tokenizer.chat_template = PLAIN if plain else read_text(Path(template))
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, as those of base models have none."
            "\nTake the model that was tuned for chat, or name a template: a Jinja "
            "file, or plain."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text."
            "\nTake a tokenizer that has a tokenizer.json."
        )
    return tokenizer


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
    """Return messages as the tokens that call for the next answer, int32."""
    text = _rendered(tokenizer, messages, "the prompt", answer=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(ids, np.int32)


def tokenise_chats(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    longest: int,
    *,
    answers: Answers = "all",
    stops: Collection[int] = (),
    vocabulary: int | None = None,
) -> ChatTokens:
    """Tokenise conversations, with labels on the assistant's answers.

    An answer's label ends with what the template writes behind it, the token of its end
    among that: a model learns to stop by it.

    Args:
      tokenizer: with a chat template (`with_template`).
      conversations: from `read_conversations`.
      longest: the most tokens; what is longer loses its end, and is counted.
      answers: whether all of the assistant's messages are learned, or the last.
      stops: the tokens at which the model stops, to see that answers end with one.
      vocabulary: how many tokens the model knows.

    Raises:
      DataError: the template refuses a conversation, or writes it otherwise once more
        messages follow; no conversation is left; a token is beyond the vocabulary.
    """
    found = chat_tokens(tokenizer, conversations, longest, answers, stops, vocabulary)
    if not found.kept:
        raise DataError(
            f"of {len(conversations)} conversations none has an answer within "
            f"{longest} tokens.\nAllow longer ones."
        )
    return found


def chat_tokens(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    longest: int,
    answers: Answers,
    stops: Collection[int],
    vocabulary: int | None,
) -> ChatTokens:
    """As `tokenise_chats`, of conversations of which none need be left."""
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    kept, cut, lost, endless = list[int](), 0, 0, 0
    for number, said in enumerate(conversations):
        ids, is_answer = _tokens_of(tokenizer, said, answers)
        _check_known(tokenizer, ids, said.place, vocabulary)
        labels = np.where(is_answer, ids, IGNORED)
        last = labels[is_answer][-2:]
        endless += bool(stops) and not set(last.tolist()) & set(stops)
        is_long = len(ids) > longest
        ids, labels = ids[:longest], labels[:longest]
        if (labels[1:] < 0).all():  # nothing predicts a first token
            lost += 1
            continue
        cut += is_long
        kept.append(number)
        columns["input_ids"].append(ids)
        columns["labels"].append(labels)
    return ChatTokens(columns, kept, longest, len(conversations), cut, lost, endless)


class PreferenceTokens(NamedTuple):
    """Preferences as tokens.

    Attributes:
      columns: for `Batches`: `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`
        and `rejected_labels`, each prompt and answer, and labels on the answer alone.
      kept: the numbers of the preferences that are in.
      chosen: the chosen answers, before what is not kept was left out.
      rejected: the rejected ones.
      same: how many had two answers of the same tokens, and were left out.
    """

    columns: dict[str, list[np.ndarray]]
    kept: list[int]
    chosen: ChatTokens
    rejected: ChatTokens
    same: int

    def remarks(self, name: str) -> list[str]:
        """Return what a user should know of these preferences, a sentence each."""
        said = self.chosen.remarks(f"{name}, chosen")
        said += self.rejected.remarks(f"{name}, rejected")
        if self.same:
            said.append(
                f"{name}: {self.same:,} of {self.chosen.examples:,} pairs have two "
                "equal answers, as far as they reach, and were left out."
            )
        return said


def tokenise_preferences(
    tokenizer: Tokenizer,
    preferences: Sequence[Preference],
    longest: int,
    *,
    stops: Collection[int] = (),
    vocabulary: int | None = None,
) -> PreferenceTokens:
    """Tokenise both answers of each preference behind its prompt.

    Args:
      tokenizer: with a chat template (`with_template`).
      preferences: from `read_preferences`.
      longest: the most tokens of prompt and answer; what is longer loses its end.
      stops: the tokens at which the model stops.
      vocabulary: how many tokens the model knows.

    Raises:
      DataError: as `tokenise_chats`, or no pair is left.
    """
    sides: list[ChatTokens] = []
    for name in ("chosen", "rejected"):
        whole = [
            Conversation((*p.prompt, *getattr(p, name)), p.place, len(p.prompt))
            for p in preferences
        ]
        sides.append(
            tokenise_chats(
                tokenizer, whole, longest, stops=stops, vocabulary=vocabulary
            )
        )
    rows = [
        dict(zip(s.kept, zip(*s.columns.values(), strict=True), strict=True))
        for s in sides
    ]
    both = [i for i in sides[0].kept if i in rows[1]]
    kept = [i for i in both if not np.array_equal(rows[0][i][0], rows[1][i][0])]
    if not kept:
        raise DataError(
            f"of {len(preferences)} preferences none has two different answers within "
            f"{longest} tokens.\nAllow longer ones."
        )
    columns = {
        f"{side}_{column}": [rows[n][i][place] for i in kept]
        for n, side in enumerate(("chosen", "rejected"))
        for place, column in enumerate(("input_ids", "labels"))
    }
    return PreferenceTokens(columns, kept, sides[0], sides[1], len(both) - len(kept))


# ------------------------------------------------------------------------------ answers


def _tokens_of(
    tokenizer: Tokenizer, said: Conversation, answers: Answers
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, and which are of answers to be learned."""
    wanted = [
        n
        for n, message in enumerate(said.messages)
        if message.role == ASSISTANT and n >= said.first
    ]
    wanted = wanted if answers == "all" else wanted[-1:]
    text = _rendered(tokenizer, said.messages, said.place)
    ids, places = _encoded(tokenizer, text)
    if _MARKS.search(str(tokenizer.chat_template)):
        is_answer = _marked(tokenizer, said, wanted)
    else:
        begins = np.array([begin for begin, _ in places])
        is_answer = np.zeros(len(ids), bool)
        for number in wanted:
            begin, end = _span(tokenizer, said, number, text)
            # What began before is the prompt's: a line's end that the two share.
            is_answer |= (begins >= begin) & (begins < end)
    return np.array(ids, np.int32), is_answer


def _span(tokenizer: Tokenizer, said: Conversation, number: int, text: str) -> Span:
    """Where the text of an answer begins and ends in that of its conversation."""
    before = _rendered(tokenizer, said.messages[:number], said.place, answer=True)
    upto = _rendered(tokenizer, said.messages[: number + 1], said.place)
    if text.startswith(upto) and upto.startswith(before):
        return len(before), len(upto)
    what = (
        "writes messages otherwise once more follow"
        if not text.startswith(upto)
        else "calls for an answer otherwise than it writes one"
    )
    raise DataError(
        f"{said.place}: the chat template {what}, so where answer {number + 1} begins "
        f"cannot be told:\n  {_around(upto if text.startswith(upto) else text, before)}"
        "\nLearn the last answers alone, or take another template."
    )


def _around(one: str, other: str) -> str:
    """The first place where two texts part."""
    pairs = enumerate(zip(one, other, strict=False))
    place = next((n for n, (x, y) in pairs if x != y), min(len(one), len(other)))
    part = slice(max(0, place - 20), place + 20)
    return f"{one[part]!r} against {other[part]!r}"


_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _marked(
    tokenizer: Tokenizer, said: Conversation, wanted: Sequence[int]
) -> np.ndarray:
    """The tokens that the template marks as the answers of those numbers."""
    found = tokenizer.apply_chat_template(
        _plain(said.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = np.array(found["assistant_masks"], bool)
    run = np.cumsum(mask & ~np.pad(mask, (1, 0))[:-1]) - 1  # which answer's a token is
    own = [n for n, message in enumerate(said.messages) if message.role == ASSISTANT]
    if run[-1] + 1 != len(own):
        raise DataError(
            f"{said.place}: the chat template marks {run[-1] + 1} parts as the "
            f"assistant's, and {len(own)} messages are."
        )
    return mask & np.isin(run, [own.index(n) for n in wanted])


def _rendered(
    tokenizer: Tokenizer, messages: Sequence[Message], place: str, answer: bool = False
) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            _plain(messages), tokenize=False, add_generation_prompt=answer
        )
    except jinja2.TemplateError as error:
        raise DataError(
            f"{place}: the chat template refuses the conversation: {error}"
        ) from error


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def _encoded(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Tokens of rendered text, and where in it they are."""
    # The template has written the special tokens; the tokenizer would add them again.
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return found["input_ids"], found["offset_mapping"]


def _check_known(
    tokenizer: Tokenizer, ids: np.ndarray, place: str, vocabulary: int | None
) -> None:
    if vocabulary is not None and (ids >= vocabulary).any():
        token = int(ids[ids >= vocabulary][0])
        name = tokenizer.convert_ids_to_tokens(token)
        raise DataError(
            f"{place}: the token {token} ({name!r}) is beyond the model's vocabulary "
            f"of {vocabulary}.\nTake the model's own tokenizer, or give the model more "
            "rows."
        )
