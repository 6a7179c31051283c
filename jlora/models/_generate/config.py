"""The settings of generation, by `transformers`' names and with its meanings."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

from jlora._errors import StructureError

Tokens = tuple[int, ...]
Read = Callable[
    [Any], Any
]  # a field's value as it is kept; ValueError where it is none


def _whole(least: int) -> Read:
    """Read a whole number of at least `least`."""

    def read(value: Any) -> int:
        number = None if isinstance(value, bool) else _index(value)
        if number is None or number < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return number

    return read


def _index(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(low: float, high: float = float("inf"), *, above: bool = False) -> Read:
    """Read a number of at least `low` (or `above` it) and at most `high`."""

    def read(value: Any) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(value) if real else float("nan")
        if not low <= number <= high or (above and number == low):
            bound = "above" if above else "at least"
            most = "" if high == float("inf") else f" and at most {high:g}"
            raise ValueError(f"must be a number {bound} {low:g}{most}")
        return number

    return read


def _any_real(value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError("must be a number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _token(value: Any) -> int:
    """Read the id of one token."""
    try:
        return _whole(0)(value)
    except ValueError:
        raise ValueError("must be a token's id") from None


def _tokens(value: Any) -> Tokens:
    """Read several ids; a list becomes a tuple, which a program can be known by."""
    if not isinstance(value, (tuple, list)):
        raise ValueError("must be a list of token ids")
    return tuple(_token(item) for item in value)


def _one_or_more(value: Any) -> int | Tokens:
    return _tokens(value) if isinstance(value, (tuple, list)) else _token(value)


def _sequences(value: Any) -> tuple[Tokens, ...]:
    what = "must be a list of lists of token ids, none of them empty"
    if not isinstance(value, (tuple, list)) or not all(
        isinstance(item, (tuple, list)) and item for item in value
    ):
        raise ValueError(what)
    return tuple(_tokens(item) for item in value)


def _biases(value: Any) -> tuple[tuple[Tokens, float], ...]:
    what = "must map tuples of token ids to numbers, or list pairs of the two"
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    try:
        read = tuple((_tokens(ids), _any_real(bias)) for ids, bias in pairs)
    except (TypeError, ValueError):
        raise ValueError(what) from None
    if not all(ids for ids, _ in read):
        raise ValueError(what)
    return read


def _decay(value: Any) -> tuple[int, float]:
    try:
        start, factor = value
        return _whole(0)(start), _any_real(factor)
    except (TypeError, ValueError):
        raise ValueError("must be a pair: the first step, and a factor") from None


def _early(value: Any) -> bool | str:
    if value not in (True, False, "never"):
        raise ValueError('must be True, False or "never"')
    return value if value == "never" else bool(value)


_READ: dict[str, Read] = {
    "max_new_tokens": _whole(1),
    "max_length": _whole(1),
    "min_new_tokens": _whole(0),
    "min_length": _whole(0),
    "num_beams": _whole(1),
    "length_penalty": _any_real,
    "early_stopping": _early,
    "num_return_sequences": _whole(1),
    "do_sample": _flag,
    "temperature": _real(0, above=True),
    "top_h": _real(0, 1, above=True),
    "top_k": _whole(0),
    "top_p": _real(0, 1, above=True),
    "min_p": _real(0, 1),
    "typical_p": _real(0, 1, above=True),
    "epsilon_cutoff": _real(0, 1),
    "eta_cutoff": _real(0, 1),
    "repetition_penalty": _real(0, above=True),
    "encoder_repetition_penalty": _real(0, above=True),
    "no_repeat_ngram_size": _whole(0),
    "no_repeat_ngram_prompt": _flag,
    "encoder_no_repeat_ngram_size": _whole(0),
    "bad_words_ids": _sequences,
    "sequence_bias": _biases,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "forced_bos_token_id": _token,
    "forced_eos_token_id": _one_or_more,
    "exponential_decay_length_penalty": _decay,
    "remove_invalid_values": _flag,
    "renormalize_logits": _flag,
    "eos_token_id": _one_or_more,
    "pad_token_id": _token,
    "decoder_start_token_id": _token,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to choose the next token, and when to stop.

    Names and meanings are those of `transformers`. `None` leaves a setting at its
    default. What is said of the prompt is of the start token in a model with an
    encoder: its output does not continue the input.

    Attributes:
      max_new_tokens: n, the most tokens made, the end token included.
      max_length: the most tokens of prompt, padding and output together; where it is
        given, it takes the place of `max_new_tokens`.
      min_new_tokens: no end token before so many others.
      min_length: likewise, counted with the prompt.
      num_beams: K; 1 is greedy search, or sampling.
      length_penalty: a finished beam's score is divided by length**length_penalty.
      early_stopping: when beam search ends: `True` as soon as K beams have ended;
        `False` when the running ones would not win at their present length; `"never"`
        when they could not at any length.
      num_return_sequences: how many outputs each prompt gets: the best beams, or
        samples. The rows of the result are then those of the first prompt, and so on.
      do_sample: draws from the distribution; needs a key. With beams, K continuations
        are drawn without replacement.
      temperature: divides the logits before drawing.
      top_h: draws among the most likely tokens that together have this part of the
        distribution's entropy (of its 100 most likely tokens); `None` among all.
      top_k: draws among the k most likely tokens; 0 among all.
      top_p: draws among the most likely tokens that together reach this probability.
      min_p: draws among tokens at least this times as likely as the likeliest.
      typical_p: draws among tokens whose information is nearest to the entropy, that
        together reach this probability.
      epsilon_cutoff: draws among tokens of at least this probability; 0 among all.
      eta_cutoff: the same, with a bound that sinks where the entropy is high.
      repetition_penalty: divides positive scores of tokens that the prompt or the
        output holds, and multiplies negative ones.
      encoder_repetition_penalty: divides negative scores of the input's tokens, and
        multiplies positive ones.
      no_repeat_ngram_size: no sequence of so many tokens occurs twice in prompt and
        output; 0 allows all.
      no_repeat_ngram_prompt: whether the prompt's sequences count, as they do in
        `transformers`; False lets an output say again what it was asked to say.
      encoder_no_repeat_ngram_size: none of the input's occurs in the output.
      bad_words_ids: sequences of tokens that do not occur.
      sequence_bias: what is added to the score of a sequence's last token where the
        others precede it: a dict of tuples, or pairs.
      suppress_tokens: tokens that do not occur.
      begin_suppress_tokens: tokens that do not occur first.
      forced_bos_token_id: the token after a prompt of a single one, which is the start
        token of a model with an encoder.
      forced_eos_token_id: the last token where the output is as long as it may be.
      exponential_decay_length_penalty: a pair; after so many tokens the end token's
        score grows by the factor to the power of those beyond.
      remove_invalid_values: takes NaN for 0 and infinities for the largest numbers.
      renormalize_logits: normalises scores after all else.
      eos_token_id: the end token, or several; `None` is the model's, `()` is none.
      pad_token_id: what follows the end token; `None` is the model's.
      decoder_start_token_id: what the decoder of a model with an encoder begins with;
        `None` is the model's.
    """

    max_new_tokens: int = 64
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    no_repeat_ngram_prompt: bool = True
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[Tokens, ...] = ()
    sequence_bias: tuple[tuple[Tokens, float], ...] = ()
    suppress_tokens: Tokens = ()
    begin_suppress_tokens: Tokens = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Tokens | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: int | Tokens | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range, or that exclude each other."""
        broken = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kept = field.default
            if value is not None:
                try:
                    kept = _READ[field.name](value)
                except ValueError as error:
                    broken.append(f"{field.name} is {value!r} and {error}.")
            object.__setattr__(self, field.name, kept)  # the dataclass is frozen
        if self.num_return_sequences > self.num_beams > 1:
            broken.append(
                f"num_return_sequences is {self.num_return_sequences}, and there are "
                f"num_beams={self.num_beams} to return."
            )
        if self.num_return_sequences > 1 == self.num_beams and not self.do_sample:
            broken.append(
                f"num_return_sequences is {self.num_return_sequences}, and greedy "
                "search finds one sequence: set do_sample or num_beams."
            )
        if broken:
            remedy = ""
            if any(line.startswith("temperature") for line in broken):
                remedy = "\nFor the likeliest token at each step leave do_sample off."
            raise StructureError("Generation: " + "\n".join(broken) + remedy)

    @property
    def eos(self) -> Tokens:
        """The end tokens, as a tuple."""
        return as_tuple(self.eos_token_id)

    @property
    def rows_per_prompt(self) -> int:
        """How many sequences are continued for each prompt at once."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


def as_tuple(ids: int | Tokens | None) -> Tokens:
    """Return ids as a tuple, be they none, one or several."""
    if ids is None:
        return ()
    return ids if isinstance(ids, tuple) else (ids,)


FIELDS = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
