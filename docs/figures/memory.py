"""What training keeps in memory, of Llama 3.1 8B: counted by jlora on its shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from parameters import shapes
from style import Colours

import jlora

SIZE = (6.8, 3.0)
RANK = 16


def size(tree: Any) -> float:
    """GiB."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**30


def account() -> dict[str, tuple[float, float, float]]:
    """Weights, gradients and AdamW's moments of each way to train, in GiB."""
    whole, base = shapes(jnp.float32), shapes(jnp.bfloat16)
    quantised = jax.eval_shape(
        lambda params: jlora.quantize(params, "nf4", exclude=["lm_head"]), base
    )
    moments = lambda tree: size(jax.eval_shape(optax.adamw(1e-4).init, tree))  # noqa: E731
    found = {"full, float32": (size(whole), size(whole), moments(whole))}
    for name, params in [("LoRA, bfloat16", base), ("QLoRA, nf4", quantised)]:
        tree = jlora.lorafy(params, RANK, "all-linear", exclude=["lm_head"])
        trained, _ = jlora.split(tree)
        found[name] = (size(tree), size(trained), moments(trained))
    return found


def draw(figure: Figure, colours: Colours) -> None:
    """A bar for each way, in parts."""
    axes = figure.subplots()
    found = account()
    parts = ["weights", "gradients", "AdamW's moments"]
    colour = [colours.faint, colours.second, colours.trained]
    for row, sizes in enumerate(found.values()):
        left = 0.0
        for part, width in enumerate(sizes):
            label = parts[part] if row == 0 else None
            axes.barh(row, width, 0.6, left, color=colour[part], label=label)
            left += width
        axes.text(left + 1.5, row, f"{left:.1f} GiB", va="center")
    axes.set_yticks(range(len(found)), found)
    axes.invert_yaxis()
    axes.set(xlabel="GiB", xlim=(0, 142))
    axes.legend(loc="lower right")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
