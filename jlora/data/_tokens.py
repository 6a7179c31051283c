"""Text to tokens: what the tokenizer cuts, loses or fails to add is seen and said."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora._errors import DataError
from jlora._text import first_line
from jlora.data._batches import IGNORED

CHUNK = 10_000  # texts that go to the tokenizer at once
CONFIG = "tokenizer_config.json"
SAMPLE = 200  # texts that are decoded again, to see whether anything is lost

Tokenizer = Any  # of the library `transformers`, or what is called as one


class Tokens(NamedTuple):
    """Texts as tokens.

    Attributes:
      rows: the token ids of each text, int32.
      types: its token types, where texts are paired and the tokenizer has types.
      longest: the most tokens a text may have.
      cut: how many texts were longer.
      blank: how many have no tokens but those that the tokenizer adds.
      unknown: how many hold something that the tokenizer does not know.
      changed: how many of `sampled` texts decode to others.
      sampled: how many were decoded.
    """

    rows: list[np.ndarray]
    types: list[np.ndarray] | None
    longest: int
    cut: int
    blank: int
    unknown: int
    changed: int
    sampled: int

    def remarks(self, name: str) -> list[str]:
        """Return what a user should know of these texts, a sentence each."""
        n, said = len(self.rows), []
        if self.cut:
            said.append(
                f"{name}: {self.cut:,} of {n:,} texts are longer than {self.longest} "
                "tokens and were cut."
            )
        if self.blank:
            said.append(
                f"{name}: {self.blank:,} of {n:,} texts have no tokens: nothing the "
                "tokenizer keeps is in them."
            )
        if self.unknown:
            said.append(
                f"{name}: {self.unknown:,} of {n:,} texts hold characters that the "
                "tokenizer does not know."
            )
        if self.changed:
            said.append(
                f"{name}: {self.changed} of {self.sampled} texts come back from the "
                "tokenizer changed, more than white space."
            )
        return said


def load_tokenizer(source: Any) -> Tokenizer:
    """Return the tokenizer of a folder or of a model on the hub.

    Raises:
      DataError: there is none, or `transformers` is not installed.
    """
    # It would advise to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError('tokenizers need a library: pip install "jlora[hf]"') from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first = first_line(error)
        said = f"{source} has no readable tokenizer: {first}"
        raise DataError(said + _unnamed(source)) from error


def _unnamed(source: Any) -> str:
    """Return a remedy where pieces are there, and nothing that says of what kind."""
    folder = Path(str(source)).expanduser()
    if not (folder / "vocab.json").is_file() or (folder / CONFIG).exists():
        return ""
    return (
        f"\nIt has a vocab.json, but nothing says of which kind. Write {CONFIG} beside "
        'it: {"tokenizer_class": "GPT2Tokenizer"}, or "RobertaTokenizer".'
    )


def tokenise(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    longest: int,
    *,
    prefix: str = "",
    pairs: Sequence[str] | None = None,
    end: bool | int = True,
    vocabulary: int | None = None,
) -> Tokens:
    """Tokenise texts, and count what that costs them.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: the texts.
      longest: the most tokens a text may have, the tokenizer's own included; longer
        ones are cut, and counted.
      prefix: put before each text.
      pairs: second texts, for models that read two at once.
      end: see that each row ends with the end token, which a model learns to stop by;
        it is appended where the tokenizer adds none. A number is the token that the
        model stops by; that of the tokenizer has to be the same.
      vocabulary: how many tokens the model knows.

    Raises:
      DataError: the tokenizer has no end token, or another than the model; a token is
        beyond the vocabulary.
    """
    stop = None if end is False else _end_token(tokenizer, None if end is True else end)
    rows: list[np.ndarray] = []
    types: list[np.ndarray] | None = None if pairs is None else []
    cut = 0
    for start in range(0, len(texts), CHUNK):
        part = slice(start, start + CHUNK)
        first = [prefix + text for text in texts[part]]
        second = None if pairs is None else list(pairs[part])
        for ids, kinds, was_cut in _encode(tokenizer, first, second, longest, stop):
            cut += was_cut
            rows.append(np.array(ids, np.int32))
            if types is not None and kinds is not None:
                types.append(np.array(kinds, np.int32))
    if vocabulary is not None:
        _check_vocabulary(tokenizer, rows, texts, vocabulary)
    unknown = getattr(tokenizer, "unk_token_id", None)
    known = unknown is None or unknown == getattr(tokenizer, "eos_token_id", None)
    lost = 0 if known else sum(bool((row == unknown).any()) for row in rows)
    changed, sampled = (0, 0)
    if pairs is None:
        whole = [i for i, row in enumerate(rows) if len(row) < longest]
        changed, sampled = _decoded_otherwise(tokenizer, rows, texts, prefix, whole)
    added = len(_encode_one(tokenizer, pairs is not None, longest, stop))
    blank = 0 if prefix else sum(len(row) <= added for row in rows)
    return Tokens(rows, types or None, longest, cut, blank, lost, changed, sampled)


def token_rows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    longest: int | None,
    *,
    prefix: str = "",
    end: bool | int = True,
    vocabulary: int | None = None,
) -> list[np.ndarray]:
    """Tokenise texts without an account of what that costs them.

    The arguments are those of `tokenise`; with `longest=None` nothing is cut.
    """
    stop = None if end is False else _end_token(tokenizer, None if end is True else end)
    most = longest if longest is not None else sys.maxsize
    with_prefix = [prefix + text for text in texts]
    found = _encode(tokenizer, with_prefix, None, most, stop) if texts else ()
    rows = [np.array(ids, np.int32) for ids, _, _ in found]
    if vocabulary is not None:
        _check_vocabulary(tokenizer, rows, texts, vocabulary)
    return rows


def _encode_one(
    tokenizer: Tokenizer, paired: bool, longest: int, stop: int | None
) -> list[int]:
    """Return the tokens of nothing: those that are added to any text."""
    empty = [""]
    ((row, _, _),) = _encode(tokenizer, empty, empty if paired else None, longest, stop)
    return row


def _encode(
    tokenizer: Tokenizer,
    texts: list[str],
    pairs: list[str] | None,
    longest: int,
    stop: int | None,
) -> Iterator[tuple[list[int], list[int] | None, bool]]:
    """Yield each text's tokens, their types, and whether it was cut."""
    both = (texts,) if pairs is None else (texts, pairs)
    found = tokenizer(*both, truncation=False, verbose=False)
    rows, kinds = list(found["input_ids"]), found.get("token_type_ids")
    lacks = [stop is not None and stop not in row[-2:] for row in rows]
    over = [i for i, row in enumerate(rows) if len(row) + lacks[i] > longest]
    if over:  # the tokenizer knows where to cut: what it adds itself stays
        some = ([side[i] for i in over] for side in both)
        short = tokenizer(*some, truncation=True, max_length=longest)
        for i, row in zip(over, short["input_ids"], strict=True):
            rows[i] = row
        if kinds is not None:
            kinds = list(kinds)
            for i, row in zip(over, short["token_type_ids"], strict=True):
                kinds[i] = row
    beyond = set(over)
    for i, row in enumerate(rows):
        if stop is not None and stop not in row[-2:]:  # some add a language after it
            row = [*row[: longest - 1], stop]
        yield row, None if kinds is None else kinds[i], i in beyond


