"""Several classifiers on one encoder, and batches in which each example has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jlora
from jlora import models
from jlora._errors import OptionError

Tree = Any


class Router:
    """Classifiers that share an encoder, as one function of mixed batches.

    The adapters of the encoders are a bank, so that the encoder reads a batch once,
    each example with the adapter of its task; the heads, which differ in their sizes,
    then read the examples of their own task.

    Args:
      classifiers: by a task's name a model of `jlora.models` with a head for
        classification, and its lorafied tree, whose head may be trained whole. All
        stand on one encoder.

    Attributes:
      names: the tasks, in the order of their numbers.

    Raises:
      OptionError: no classifiers.
      StructureError: other encoders, or leaves of them that are trained whole.
    """

    def __init__(self, classifiers: Mapping[str, tuple[Any, Tree]]) -> None:
        if not classifiers:
            raise OptionError("Router({}): it routes to one classifier at least.")
        self.names, self._pairs = [*classifiers], [*classifiers.values()]
        first = self._pairs[0][0]
        prefix = first.config.prefix
        encoder = models.Bert(config=first.config, dtype=first.dtype)
        self._bank = jlora.bank([tree[prefix] for _, tree in self._pairs])
        self._encode = jax.jit(
            jlora.mixed(
                lambda params, batch: encoder.apply({"params": params}, **batch)
            )
        )

    def __call__(
        self, batch: Mapping[str, Any], names: Sequence[str]
    ) -> list[np.ndarray]:
        """Return the logits of each example, `[labels of its task]` float32.

        Args:
          batch: `input_ids`, `attention_mask` and perhaps `token_type_ids`, `[B, S]`.
          names: the task of each example, B of them.

        Raises:
          OptionError: a name that is none of the tasks.
          ShapeError: more or fewer names than examples.
        """
        for name in names:
            if name not in self.names:
                raise OptionError(
                    f"there is no task {name!r}; there are {', '.join(self.names)}."
                )
        ids = np.array([self.names.index(name) for name in names])
        hidden = self._encode(jlora.with_ids(self._bank, ids), dict(batch))  # [B, S, d]
        logits: list[Any] = [None] * len(ids)
        for number, (model, tree) in enumerate(self._pairs):
            (rows,) = np.nonzero(ids == number)
            if not rows.size:
                continue
            head = jlora.lora(_head_of(model))
            for row, found in zip(rows, head(tree, hidden[rows]), strict=True):
                logits[row] = np.asarray(found, np.float32)
        return logits


def _encoder_of(encoder: Any) -> Any:
    def encode(params: Tree, batch: Mapping[str, Any]) -> Any:
        return encoder.apply({"params": params}, **batch)

    return encode


def _head_of(model: Any) -> Any:
    def head(params: Tree, hidden: Any) -> Any:
        return model.apply({"params": params}, hidden, True, method="head")

    return head
