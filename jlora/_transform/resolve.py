"""What a replay starts from: every node as a plain array or a sum of low-rank terms.

Magnitudes become gains, biases of adapters go into those of their layers, trained rows
become a low-rank term, fully trained leaves are themselves. Rules know terms and gains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._errors import StructureError, UnsupportedOpError
from jlora._kernel.adapter import Adapter
from jlora._kernel.axes import Array, accumulation_dtype, align, expand, pad_to
from jlora._kernel.bank import pick, refuse_activated
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import BIAS_NAMES, leaf_paths, module_of

Tree = Any


def resolve(tree: Tree) -> Tree:
    """The tree with arrays and low-rank nodes only, these without variants.

    Raises:
      StructureError: an adapter with a bias on a layer without; a bank of which nothing
        says who acts.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    paths = leaf_paths(tree, is_leaf=is_node)
    for x in leaves:
        _check_bank(x)
    refuse_activated(tree, "jlora.lora")
    terms = bias_terms(dict(zip(paths, leaves, strict=True)))
    out = [_plain(p, x, terms.get(p)) for p, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, out)


def _plain(path: str, x: Any, bias: Array | None) -> Any:
    if is_node(x):
        x = dataclasses.replace(x, path=_in_argument(path) or x.path)
    if isinstance(x, Quantized):
        return LowRank(x, {}, x.path)
    if isinstance(x, LowRank):
        x = x.with_gains()
        return x.map(x.base, lambda t: dataclasses.replace(t, bias=None))
    if isinstance(x, Rows):
        return x.lowrank()
    return plain_leaf(x, bias)


def _check_bank(w: Any) -> None:
    terms = w.adapters.values() if isinstance(w, LowRank) else ()
    if any(t.is_bank and t.which is None for t in terms):
        raise StructureError(
            f"the kernel {w.path!r} {w.shape} holds a bank of adapters, and nothing "
            "says which of them acts.\nSay it for each example, "
            "jlora.mixed(fn)(jlora.with_ids(bank, ids), x), or take one: "
            "jlora.lora(fn)(jlora.pick(bank, number), x)."
        )


def _in_argument(path: str) -> str:
    """A leaf's path in its argument, from that in `(args, kwargs)`."""
    return "/".join(path.split("/")[2:])


def with_magnitudes(x: Any) -> Any:
    """A result, as a lorafied tree holds it: magnitudes in the place of gains.

    Raises:
      UnsupportedOpError: a table with trained rows was changed.
    """
    if not isinstance(x, LowRank):
        return x
    for t in x.adapters.values():
        if t.gain is not None and not set(t.o_dims) <= set(t.b_dims):
            raise UnsupportedOpError(
                f"the table {x.path!r} with trained rows {x.shape} is changed and then "
                "returned, and no node stands for that.\nReturn it as it came in, or "
                "change it outside of jlora.lora, after jlora.merge."
            )
    return x.with_magnitudes()


def plain_leaf(x: Any, bias: Array | None, dtype: Any = None) -> Any:
    """A leaf or fully trained leaf as an array, with what adapters add to it.

    Args:
      x: the leaf.
      bias: what adapters add.
      dtype: of the array, where that is of floating-point numbers; None is its own.
    """
    x = x.value if isinstance(x, Full) else x
    own = getattr(x, "dtype", None)  # some leaves are no arrays
    if dtype is None or own is None or not jnp.issubdtype(own, jnp.floating):
        dtype = own
    if bias is not None:
        x = x.astype(bias.dtype) + bias
    return x if getattr(x, "dtype", None) == dtype else x.astype(dtype)


def bias_terms(leaves: Mapping[str, Any]) -> dict[str, Array]:
    """What adapters add to biases, float32 at least, by the bias's path.

    Args:
      leaves: nodes and plain leaves by path.

    Raises:
      StructureError: an adapter with a bias on a layer without.
    """
    terms: dict[str, Array] = {}
    for path, x in leaves.items():
        if not isinstance(x, LowRank):
            continue
        for t in x.adapters.values():
            if t.bias is not None:
                name = bias_of(path, x, leaves)
                terms[name] = terms.get(name, 0) + _bias_term(x, t, t.bias)
    return terms


def bias_of(path: str, kernel: Any, leaves: Mapping[str, Any]) -> str:
    """The path of the bias of a kernel's layer.

    Raises:
      StructureError: it has none.
    """
    for name in BIAS_NAMES:
        beside = f"{module_of(path)}/{name}".lstrip("/")
        if beside in leaves:
            return beside
    raise StructureError(
        f"the adapter of {path!r} {tuple(kernel.shape)} is to have a bias, and its "
        f"layer has none ({' or '.join(BIAS_NAMES)} beside the kernel) that it could "
        "be added to.\nLeave lora_bias out, or the layer out of targets."
    )


def _bias_term(w: LowRank, t: Adapter, bias: Array) -> Array:
    """`scale * bias` on the outputs of the whole kernel, in the kernel's order."""
    t = pick(dataclasses.replace(t, bias=bias))
    bias, order = t.bias, tuple(sorted(t.o_dims))
    term = align(bias.astype(accumulation_dtype(w.dtype)), t.o_dims, order)
    term = term * expand(t.scale, t.s_dims, order)
    return pad_to(term, [t.starts[d] for d in order], [w.shape[d] for d in order])
