"""A classifier that is asked about examples: their logits, and how good those are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jlora
from jlora import data
from jlora._errors import OptionError
from jlora._processes import is_first, on_host
from jlora.tasks._class_settings import LONGEST, METRICS
from jlora.tasks._devices import beside
from jlora.tasks._examples import Examples
from jlora.tasks._options import Loaded

Tree = Any


class Classifier:
    """A BERT or RoBERTa with a head, and its tokenizer.

    Args:
      loaded: the two; parameters are given each time.
      longest: tokens of an example, longer ones are cut; None is 128, or as many as the
        model has places for.

    Raises:
      OptionError: the model has fewer places.
    """

    def __init__(self, loaded: Loaded, longest: int | None = None) -> None:
        self._tokenizer, config = loaded.tokenizer, loaded.model.config
        room = config.max_position_embeddings - config.first_position
        longest = longest or min(LONGEST, room)
        if longest > room:
            raise OptionError(
                f"--max-length {longest}: the model has places for {room} tokens."
            )
        self._known = {"longest": longest, "vocabulary": config.vocab_size}
        self._apply = jax.jit(jlora.lora(logits_of(loaded.model)))

    def columns(
        self, examples: Examples, name: str = "texts"
    ) -> tuple[dict[str, Any], list[str]]:
        """Return examples as columns for `jlora.data.Batches`, and what is to be said.

        Args:
          examples: texts and labels.
          name: what remarks call them.
        """
        tokens = data.tokenise(
            self._tokenizer,
            examples.texts,
            pairs=examples.pairs,
            end=False,
            **self._known,
        )
        columns: dict[str, Any] = {"input_ids": tokens.rows}
        if tokens.types is not None:
            columns["token_type_ids"] = tokens.types
        return {**columns, "labels": examples.labels}, tokens.remarks(name)

    def logits(
        self, params: Tree, batches: data.Batches, title: str | None = None
    ) -> np.ndarray:
        """Return the logits of every example, `[n, labels]` float32, in their order.

        Args:
          params: the parameters, with adapters or without.
          batches: the examples.
          title: of a progress bar; None shows none.
        """

        def of_batch(batch: dict[str, np.ndarray]) -> Any:
            inputs = {name: x for name, x in batch.items() if name != "labels"}
            inputs = dict(beside(params, inputs))
            return on_host(self._apply(params, inputs)).astype(np.float32)

        return np.stack(batches.collect(of_batch, title if is_first() else None))


def predictions(logits: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Return the class of each row of logits, or its number where there are no classes.

    Args:
      logits: `[n, labels]`.
      classes: their names; none where numbers are predicted.
    """
    return logits.argmax(-1) if classes else logits[:, 0]


def class_scores(
    metrics: Sequence[str], classes: Sequence[str], logits: np.ndarray, true: Examples
) -> dict[str, float]:
    """Return metrics by name, 1 for perfect.

    Args:
      metrics: their names, such as `"accuracy"` or `"pearson"`.
      classes: the classes' names; none where numbers are predicted.
      logits: `[n, labels]`.
      true: the examples, with their labels.
    """
    said = predictions(logits, classes)
    return {name: METRICS[name](said, true.labels) for name in metrics}


def logits_of(model: Any) -> Callable[[Tree, Mapping[str, Any]], Any]:
    """Return `(params, batch) -> logits` of a classifier, for plain parameters.

    Args:
      model: of `jlora.models`. A batch holds `input_ids`, `attention_mask` and perhaps
        `token_type_ids`, `[B, S]`.
    """

    def apply(params: Tree, batch: Mapping[str, Any]) -> Any:
        return model.apply({"params": params}, **batch)

    return apply
