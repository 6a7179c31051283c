"""`jlora generate`: texts in, a model's answers out."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

from jlora._options import UsageError, option
from jlora.cli._common import DTYPES
from jlora.cli._texts import GenerationOptions


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """What `jlora generate` takes."""

    source: str = option(
        about="a run, a model or an adapter: a folder, or a model's name on the hub",
        metavar="SOURCE", positional=True)
    texts: list[str] = option(
        [], "what to answer or continue; without it, lines are read from stdin",
        metavar="TEXT", positional=True)
    file: Path | None = option(
        None, "take the lines of a file as texts", metavar="FILE")
    adapter: Path | None = option(
        None, "an adapter to put on the model SOURCE", metavar="DIR")
    base: str | None = option(
        None, "the model that the adapter SOURCE belongs to (as it says)",
        metavar="DIR|NAME")
    prefix: str | None = option(
        None, "put before each text (what a run's model was trained with)",
        metavar="TEXT")
    chat: bool = option(
        False, "make each text a user's message in the tokenizer's chat template "
        "(done for a run on conversations)")
    raw: bool = option(
        False, "take each text as it is, even for a run on conversations")
    system: str | None = option(
        None, "what the model is told before each message; implies --chat",
        metavar="TEXT")
    dtype: str | None = option(
        None, "of the model's weights (its own)", choices=DTYPES)
    batch_size: int = option(16, "texts at once (16)", least=1)
    json: bool = option(False, "print a JSON object for each text, in one line")
# fmt: on


def run(options: Options) -> None:
    """Answer each text, in their order."""
    settings = options.settings()
    if options.raw and (options.chat or options.system is not None):
        raise UsageError(
            "--raw puts texts into no template; leave --chat and --system out."
        )
    options.keep_programs()
    from jlora.cli._texts import read_texts

    texts = read_texts(options.texts, options.file)
    if not texts:
        return
    from jlora.cli._common import progress
    from jlora.cli._sources import writer

    write, prefix = writer(options, settings)
    prefix = prefix if options.prefix is None else options.prefix
    prompts = [prefix + text for text in texts]
    size, ids = options.batch_size, None
    if not options.raw and (
        options.chat or options.system is not None or write.of_chats
    ):
        ids = functools.partial(_message, write, options.system)
    batches = write.batches(prompts, size, ids)
    answers = (answer for batch in batches for answer in batch)
    shown = progress(answers, len(texts), "text", show=len(texts) > size)
    for text, said in zip(texts, shown, strict=True):
        if options.json:
            print(json.dumps({"text": text, "answers": said}, ensure_ascii=False))
        else:
            print("\n".join(said))
        sys.stdout.flush()


def _message(write: Any, system: str | None, text: str) -> list[int]:
    """The tokens of a conversation that a message begins."""
    asked = [] if system is None else [{"role": "system", "content": system}]
    return list(write.asked([*asked, {"role": "user", "content": text}]))
