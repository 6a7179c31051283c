"""Texts for a model, and what it makes of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora._errors import DataError, StructureError
from jlora._options import UsageError, option
from jlora._programs import ProgramOptions

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(ProgramOptions):
    """How tokens are chosen; what is not given is the model's own setting."""

    # fmt: off
    max_new_tokens: int | None = option(
        None, "the longest answer (the model's, or 64)", least=1, group="generation")
    min_new_tokens: int | None = option(None, "the shortest answer", least=0)
    num_beams: int | None = option(None, "beam search; 1 is greedy", least=1)
    length_penalty: float | None = option(
        None, "of beam search: above 0 prefers longer answers")
    no_repeat_ngram_size: int | None = option(
        None, "no sequence of this many tokens occurs twice", least=0)
    repetition_penalty: float | None = option(
        None, "above 1 makes tokens that occurred already less likely", above=0)
    sample: bool = option(False, "draw tokens at random, by --seed")
    temperature: float | None = option(
        None, "below 1 prefers likely tokens; with --sample", above=0)
    top_k: int | None = option(
        None, "draw among this many of the likeliest tokens", least=0)
    top_p: float | None = option(
        None, "draw among the likeliest tokens that together have this probability",
        above=0)
    min_p: float | None = option(
        None, "draw among tokens at least this fraction as likely as the likeliest",
        least=0)
    answers: int | None = option(
        None, "this many answers to each text: samples, or the best beams", least=1)
    seed: int = option(0, "of --sample (0)", least=0)
    # fmt: on

    def settings(self) -> dict[str, Any]:
        """Return what was given, as `jlora.models.generate` takes it.

        Raises:
          UsageError: settings of sampling without `--sample`.
        """
        names = [field.name for field in dataclasses.fields(GenerationOptions)]
        given = {name: getattr(self, name) for name in names}
        del given["seed"], given["compilation_cache"]
        given["do_sample"] = given.pop("sample")
        given["num_return_sequences"] = given.pop("answers")
        given = {name: value for name, value in given.items() if value is not None}
        drawn = [x for x in ("temperature", "top_k", "top_p", "min_p") if x in given]
        if drawn and not self.sample:
            said = ", ".join(f"--{name.replace('_', '-')}" for name in drawn)
            raise UsageError(f"{said}: for --sample.")
        return given


class Writer:
    """A model that answers texts.

    Args:
      model: of `jlora.models`.
      params: its parameters, with adapters or without.
      tokenizer: its tokenizer.
      settings: of `jlora.models.generate`.
      seed: of samples.
      of_chats: whether a run on conversations has made the model.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        tokenizer: Any,
        settings: Any,
        seed: int = 0,
        of_chats: bool = False,
    ) -> None:
        from jlora import models

        if not hasattr(model.config, "generation"):
            raise StructureError(
                f"a {type(model).__name__} generates no text.\nPass a T5, or a model "
                "that continues texts: GPT-2, Llama and the like."
            )
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.settings, self.seed, self._generate = settings, seed, models.generate
        self.drawn, self.of_chats = 0, of_chats

    def batches(
        self,
        texts: Sequence[Any],
        size: int,
        ids: Callable[[Any], list[int]] | None = None,
    ) -> Iterator[list[list[str]]]:
        """Answer texts, so many at a time; of each its answers.

        Args:
          texts: the texts.
          size: how many at a time.
          ids: makes tokens of each, `asked` say; None is the method `ids`.
        """
        ids = ids or self.ids
        for start in range(0, len(texts), size):
            rows = [ids(text) for text in texts[start : start + size]]
            # A last batch that is smaller would be compiled for itself.
            n, full = len(rows), size if len(texts) > size else len(rows)
            yield self(rows + rows[-1:] * (full - n))[:n]

    def ids(self, text: str) -> list[int]:
        """Return a text's tokens.

        Raises:
          DataError: there are none.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise DataError(
                f"the text {text!r} has no tokens, and the tokenizer no token to begin "
                "with.\nPass a text that has a word in it."
            )
        return ids

    def asked(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation, and of the call for its next answer.

        Args:
          messages: of `role` and `content`.

        Raises:
          DataError: the tokenizer has no chat template, or that refuses them.
        """
        from jlora import data

        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template, as those of base models have "
                "none.\nLeave --chat and --system out (--raw for a run on "
                "conversations), or take the model that was tuned for chat."
            )
        talk = [data.Message(**message) for message in messages]
        return [int(token) for token in data.chat_prompt(self.tokenizer, talk)]

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        """Answer a batch of rows of tokens."""
        import jax

        import jlora

        ids = np.zeros((len(rows), _room(max(map(len, rows)))), np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        self.drawn += 1
        key = jax.random.fold_in(jax.random.key(self.seed), self.drawn)
        # Without --sample, files that ask for sampling are not followed.
        tokens = self._generate(
            self.model,
            self.params,
            ids,
            mask,
            key=key if self.settings.get("do_sample") else None,
            transform=jlora.lora,
            **self.settings,
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        each = len(texts) // len(rows)
        return [texts[i * each : (i + 1) * each] for i in range(len(rows))]


def _room(length: int) -> int:
    """Return one of few lengths, for each is a program to compile."""
    if length > 256:
        return -(-length // 256) * 256
    return max(16, 1 << (length - 1).bit_length())


def read_texts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return texts from the command line, a file's lines, or stdin's.

    Raises:
      UsageError: none of them, or two.
      DataError: the file cannot be read.
    """
    from jlora import data

    if given and file is not None:
        raise UsageError("TEXT and --file exclude each other.")
    if given:
        return list(given)
    if file is not None:
        return data.read_lines(file)
    if sys.stdin.isatty():
        raise UsageError("TEXT is missing: pass texts, --file FILE, or lines on stdin.")
    return [line.rstrip("\r\n") for line in sys.stdin]
