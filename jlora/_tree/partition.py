"""Which leaves are trained: masks, labels, and the split that optimisers take."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import jax

from jlora._errors import JloraWarning, StructureError
from jlora._kernel.adapter import DIMS_OF, PARTS, Adapter
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._paths import BIAS_NAMES, leaf_paths, map_with_path, name_of
from jlora._text import listed
from jlora._transform.frozen import beside

Tree = Any


def labels(tree: Tree) -> Tree:
    """A label for every leaf of a tree, or of a half of one, for `optax.partition`.

    `"a"` and `"b"` are the factors (LoRA+ gives them different rates), and what is
    trained on their sides in VeRA, LoHa and LoKr, `"e"` AdaLoRA's singular values,
    `"magnitude"` DoRA's, `"full"` a fully trained leaf, `"bias"` one that is named bias
    or an adapter's own, `"rows"` the trained rows of a table, `"frozen"` the rest.

    >>> tree = lorafy({"w": jnp.ones((3, 2))}, rank=1, targets=["w"])
    >>> [str(x) for x in jax.tree.leaves(labels(tree))]
    ['frozen', 'a', 'b', 'frozen']
    """

    def label(path: str, node: Any) -> Any:
        if isinstance(node, Full):
            kind = "bias" if name_of(path) in BIAS_NAMES else "full"
            return dataclasses.replace(node, value=_label(node.value, kind))
        if isinstance(node, LowRank):
            return node.map(_label(node.base, "frozen"), _label_adapter)
        if isinstance(node, Rows):
            base, rows = _label(node.base, "frozen"), _label(node.rows, "rows")
            return dataclasses.replace(node, base=base, rows=rows)
        return _label(node, "frozen")

    return map_with_path(label, tree, is_leaf=is_node)


def _label_adapter(t: Adapter) -> Adapter:
    frozen = ("scale", "key", "gain", "keep")
    named = {n: "frozen" if n in frozen else n for n in DIMS_OF}
    found = {n: _label(getattr(t, n), name) for n, name in named.items()}
    if t.parts is not None:
        found["parts"] = {n: _label(x, PARTS[n]) for n, x in t.parts.items()}
    return dataclasses.replace(t, **found)


def _label(x: Any, name: str) -> Any:
    """The label of all arrays there; None and optax's masked places are none."""
    return jax.tree.map(lambda _: name, x)


def trainable_mask(tree: Tree) -> Tree:
    """True for every leaf that is trained, for `optax.masked`.

    A plain leaf beside a lorafied tree, `{"model": tree, "prompt": x}`, counts as
    frozen and has a gradient, which `optax.masked` would add to it as it is; a
    `JloraWarning` says so. `jlora.Full(x)` is trained, and True.

    Raises:
      StructureError: nothing in the tree is trained.
    """
    if strangers := beside(tree):
        warnings.warn(
            "these leaves lie beside a lorafied tree, not in it. The mask is False for "
            "them, but jlora.lora lets their gradients pass, and optax.masked adds to "
            f"a leaf the gradient that it leaves alone:\n  {listed(strangers)}\n"
            "Make such a leaf jlora.Full(x) to train it, or pass it on its own.",
            JloraWarning,
            stacklevel=2,
        )
    return _mask(tree)


def check_trained(tree: Tree) -> None:
    """Refuse a tree of which nothing is trained.

    Raises:
      StructureError: it holds no adapter and no fully trained leaf.
    """
    _mask(tree)


def _mask(tree: Tree) -> Tree:
    mask = jax.tree.map(lambda label: label != "frozen", labels(tree))
    if not any(jax.tree.leaves(mask)):
        raise StructureError(
            "nothing in this tree is trained: it holds no adapter and no fully trained "
            "leaf.\nCall jlora.lorafy(params, ...) first, and pass its result on."
        )
    return mask


def split(tree: Tree) -> tuple[Tree, Tree]:
    """The trainable half and the frozen half; each holds None in the other's places.

    `jax.grad` with respect to the trainable half never forms a frozen gradient, and
    optimiser state, clipping and accumulation touch only that half.

    Args:
      tree: a lorafied tree, of arrays, shapes, shardings or anything else.

    Raises:
      StructureError: nothing in the tree is trained.
    """
    leaves, structure = jax.tree.flatten(tree)
    try:
        mask = _known_mask(structure)
    except TypeError:  # what is static there has no hash
        mask = _mask_of(structure)
    pairs = list(zip(leaves, mask, strict=True))
    trainable = jax.tree.unflatten(structure, [x if m else None for x, m in pairs])
    frozen = jax.tree.unflatten(structure, [None if m else x for x, m in pairs])
    return trainable, frozen


def _mask_of(structure: Any) -> tuple[bool, ...]:
    """Which leaves of such a tree are trained."""
    tree = jax.tree.unflatten(structure, range(structure.num_leaves))
    return tuple(jax.tree.leaves(_mask(tree)))


_known_mask = functools.lru_cache(maxsize=64)(_mask_of)


def combine(trainable: Tree, frozen: Tree) -> Tree:
    """Undo `split`.

    Raises:
      StructureError: the halves are of different trees, or both hold a leaf.
    """
    is_none = lambda x: x is None  # noqa: E731
    structure: Any
    leaves, structure = jax.tree.flatten(trainable, is_leaf=is_none)
    others, own = jax.tree.flatten(frozen, is_leaf=is_none)
    if structure != own:
        raise StructureError(
            "the two halves are not of one tree.\nPass the results of one "
            "jlora.split(tree), or updates of them."
        )

    pairs = list(zip(leaves, others, strict=True))
    twice = [i for i, pair in enumerate(pairs) if all(x is not None for x in pair)]
    if twice:
        path = leaf_paths(trainable, is_leaf=is_none)[twice[0]]
        raise StructureError(
            f"both halves hold the leaf {path!r}.\nPass the trainable half and the "
            "frozen half of one jlora.split(tree)."
        )
    return jax.tree.unflatten(structure, [y if x is None else x for x, y in pairs])
