"""Groups of leaves: whose learning rate is a multiple, and who decays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import optax

from jlora._errors import OptionError
from jlora._kernel.nodes import LowRank, is_node
from jlora._paths import Tree, map_with_path, name_of
from jlora._tree.conventions import EMBEDDING_NAMES
from jlora._tree.partition import labels
from jlora.optim._options import positive

_LABELS = ("a", "b", "e", "magnitude", "full", "bias", "rows")


def lora_plus(
    ratio: float = 16.0,
    *,
    embedding_ratio: float = 1.0,
    embeddings: Sequence[str] = EMBEDDING_NAMES,
) -> optax.GradientTransformation:
    """LoRA+: B learns faster than A. It comes after the optimiser, in `optax.chain`.

    An optimiser's learning rate is a factor of its updates, decoupled weight decay
    included, so B's updates times `ratio` are those of a rate `ratio` times as high.
    (Where the update is no multiple of the rate, as in `optax.lbfgs`, it means less.)
    Biases, magnitudes and whole leaves of one axis count as B, as PEFT has it; whole
    matrices and rows of tables as A.

    Args:
      ratio: of B's rate to the optimiser's, which is A's; 1 changes nothing. The
        paper's experiments take 16 of a rate that is somewhat lower than plain LoRA's.
        It may be traced, as a job's own in `jlora.sweep`.
      embedding_ratio: of both factors of an embedding. PEFT's `loraplus_lr_embedding`
        is this times the optimiser's rate.
      embeddings: the names of leaves that are embeddings.

    Raises:
      OptionError: a ratio that is not above 0.

    Source: Hayou et al. 2024, arXiv:2402.12354; PEFT's `create_loraplus_optimizer`.

    >>> tx = optax.chain(optax.sgd(1.0), lora_plus(ratio=16))
    """
    positive(ratio=ratio, embedding_ratio=embedding_ratio)

    def scaled(x: jax.Array, label: str, is_table: bool) -> jax.Array:
        if label in ("a", "b") and is_table:
            return x * embedding_ratio
        as_b = label in ("b", "bias", "magnitude") or (label == "full" and x.ndim == 1)
        return x * ratio if as_b else x

    def in_table(path: str, node: Any) -> Any:
        is_table = isinstance(node, LowRank) and name_of(path) in embeddings
        return jax.tree.map(lambda _: is_table, node)

    def update(updates: Tree, params: Tree | None) -> Tree:
        tables = map_with_path(in_table, updates, is_leaf=is_node)
        return jax.tree.map(scaled, updates, labels(updates), tables)

    return optax.stateless(update)


def decay_mask(tree: Tree, decayed: Collection[str] = ("a", "b", "full")) -> Tree:
    """True for every leaf that weight decay is for: no magnitudes, no biases.

    A whole leaf of one axis, a norm's scale say, does not decay either.

    Args:
      tree: a lorafied tree, or its trainable half; as `mask=decay_mask` optax passes
        it.
      decayed: labels as of `jlora.labels`.

    Raises:
      OptionError: an unknown label.

    >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=decay_mask)
    """
    unknown = sorted(set(decayed) - {*_LABELS})
    if unknown:
        raise OptionError(f"decayed={unknown}: the labels are {', '.join(_LABELS)}.")

    def decays(x: Any, label: str) -> bool:
        return label in decayed and not (label == "full" and x.ndim < 2)

    return jax.tree.map(decays, tree, labels(tree))
