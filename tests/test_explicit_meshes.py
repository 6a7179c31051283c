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


# -- sums of adapters ------------------------------------------------------------------

SUMMED = {
    "query": {"kernel": make(8, 12)},
    "value": {"kernel": make(12, 8)},
    "table": {"embedding": make(8, 4)},
    "head": {"kernel": make(8, 4)},
}
SPECS = {
    "query": {"kernel": P(None, "model")},
    "value": {"kernel": P("model", "data")},
    "table": {"embedding": P(None, "data")},
    "head": {"kernel": P("data", "model")},
}
OTHERS = {"train": ["head"], "trainable_tokens": {"table": [2, 5]}}
SUMS = {
    "cat": {},
    "svd": {"rank": 2},
    "dare_ties": {"rank": 2, "density": 0.5, "key": jax.random.key(3)},
}


def sums_of(adapters):
    weights = {"a": 0.7, "b": -0.3}
    return {n: jlora.weighted(adapters, weights, n, **how) for n, how in SUMS.items()}


def set_on(params):
    """DoRA with LoHa, whole leaves and rows, whose factors lie as their kernels do."""
    first = jlora.lorafy(params, 2, ["query", "value"], dora=True, **OTHERS)
    second = jlora.lorafy(params, 2, ["query", "value"], variant="loha", **OTHERS)
    out = params
    for name, tree in {"a": first, "b": second}.items():
        half, frozen = jlora.split(tree)
        drawn = np.random.default_rng(ord(name))
        draw = lambda x: drawn.normal(0.3, 0.4, x.shape).astype(np.float32)
        place = lambda x: jax.device_put(draw(x), x.sharding)
        tree = jlora.combine(jax.tree.map(place, half), frozen)
        out = jlora.add(out, name, tree)
    return out


@pytest.fixture(scope="module")
def alone():
    return set_on(jax.tree.map(jnp.asarray, SUMMED))


def numbers_of(tree):
    """What makes out the sums: products of factors, magnitudes, wholes and rows."""
    found = {
        "head": tree["head"]["kernel"].value,
        "table": tree["table"]["embedding"].rows,
    }
    for name in ("query", "value"):
        (t,) = tree[name]["kernel"].adapters.values()
        found[name] = np.asarray(t.a) @ np.asarray(t.b) * np.asarray(t.scale)
        if t.magnitude is not None:
            found[f"{name} magnitude"] = t.magnitude
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def wanted(alone):
    return {name: numbers_of(tree) for name, tree in sums_of(alone).items()}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sums_are_those_of_one_device_and_lie_as_their_kernels(wanted, kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), NAMES, axis_types=kinds)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    adapters = set_on(jax.tree.map(place, SUMMED, SPECS))
    for how, got in sums_of(adapters).items():
        found = numbers_of(got)
        assert found.keys() == wanted[how].keys()
        assert (how == "dare_ties") != ("query magnitude" in found)
        for name, y in wanted[how].items():
            close = np.testing.assert_allclose
            close(found[name], y, 1e-5, 1e-5, err_msg=f"{how} {name}")
        query, value = got["query"]["kernel"], got["value"]["kernel"]
        assert query.base is adapters.base["query"]["kernel"]
        for node, of_a, of_b in [
            (query, P(None, None), P(None, "model")),
            (value, P("model", None), P(None, "data")),
        ]:
            (t,) = node.adapters.values()
            assert t.a.sharding == NamedSharding(mesh, of_a), how
            assert t.b.sharding == NamedSharding(mesh, of_b), how
        assert got["head"]["kernel"].value.sharding.spec == SPECS["head"]["kernel"]
        assert got["table"]["embedding"].rows.sharding.spec == P(None, "data")


def test_weights_are_learned_on_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), NAMES)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    adapters = set_on(jax.tree.map(place, SUMMED, SPECS))

    @jax.jit
    @jax.value_and_grad
    def size(w):
        tree = jlora.weighted(adapters, {"a": w, "b": 1 - w})
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(jlora.merge(tree)))

    # A sum is linear in its weights, so its square's difference quotient is exact.
    with jax.set_mesh(mesh):
        low, high = (size(w)[0] for w in (0.3, 0.5))
        np.testing.assert_allclose(size(0.4)[1], (high - low) / 0.2, rtol=1e-3)
    assert abs(high - low) > 1
