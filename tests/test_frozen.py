"""Which leaves get gradients: never a frozen one, always one that lies beside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import assert_close, randomise

import jlora

X = jnp.linspace(-1, 1, 6).reshape(2, 3)


def lorafied(wrap=lambda p: p):
    params = {
        "embed": jnp.eye(3) + 0.5,
        "q": {"kernel": jnp.ones((3, 5)) / 3, "bias": jnp.ones(5)},
        "norm": {"scale": jnp.ones(5)},
    }
    tree = jlora.lorafy(wrap(params), 2, ["q"], train=["norm"])
    return randomise(tree, jax.random.key(1))


def model(p, x):
    y = x @ p["embed"] @ p["q"]["kernel"] + p["q"]["bias"]
    return jnp.tanh(y) * p["norm"]["scale"]


PROMPT = jnp.array([0.3, -0.2, 0.1])
BESIDE = {
    "in a dict": (
        lambda t: {"model": t, "prompt": PROMPT},
        lambda p: (p["model"], p["prompt"]),
    ),
    "in a tuple": (lambda t: (t, PROMPT), lambda p: p),
    "added to the tree": (
        lambda t: {**t, "prompt": PROMPT},
        lambda p: (p, p["prompt"]),
    ),
    "added to a layer": (
        lambda t: {**t, "q": {**t["q"], "prompt": PROMPT}},
        lambda p: (p, p["q"]["prompt"]),
    ),
    "beside a part": (
        lambda t: {"a": {"b": {"params": t}}, "prompt": PROMPT},
        lambda p: (p["a"]["b"]["params"], p["prompt"]),
    ),
}


@pytest.mark.parametrize("way", BESIDE)
def test_a_leaf_beside_the_tree_keeps_its_gradient_and_frozen_ones_have_none(way):
    put, take = BESIDE[way]
    tree = lorafied()

    def f(p):
        p, prompt = take(p)
        return jnp.sum(model(p, X + prompt) ** 2)

    grads = jax.jit(jax.grad(jlora.lora(f)))(put(tree))
    p, prompt = take(grads)
    merged = jlora.merge(tree)
    want = jax.grad(lambda x: jnp.sum(model(merged, X + x) ** 2))(PROMPT)
    assert_close(prompt, want, rtol=1e-4, atol=1e-5)
    assert not np.any(p["embed"])
    assert not np.any(p["q"]["bias"])
    assert not np.any(p["q"]["kernel"].base)
    assert np.any(p["norm"]["scale"].value)
    assert np.any(p["q"]["kernel"].adapters[""].b)


def stacked(tree):
    layers = {"layers": {"0": tree, "1": jax.tree.map(lambda x: x + 0, tree)}}
    return jlora.stack_layers(layers), lambda p: jax.tree.map(
        lambda x: x[0], p["layers"]
    )


TREES = {
    "as lorafied": lambda: (lorafied(), lambda p: p),
    "a part of it": lambda: (
        lorafied(lambda p: {"params": p})["params"], lambda p: p),
    "a part elsewhere": lambda: (
        {"net": lorafied(lambda p: {"params": p})["params"]}, lambda p: p["net"]),
    "after jit": lambda: (jax.jit(lambda t: t)(lorafied()), lambda p: p),
    "combined": lambda: (jlora.combine(*jlora.split(lorafied())), lambda p: p),
    "loaded again": lambda: (jax.tree.map(jnp.copy, lorafied()), lambda p: p),
    "stacked": lambda: stacked(lorafied()),
}  # fmt: skip


@pytest.mark.parametrize("way", TREES)
def test_a_masked_optimiser_on_the_whole_tree_leaves_frozen_leaves(way, recwarn):
    tree, take = TREES[way]()
    f = jlora.lora(lambda p: jnp.sum(model(take(p), X) ** 2))
    mask = jlora.trainable_mask(tree)
    assert not recwarn.list
    tx = optax.masked(optax.sgd(0.1), mask)
    grads = jax.grad(f)(tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), tree, after)
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)


def test_a_mask_that_would_pass_a_gradient_on_says_so():
    tree = {"model": lorafied(), "prompt": PROMPT}
    with pytest.warns(jlora.JloraWarning, match=r"prompt"):
        mask = jlora.trainable_mask(tree)
    assert mask["prompt"] is False
    trained = {"model": lorafied(), "prompt": jlora.Full(PROMPT)}
    assert jlora.trainable_mask(trained)["prompt"].value is True
    f = jlora.lora(lambda p: jnp.sum(model(p["model"], X + p["prompt"]) ** 2))
    assert np.any(jax.grad(f)(trained)["prompt"].value)
