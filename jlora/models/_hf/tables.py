"""The embedding and the head: another number of tokens, and a head of its own."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jlora._errors import ShapeError, StructureError
from jlora._text import listed
from jlora.models._hf.families import family_of

Params = dict[str, Any]


def resize_vocabulary(
    model: Any, params: Params, size: int, *, pad_to_multiple_of: int | None = None
) -> tuple[Any, Params]:
    """Return a model and parameters for another number of tokens.

    New tokens get the mean of those there are, in the embedding, in the head, and in
    its bias; a smaller vocabulary loses the last tokens. `transformers` does so in
    `resize_token_embeddings`, but for noise too small to matter.

        tokenizer.add_tokens(["<a>", "<b>"])
        model, params = models.resize_vocabulary(model, params, len(tokenizer))

    Args:
      model: of `jlora.models`.
      params: its parameters, dense: resize first, then `jlora.lorafy`.
      size: V, the tokens there are to be.
      pad_to_multiple_of: adds tokens that nobody uses up to a multiple of that.

    Returns:
      The model, whose configuration has the new `vocab_size`, and its parameters.

    Raises:
      ShapeError: `size` is no positive whole number.
      StructureError: `params` are not the model's.
    """
    size = _positive("size", size)
    if pad_to_multiple_of is not None:
        multiple = _positive("pad_to_multiple_of", pad_to_multiple_of)
        size = -(-size // multiple) * multiple
    _check_dense(model, params)
    config = dataclasses.replace(model.config, vocab_size=size)
    resized = model.clone(config=config)
    shapes = _shapes(_abstract(resized)).values()
    leaves, treedef = jax.tree.flatten(params)
    new = [_resized(x, shape) for x, shape in zip(leaves, shapes, strict=True)]
    return resized, jax.tree.unflatten(treedef, new)


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ShapeError(f"{name} is {value!r}; it must be a positive whole number.")
    return number


def _resized(leaf: Array, shape: tuple[int, ...]) -> Array:
    """Return `leaf` cut to `shape`, or with its mean repeated at the end."""
    for axis, (old, size) in enumerate(zip(leaf.shape, shape, strict=True)):
        if size < old:
            leaf = jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
        elif size > old:
            mean = jnp.mean(leaf.astype(jnp.float32), axis=axis, keepdims=True)
            new = jnp.repeat(mean.astype(leaf.dtype), size - old, axis=axis)
            leaf = jnp.concatenate([leaf, new], axis=axis)
    return leaf


def untie(model: Any, params: Params) -> tuple[Any, Params]:
    """Return a model whose head is its own, and parameters that compute the same.

    The head begins as a copy of the embedding. Adapters, or training, then change one
    and not the other, as PEFT does where `target_modules` names `lm_head`.

    Args:
      model: of `jlora.models`. One that is not tied is returned as it is.
      params: its parameters, dense: untie first, then `jlora.lorafy`.

    Returns:
      The model, whose configuration says `tie_word_embeddings: false`, and its
      parameters, with `lm_head/kernel` `[d, V]` among them.

    Raises:
      StructureError: `params` are not the model's, or its head cannot be untied.
    """
    check_untying(model)
    _check_dense(model, params)
    if not model.config.tie_word_embeddings:
        return model, params
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    names = model.torch_names().items()
    path = next(path for path, users in names if any(u.endswith(".T") for u in users))
    table: Any = params
    for part in path.split("/"):
        table = table[part]
    kernel = jnp.swapaxes(table["embedding"], 0, 1)
    return model.clone(config=config), {**params, "lm_head": {"kernel": kernel}}


def check_untying(model: Any) -> None:
    """Refuse to untie a model whose definition has no head of its own.

    Raises:
      StructureError: it is an encoder.
    """
    if not hasattr(model, "prefill"):
        raise StructureError(
            f"{type(model).__name__} cannot be untied: jlora.models defines it with "
            "the embedding as its head, or without one.\nT5, GPT2 and Llama can."
        )


def _abstract(model: Any) -> Any:
    family = family_of(model.config.to_dict()["model_type"], type(model).__name__)
    return family.abstract_params(model)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _check_dense(model: Any, params: Params) -> None:
    """Refuse parameters that are not the model's."""
    held, wanted = _shapes(params), _shapes(_abstract(model))
    if held != wanted:
        wrong = {k for k in held.keys() | wanted if held.get(k) != wanted.get(k)}
        lines = [f"{k}: {held.get(k)}, wanted {wanted.get(k)}" for k in wrong]
        raise StructureError(
            f"The parameters are not those of this {type(model).__name__}:\n  "
            f"{listed(lines)}\nA tree with adapters comes later: this first, then "
            "jlora.lorafy."
        )