def _end_token(tokenizer: Tokenizer, wanted: int | None) -> int:
    stop = getattr(tokenizer, "eos_token_id", None)
    if stop is None:
        raise DataError(
            "the tokenizer has no end token, and a model that never sees one does not "
            "learn to stop.\nGive it one: tokenizer.eos_token = '</s>', for instance."
        )
    if wanted is not None and stop != wanted:
        raise DataError(
            f"the tokenizer ends texts with the token {stop}{_name(tokenizer, stop)}, "
            f"but the model stops at {wanted}{_name(tokenizer, wanted)}.\nTake the "
            "model's own tokenizer, or set tokenizer.eos_token."
        )
    return int(stop)


def _check_vocabulary(
    tokenizer: Tokenizer, rows: list[np.ndarray], texts: Sequence[str], size: int
) -> None:
    for row, text in zip(rows, texts, strict=True):
        if len(row) and (row >= size).any():
            token = int(row[row >= size][0])
            name = _name(tokenizer, token)
            raise DataError(
                f"the token {token}{name} is beyond the model's vocabulary of {size}; "
                f"it is in {text[:60]!r}.\nThe tokenizer has tokens that the model has "
                "not: take the model's own tokenizer, or give the model more rows."
            )


def _name(tokenizer: Tokenizer, token: int) -> str:
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    return f" ({convert(token)!r})" if convert else ""


def _decoded_otherwise(
    tokenizer: Tokenizer,
    rows: list[np.ndarray],
    texts: Sequence[str],
    prefix: str,
    among: Sequence[int],
) -> tuple[int, int]:
    """Decode some texts again; return how many changed, of how many."""
    decode = getattr(tokenizer, "decode", None)
    if decode is None or not among:
        return 0, 0
    places = np.unique(np.linspace(0, len(among) - 1, SAMPLE).astype(int))
    chosen = [among[place] for place in places]
    changed = sum(
        _normalised(decode(rows[i].tolist(), skip_special_tokens=True))
        != _normalised(prefix + texts[i])
        for i in chosen
    )
    return changed, len(chosen)


def _normalised(text: str) -> str:
    """Return text in its normal form, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def prompted(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """Join prompts and answers into the texts of a causal language model.

    Args:
      prompts: token ids of each prompt, without an end token.
      answers: token ids of each answer, with one.

    Returns:
      Columns for `Batches`: `input_ids`, both after one another, and `labels`, the
      same with the prompt's set to `IGNORED`: the loss is of the answers alone.
    """
    both = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": [np.concatenate(pair) for pair in both],
        "labels": [
            np.concatenate([np.full_like(prompt, IGNORED), answer])
            for prompt, answer in both
        ],
    }
