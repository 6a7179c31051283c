"""A net with every kind of kernel, in JAX; PyTorch's is in `peft_live`."""

import jax.numpy as jnp
import numpy as np
from jax import lax

V, D, E = 13, 6, 3
IDS = np.array([[1, 5, 2, 12, 4], [0, 3, 3, 7, 9]])


def tree_of(params):
    """PyTorch's parameters as a Flax tree: kernels [in, out], windows first."""
    tree = {}
    for name, value in params.items():
        *parents, last = name.split(".")
        if last == "weight" and parents[-1] == "emb":
            last = "embedding"
        elif last == "weight" and value.ndim == 1:
            last = "scale"
        elif last == "weight" and value.ndim > 2:
            last, value = "kernel", np.moveaxis(value, (0, 1), (-1, -2))
        elif last == "weight":
            last, value = "kernel", value if parents[-1] == "c_attn" else value.T
        elif value.ndim == 3:  # experts [E, out, in]
            value = value.swapaxes(1, 2)
        at = tree
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = jnp.asarray(value)
    return tree


def conv(x, w, padding, strides, dims):
    y = lax.conv_general_dilated(
        x, w["kernel"], strides, padding, dimension_numbers=dims
    )
    return y + w["bias"]


def apply(p, ids):
    x = p["emb"]["embedding"][ids]
    x = x + jnp.tanh(x @ p["q"]["kernel"] + p["q"]["bias"]) * (x @ p["v"]["kernel"])
    a, b = jnp.split(x @ p["c_attn"]["kernel"] + p["c_attn"]["bias"], 2, -1)
    y = conv(x, p["time"], [(1, 1)], (1,), ("NTC", "TIO", "NTC"))
    x = x + jnp.tanh(a) * b + y
    up = jnp.einsum("btd,edo->ebto", x, p["experts"]["gate_up_proj"])
    gate, up = jnp.split(up, 2, -1)
    x = x + jnp.einsum("ebto,eod->btd", jnp.tanh(gate) * up, p["experts"]["down_proj"])
    x = jnp.stack([x, jnp.sin(x)], -1)  # [B, T, d, 2]
    x = conv(x, p["image"], [(1, 1), (0, 0)], (1, 2), ("NHWC", "HWIO", "NHWC"))
    x = jnp.tanh(x).swapaxes(2, 3).reshape(*ids.shape, -1)
    return x @ p["head"]["kernel"] + p["head"]["bias"]
