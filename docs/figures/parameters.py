"""How many numbers are trained, by rank: of Llama 3.1 8B, as jlora counts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from style import Colours

import jlora
from jlora import models

SIZE = (6.8, 3.6)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONFIG = models.LlamaConfig.from_dict(
    {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "hidden_act": "silu", "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
)  # fmt: skip


def shapes(dtype: jnp.dtype) -> dict:
    """The model's parameters as shapes: nothing is allocated."""
    model = models.Llama(CONFIG, param_dtype=dtype, scan_layers=True)
    make = lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))


def counts(targets: list[str] | str) -> list[int]:
    """Trained numbers at each rank."""
    params = shapes(jnp.bfloat16)
    trees = [jlora.lorafy(params, rank, targets) for rank in RANKS]
    return [jlora.summary(tree).trainable for tree in trees]


def draw(figure: Figure, colours: Colours) -> None:
    """Two choices of targets, and all parameters beside them."""
    axes = figure.subplots()
    all_of_them = sum(leaf.size for leaf in jax.tree.leaves(shapes(jnp.bfloat16)))
    ways = [
        ("all-linear", colours.trained, {"xytext": (-4, 6), "ha": "right"}),
        (["query", "value"], colours.second, {"xytext": (5, -13)}),
    ]
    for targets, colour, place in ways:
        found = counts(targets)
        label = f"targets={targets!r}".replace("'", '"')
        axes.loglog(RANKS, found, "o-", color=colour, markersize=4, label=label)
        at = RANKS.index(16)
        text = f"{found[at] / 1e6:.1f} million, {found[at] / all_of_them:.2%}"
        axes.annotate(
            text, (RANKS[at], found[at]), textcoords="offset points",
            fontsize=9.5, color=colour, **place,
        )  # fmt: skip
    axes.axhline(all_of_them, color=colours.faint, ls="--", lw=1)
    axes.text(1, all_of_them / 1.25, f"all {all_of_them / 1e9:.2f} billion", va="top")
    axes.set_xticks(RANKS, map(str, RANKS))
    axes.minorticks_off()
    axes.set(xlabel="rank", ylabel="trained parameters", ylim=(2e5, 2e10))
    axes.grid()
    axes.legend(loc="lower right")
