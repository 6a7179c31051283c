"""Meshes whose axes are explicit, as `jax.make_mesh` makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora

NAMES = ("data", "model")
X = np.linspace(-1, 1, 192, dtype=np.float32).reshape(4, 6, 8)
IDS = np.arange(24).reshape(4, 6) % 11
ROW = P("data")


def dense(p, x):
    return jnp.dot(x, p["kernel"], out_sharding=ROW)


def shared(p, x):
    q, k, v = (jnp.dot(x, p[n], out_sharding=ROW) for n in ("query", "key", "value"))
    return jnp.tanh(q) * k + v


def tied(p, ids):
    x = jnp.tanh(p["embedding"].at[ids].get(out_sharding=ROW))
    return jnp.einsum("btd,vd->btv", x, p["embedding"], out_sharding=ROW)


def scanned(p, x):
    body = lambda x, w: (jnp.tanh(jnp.dot(x, w, out_sharding=ROW)), None)
    return lax.scan(body, x, p["kernel"])[0]


def make(*shape):
    return np.random.default_rng(3).normal(0, 0.4, shape).astype(np.float32)


KERNEL = {"kernel": make(8, 6)}
LAYERS = {
    "targets": {
        "kernel": jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    }
}
CASES = {
    "dense": (dense, KERNEL, X, P(None, "model"), {"targets": ["kernel"]}),
    # The batch is split over the axis that the outputs are split over.
    "dense across": (dense, KERNEL, X, P("model", "data"), {"targets": ["kernel"]}),
    "dora across": (
        dense, KERNEL, X, P("model", "data"), {"targets": ["kernel"], "dora": True},
    ),
    "shared input": (
        shared, {n: make(8, 6) for n in ("query", "key", "value")}, X,
        P("model", None), {"targets": ["query", "key", "value"]},
    ),
    "tied table": (
        tied, {"embedding": make(12, 8)}, IDS, P("model", "data"),
        {"targets": ["embedding"]},
    ),
    "trained rows": (
        tied, {"embedding": make(12, 8)}, IDS, P("model", "data"),
        {"targets": [], "trainable_tokens": {"embedding": [1, 5]}},
    ),
    "scanned layers": (
        scanned, {"kernel": make(3, 8, 8)}, X, P(None, None, "data"),
        {**LAYERS, "dora": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_merged_tree(case):
    f, params, x, spec, options = CASES[case]

    def on(mesh, tree, spec):
        place = NamedSharding(mesh, spec)
        return jax.tree.map(lambda v: jax.device_put(v, place), tree)

    def values(mesh, tree, g):
        half, frozen = jlora.split(tree)
        inputs = on(mesh, x, ROW)
        loss = lambda t: jnp.sum(g(jlora.combine(t, frozen), inputs) ** 2)
        return jax.jit(g)(tree, inputs), jax.jit(jax.grad(loss))(half)

    mesh = jax.make_mesh((2, 2), NAMES)
    with jax.set_mesh(mesh):
        tree = jlora.lorafy(on(mesh, params, spec), 2, **options)
        drawn = randomise(tree, jax.random.key(1))
        tree = jax.tree.map(lambda v, old: jax.device_put(v, old.sharding), drawn, tree)
        got = values(mesh, tree, jlora.lora(f))
        merged = jax.tree.map(np.asarray, jlora.merge(tree))
    one = jax.make_mesh((1, 1), NAMES)
    with jax.set_mesh(one):
        alone = on(one, jax.tree.map(np.asarray, tree), P())
        want = values(one, alone, lambda p, x: f(jlora.merge(p), x))
        also = on(one, merged, P())
        np.testing.assert_allclose(
            f(also, on(one, x, ROW)), want[0], rtol=1e-5, atol=1e-5
        )
    for y, z in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        y, z = np.asarray(y), np.asarray(z)
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4 * (1 + np.abs(z).max()))
