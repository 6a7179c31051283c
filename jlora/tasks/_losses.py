"""The loss of each kind of model, as `jlora.train` takes it: a sum and a count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jlora import data, models, train

Tree = Any
Batch = Mapping[str, Any]
Loss = Callable[[Tree, Batch, Any], Any]


def seq2seq_loss(model: Any, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of an encoder-decoder, T5 say.

    Args:
      model: of `jlora.models`.
      label_smoothing: probability spread over the vocabulary.

    Returns:
      `loss_fn(params, batch, key)` of batches with `input_ids` and `attention_mask`,
      `[B, S]`, and `labels`, `[B, T]`, in which numbers below 0 do not count; and of
      packed ones `segment_ids`, `[B, S]`, and `decoder_segment_ids`, `[B, T]`.
    """

    def loss_fn(params: Tree, batch: Batch, key: Any) -> Any:
        own = batch.get("decoder_segment_ids")
        # The logits are never made as a whole: they are the largest array of the step.
        hidden, kernel = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            models.shift_right(batch["labels"], model.config, own),
            segment_ids=batch.get("segment_ids"),
            decoder_segment_ids=own,
            method="features",
        )
        return train.linear_cross_entropy(
            hidden, kernel, batch["labels"], label_smoothing=label_smoothing
        )

    return loss_fn


def causal_loss(model: Any, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of a decoder, GPT-2 or Llama say: each token from those before.

    Args:
      model: of `jlora.models`.
      label_smoothing: probability spread over the vocabulary.

    Returns:
      `loss_fn(params, batch, key)` of batches with `input_ids`, `attention_mask` and
      `labels`, all `[B, T]`, and of packed ones `segment_ids`. The labels stand where
      their tokens stand, and are below 0 at what does not count: a prompt, padding.
    """

    def loss_fn(params: Tree, batch: Batch, key: Any) -> Any:
        hidden, kernel = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            segment_ids=batch.get("segment_ids"),
            method="features",
        )
        # The last position has no next token. A label that does not count is cheaper
        # than a slice of the hidden states, which would be a copy.
        labels = jnp.asarray(batch["labels"])[:, 1:]
        labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=data.IGNORED)
        return train.linear_cross_entropy(
            hidden, kernel, labels, label_smoothing=label_smoothing
        )

    return loss_fn


def classification_loss(model: Any, *, dropout: bool = False) -> Loss:
    """Return the loss of an encoder with a classification head.

    Args:
      model: of `jlora.models`, loaded with `head="classification"`. One label is a
        regression, whose loss is the squared error.
      dropout: drop out within the model, as its configuration says, where the loss is
        given a key: in training.

    Returns:
      `loss_fn(params, batch, key)` of batches with `input_ids` and `attention_mask`,
      `[B, S]`, perhaps `token_type_ids`, and `labels`, `[B]`: classes, or numbers where
      the model has one label. `data.IGNORED` does not count.
    """

    def loss_fn(params: Tree, batch: Batch, key: Any) -> Any:
        random = dropout and key is not None
        logits = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            batch.get("token_type_ids"),
            not random,
            rngs={"dropout": key} if random else None,
        )
        labels = batch["labels"]
        if logits.shape[-1] > 1:
            return train.cross_entropy(logits, labels)
        counts = labels != data.IGNORED
        errors = jnp.where(counts, logits[..., 0].astype(jnp.float32) - labels, 0.0)
        return jnp.sum(errors**2), jnp.sum(counts.astype(jnp.float32))

    return loss_fn
