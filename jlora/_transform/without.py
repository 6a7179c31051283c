"""The same parameters without their adapters: the model that training started from.

Preference training, distillation and penalties compare a model with the one it was. Its
kernels are the bases of the adapted ones, so no second copy of it is needed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora import _compat
from jlora._compat import Jaxpr
from jlora._errors import StructureError
from jlora._kernel.nodes import Full, LowRank, Rows, is_node
from jlora._kernel.quantized import Quantized
from jlora._paths import leaf_paths

Tree = Any

#: What `without_adapters` calls a kernel in a program; the rule of `name` knows it.
MARK = "jlora.without_adapters"


def without_adapters(params: Tree) -> Tree:
    """Return the parameters as they are without adapters; nothing is copied.

    It may be called inside of a function that `jlora.lora` transforms, where parameters
    are arrays: a loss of `jlora.train` gets the model that training started from, in
    the same step and from the same memory. Outside it takes a lorafied tree.

    Args:
      params: a tree of parameters, lorafied or inside of `jlora.lora`.

    Returns:
      The tree of bases, arrays (or `Quantized`) where nodes stood.

    Raises:
      StructureError: a leaf is trained as a whole, and nothing holds what it was.
        Inside of `jlora.lora` also: an adapter has a bias of its own.

    >>> params = jlora.lorafy({"kernel": jnp.ones((3, 2))}, rank=1, targets=["kernel"])
    >>> def change(params, x):  # of the outputs, by the adapter
    ...     frozen = without_adapters(params)
    ...     return x @ params["kernel"] - x @ frozen["kernel"]
    >>> jlora.lora(change)(params, jnp.ones((1, 3)))  # B is zero
    Array([[0., 0.]], dtype=float32)
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_node)
    paths = leaf_paths(params, is_leaf=is_node)
    bare = [_bare(path, x) for path, x in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(structure, bare)


def _bare(path: str, x: Any) -> Any:
    if isinstance(x, Full):
        raise StructureError(_trained_whole([path]))
    if isinstance(x, LowRank | Rows):
        return x.base
    is_float = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    return checkpoint_name(x, MARK) if is_float and not isinstance(x, Quantized) else x


def check_bases(jaxpr: Jaxpr, arguments: Tree) -> None:
    """Refuse a program that asks for what the nodes do not hold.

    Args:
      jaxpr: of a function that `jlora.lora` transforms.
      arguments: `(args, kwargs)`, as it was called with.

    Raises:
      StructureError: leaves are trained whole, or have an adapter's bias added.
    """
    leaves = jax.tree.leaves(arguments, is_leaf=is_node)
    whole = [isinstance(x, Full) for x in leaves]
    biased = [x.path for x in leaves if isinstance(x, LowRank) and _has_bias(x)]
    if not (any(whole) or biased) or not _is_marked(jaxpr):
        return
    if biased:
        raise StructureError(_with_bias(biased))
    paths = leaf_paths(arguments, is_leaf=is_node)
    shown = ["/".join(p.split("/")[2:]) for p, w in zip(paths, whole, strict=True) if w]
    raise StructureError(_trained_whole(shown))


def _has_bias(w: LowRank) -> bool:
    return any(t.bias is not None for t in w.adapters.values())


def _is_marked(jaxpr: Any) -> bool:
    bare = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        (eqn.primitive.name == "name" and eqn.params["name"] == MARK)
        or any(map(_is_marked, _compat.programs_in(eqn)))
        for eqn in bare.eqns
    )


def _trained_whole(paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return (
        f"jlora.without_adapters: {shown} {'is' if len(paths) == 1 else 'are'} trained "
        "as a whole, and nothing holds what was there before.\nPut an adapter there, "
        "or compute what the frozen model says before training."
    )


def _with_bias(paths: list[str]) -> str:
    return (
        f"jlora.without_adapters: the adapter of {paths[0]!r} has a bias, which inside "
        "of jlora.lora is part of its layer's.\nLeave lora_bias out, or compute what "
        "the frozen model says before training."
    )
