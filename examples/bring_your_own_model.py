"""LoRA on your own model: Flax Linen, Flax NNX and Equinox, side by side.

What it shows: the same four calls on three frameworks, `lorafy`, `lora`, `split` and
`merge`. A small network learns a function; then an adapter of rank 2 on its two hidden
kernels, 6% of the weights, teaches it another one while the base stays as it is.

On what: points of a curve, made here. How long: fifteen seconds on two CPU cores.

    python examples/bring_your_own_model.py

Needs `pip install "jlora[train]" equinox`. What a framework asks for is in the three
functions at the top; everything below them is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import jlora

WIDTH = 64
BASE_STEPS, ADAPTER_STEPS = 600, 1000
Made = tuple[Any, Callable[[Any, jax.Array], jax.Array], list[str]]


def linen() -> Made:
    """Flax Linen: parameters are a dict, and `apply` takes them."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = jnp.tanh(nn.Dense(WIDTH, name="first")(x))
            x = jnp.tanh(nn.Dense(WIDTH, name="second")(x))
            x = jnp.tanh(nn.Dense(WIDTH, name="third")(x))
            return nn.Dense(1, name="out")(x)

    net = Net()
    params = net.init(jax.random.key(0), jnp.ones((1, 1)))["params"]
    return params, lambda p, x: net.apply({"params": p}, x), ["second", "third"]


def flax_nnx() -> Made:
    """Flax NNX: split the model into its graph and its parameters."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(1, WIDTH, rngs=rngs)
            self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.third = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in (self.first, self.second, self.third):
                x = jnp.tanh(layer(x))
            return self.out(x)

    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)
    return state, lambda s, x: nnx.merge(graph, s)(x), ["second", "third"]


def equinox() -> Made:
    """Equinox: the model is the tree, its activation function a leaf of it."""
    net = eqx.nn.MLP(1, 1, WIDTH, depth=3, activation=jnp.tanh, key=jax.random.key(0))
    return net, lambda net, x: jax.vmap(net)(x), ["layers/1", "layers/2"]


# ------------------------------------------------------------- the same for all of them


def fit(tree: Any, apply: Any, y: jax.Array, x: jax.Array, steps: int) -> Any:
    """Train whatever is trainable in a tree, by optax alone."""
    trainable, frozen = jlora.split(tree)
    function = jlora.lora(apply)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def step(trainable: Any, state: Any) -> tuple[Any, Any]:
        def loss(trainable: Any) -> jax.Array:
            return jnp.mean((function(jlora.combine(trainable, frozen), x) - y) ** 2)

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for _ in range(steps):
        trainable, state = step(trainable, state)
    return jlora.combine(trainable, frozen)


def teach(name: str, made: Made) -> tuple[float, float, float]:
    """Train a base on one curve and an adapter on another; print what came of it.

    Returns:
      The errors on the second curve, mean squares: of the base, adapted, merged.
    """
    params, apply, targets = made
    x = jnp.linspace(-2, 2, 128)[:, None]
    old, new = jnp.sin(2 * x), jnp.sin(2 * x) + 0.5 * jnp.cos(5 * x)

    whole = jlora.lorafy(params, targets=[], train=[r".*"])  # every weight
    base = jlora.merge(fit(whole, apply, old, x, BASE_STEPS))

    tree = fit(
        jlora.lorafy(base, rank=2, targets=targets), apply, new, x, ADAPTER_STEPS
    )
    merged = jlora.merge(tree)  # the framework's own tree again

    function = jlora.lora(apply)
    error = lambda y: float(jnp.mean((y - new) ** 2))  # noqa: E731
    errors = error(apply(base, x)), error(function(tree, x)), error(apply(merged, x))
    summary = jlora.summary(tree)
    print(f"{name:8} trains {summary.trainable} of {summary.total:,} parameters; "
          "error {:.4f} -> {:.4f}, merged {:.4f}".format(*errors))  # fmt: skip
    return errors


def main() -> dict[str, tuple[float, float, float]]:
    """Teach each of the three."""
    made = {"Linen": linen, "NNX": flax_nnx, "Equinox": equinox}
    return {name: teach(name, make()) for name, make in made.items()}


if __name__ == "__main__":
    main()
