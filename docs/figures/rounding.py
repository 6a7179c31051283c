"""What is lost when an update is merged into bfloat16, measured by `jlora.merge`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from style import Colours

import jlora

SIZE = (6.8, 3.3)
WIDTH, RANK = 256, 8
RATIOS = np.logspace(-4, 0, 17)  # the update's norm over the kernel's


def measured(dtype: jnp.dtype) -> tuple[list[float], list[float]]:
    """By ratio: the part of the update that is lost, and of weights not given back."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
    base = kernel.astype(dtype)
    tree = jlora.lorafy({"kernel": base}, RANK, ["kernel"])
    trained, frozen = jlora.split(tree)
    noise = [jax.random.normal(key, x.shape) for key, x in zip(
        keys[1:], jax.tree.leaves(trained), strict=True)]  # fmt: skip
    a, b = noise
    unit = jnp.linalg.norm(kernel) / jnp.linalg.norm(a @ b)
    lost, changed = [], []
    for ratio in RATIOS:
        half = jax.tree.unflatten(jax.tree.structure(trained), [a, ratio * unit * b])
        merged, report = jlora.merge(jlora.combine(half, frozen), report=True)
        lost.append(report[0].lost)
        update = (ratio * unit * (a @ b)).astype(dtype)
        changed.append(float((merged["kernel"] - update != base).mean()))
    return lost, changed


def draw(figure: Figure, colours: Colours) -> None:
    """The two parts, side by side."""
    left, right = figure.subplots(1, 2, sharey=True)
    kinds = [
        ("bfloat16", jnp.bfloat16, colours.trained),
        ("float16", jnp.float16, colours.second),
        ("float32", jnp.float32, colours.third),
    ]
    for name, dtype, colour in kinds:
        lost, changed = measured(dtype)
        left.semilogx(RATIOS, lost, color=colour, label=name)
        # Those of float16 and bfloat16 lie on each other.
        dashes = "--" if name == "float16" else "-"
        right.semilogx(RATIOS, changed, dashes, color=colour, label=name)
    left.set_title("update lost to rounding", fontsize=11)
    right.set_title("weights that subtracting\ndoes not give back", fontsize=11)
    left.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    left.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xticks(
            [1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.0001", "0.001", "0.01", "0.1", "1"]
        )
        axes.tick_params(axis="x", labelsize=8.5)
        axes.grid()
    figure.supxlabel("norm of the update / norm of the kernel", fontsize=11)
    left.legend(loc="upper right")
