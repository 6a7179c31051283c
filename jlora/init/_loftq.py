"""LoftQ: adapters that make up for what quantising their kernels loses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora._errors import OptionError, StructureError
from jlora._kernel.axes import Array
from jlora._kernel.nodes import LowRank, is_node
from jlora._kernel.quantized import Quantized, dense
from jlora._paths import leaves_by_path
from jlora._tree.from_kernel import start_from_kernel, without_product
from jlora.init._inputs import fresh_nodes
from jlora.init._pissa import PiSSA
from jlora.init._restart import map_nodes, placed
from jlora.quant._quantize import quantize

Tree = Any


def loftq(
    tree: Tree,
    form: Literal["int8", "nf4", "fp4", "fp8"] = "nf4",
    *,
    steps: int = 1,
    block: int | None = None,
    double: bool = True,
) -> Tree:
    """Quantise the adapted kernels, and start their adapters with what that loses.

    Each step quantises `W - s·A·B` to Q, then takes A and B from the r largest singular
    components of `W - Q`. More steps bring Q and the product closer to W together.

    Costs a quantisation and a decomposition a kernel and step.

    Args:
      tree: from `lorafy`, on dense kernels, with its default start. Kernels without an
        adapter stay dense: `jlora.quantize` takes them.
      form: as of `jlora.quantize`.
      steps: how often both are done; the paper takes 1 to 5.
      block: as of `jlora.quantize`.
      double: as of `jlora.quantize`.

    Returns:
      The tree, whose bases are quantised. It computes nearly what it did, nearer than
      with `jlora.quantize` alone. What `unshift` makes of it lies as near.

    Raises:
      OptionError: a form that is unknown, or `steps` that are no number above 0.
      StructureError: a tree without adapters, with adapters that have begun, or whose
        kernels are quantised already; DoRA, whose lengths are those of the kernel.
      ShapeError: a block that does not divide a kernel's rows.

    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1; PEFT's `loftq_init`, which
    leaves the scale out: there the product is right where alpha = r.

    >>> kernel = jax.random.normal(jax.random.key(0), (64, 8))
    >>> tree = loftq(jlora.lorafy({"w": kernel}, 2, ["w"]))
    >>> off = lambda w: float(jnp.linalg.norm(w - kernel))
    >>> alone = jlora.dequantize(jlora.quantize({"w": kernel}, "nf4", targets=["w"]))
    >>> off(jlora.merge(tree)["w"]) < off(alone["w"])
    True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r}: expected a whole number, 1 or more.")
    nodes = fresh_nodes("loftq", tree, shifts=True)
    for path, x in nodes.items():
        if any(t.magnitude is not None for t in x.adapters.values()):
            raise StructureError(
                f"the adapter of {path!r} {x.shape} is DoRA's, whose lengths are those "
                "of the dense kernel.\nLorafy without dora=True, or quantise the tree "
                "by jlora.quantize."
            )
    which = "|".join(re.escape(path) for path in nodes)
    out = tree
    for _ in range(steps):
        quantised = quantize(out, form, block=block, double=double, targets=which)
        codes = leaves_by_path(quantised, is_leaf=is_node)
        started = {p: _started(p, x, codes[p].base) for p, x in nodes.items()}
        out = map_nodes(lambda path, x: _rest(nodes[path], started[path]), tree)  # noqa: B023

    def one(path: str, x: LowRank) -> LowRank:
        return LowRank(codes[path].base, started[path].adapters, path)

    return map_nodes(one, tree)


def _started(path: str, x: LowRank, codes: Quantized) -> LowRank:
    """The kernel with adapters of the largest components of `W - Q`."""
    lost = x.base.astype(jnp.float32) - dense(codes).astype(jnp.float32)
    adapters = {}
    for name, t in x.adapters.items():
        key = jax.random.key(0)  # nothing is drawn
        made, lost = start_from_kernel(PiSSA(), key, lost, t, path)
        adapters[name] = placed(made, x.base)
    return dataclasses.replace(x, adapters=adapters)


def _rest(x: LowRank, started: LowRank) -> LowRank:
    """The kernel without the product of its adapters: what is quantised next."""
    base: Array = x.base
    for t in started.adapters.values():
        base = without_product(base, t)
    return dataclasses.replace(x, base=base)
