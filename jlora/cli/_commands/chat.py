"""`jlora chat`: a conversation with a model, turn by turn."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora._options import option
from jlora.cli._common import DTYPES
from jlora.cli._texts import GenerationOptions

if TYPE_CHECKING:
    from jlora.cli._texts import Writer

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it."


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """What `jlora chat` takes."""

    source: str = option(
        about="a run, a model or an adapter: a folder, or a model's name on the hub",
        metavar="SOURCE", positional=True)
    adapter: Path | None = option(
        None, "an adapter to put on the model SOURCE", metavar="DIR")
    base: str | None = option(
        None, "the model that the adapter SOURCE belongs to (as it says)",
        metavar="DIR|NAME")
    system: str | None = option(
        None, "what the model is told before the conversation", metavar="TEXT")
    dtype: str | None = option(
        None, "of the model's weights (its own)", choices=DTYPES)
# fmt: on


def run(options: Options) -> None:
    """Read a line, answer it, and so on until the end."""
    settings = options.settings()
    options.keep_programs()
    from jlora._errors import LoraError, OptionError
    from jlora.cli._sources import writer

    write, prefix = writer(options, settings)
    talk = conversation(write, prefix, options.system)
    if options.system is not None and not isinstance(talk, Conversation):
        raise OptionError("--system: this model's tokenizer has no chat template.")
    print(f"{talk.said}\n{_HELP}", file=sys.stderr)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
        elif line.strip():
            try:
                print(talk.answer(line), flush=True)
            except LoraError as error:
                print(f"jlora: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines that a person types, with the keys that a shell has, or those of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` then has a history
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")


def conversation(write: Writer, prefix: str, system: str | None) -> Any:
    """Return how to talk with a model: by template, by going on, or line by line."""
    if getattr(write.model, "is_encoder_decoder", False):
        return Lines(write, prefix)
    if getattr(write.tokenizer, "chat_template", None):
        return Conversation(write, system)
    return Continuation(write)


class Conversation:
    """Messages in the form of the tokenizer's chat template."""

    said = "A chat, by the tokenizer's template."

    def __init__(self, write: Writer, system: str | None) -> None:
        self.write, self.system = write, system
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def answer(self, line: str) -> str:
        """Return the model's answer; what fails is not kept."""
        asked = [*self.messages, {"role": "user", "content": line}]
        said = self.write([self.write.asked(asked)])[0][0].strip()
        self.messages = [*asked, {"role": "assistant", "content": said}]
        return said


class Continuation:
    """One text that grows: what is typed, and what the model adds."""

    said = (
        "The tokenizer has no chat template: the model goes on from all that was "
        "written so far."
    )

    def __init__(self, write: Writer) -> None:
        self.write = write
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self.text = ""

    def answer(self, line: str) -> str:
        """Return how the text goes on."""
        text = f"{self.text}\n{line}" if self.text else line
        said = self.write([self.write.ids(text)])[0][0]
        self.text = text + said
        return said


class Lines:
    """Each line for itself: a model with an encoder reads one text, and writes one."""

    def __init__(self, write: Writer, prefix: str) -> None:
        self.write, self.prefix = write, prefix
        begins = f", begun with {prefix!r}" if prefix else ""
        self.said = f"A model with an encoder: each line stands alone{begins}."

    def reset(self) -> None:
        """There is nothing to forget."""

    def answer(self, line: str) -> str:
        """Return what the model makes of a line."""
        return self.write([self.write.ids(self.prefix + line)])[0][0]
