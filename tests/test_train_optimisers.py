"""Optimisers that want more than gradients: values, and the loss as a function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close, randomise

import jlora
import jlora.train as jt

D, H, V = 5, 7, 3


def problem(dropout=0.0):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "q": {"kernel": jax.random.normal(keys[0], (D, H)) * 0.3},
        "head": {"kernel": jax.random.normal(keys[1], (H, V)) * 0.3},
    }
    batch = {
        "x": jax.random.normal(keys[2], (8, D)),
        "y": jax.random.randint(keys[3], (8,), 0, V),
    }
    tree = jlora.lorafy(params, 2, ["q", "head"], dropout=dropout)
    return randomise(tree, jax.random.key(3)), batch


def loss_fn(params, batch, key):
    logits = jnp.tanh(batch["x"] @ params["q"]["kernel"]) @ params["head"]["kernel"]
    return jt.cross_entropy(logits, batch["y"])


def by_hand(tx, params, batch, steps):
    """Steps of an optimiser on the merged function, as optax's manual writes them."""
    half, frozen = jlora.split(params)

    def loss(half):
        total, count = loss_fn(jlora.merge(jlora.combine(half, frozen)), batch, None)
        return total / count

    @jax.jit
    def step(half, opt_state):
        value, grad = jax.value_and_grad(loss)(half)
        updates, opt_state = tx.update(
            grad, opt_state, half, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(half, updates), opt_state, value

    opt_state, values = tx.init(half), []
    for _ in range(steps):
        half, opt_state, value = step(half, opt_state)
        values.append(float(value))
    return half, values


OPTIMISERS = {
    "lbfgs": optax.lbfgs(),
    "lbfgs without a search": optax.lbfgs(0.1, linesearch=None),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)
    ),
    "polyak": optax.polyak_sgd(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_loss_is_theirs_to_evaluate(name):
    tx = OPTIMISERS[name]
    params, batch = problem()
    want, values = by_hand(tx, params, batch, 4)
    assert values[-1] < values[0]
    state = jt.TrainState.create(params, tx)
    step = jt.make_train_step(loss_fn, tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert step.cache_size() == 1
    np.testing.assert_allclose(losses, values, rtol=1e-4)
    assert_close(state.trainable, want, rtol=2e-3, atol=2e-4)


@pytest.mark.loose_promotion  # optax's own dtypes
@pytest.mark.parametrize("tx", [optax.contrib.momo(1.0), optax.contrib.momo_adam(0.1)])
def test_the_value_is_theirs(tx):
    params, batch = problem()
    state = jt.TrainState.create(params, tx)
    step = jt.make_train_step(loss_fn, tx)
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.loose_promotion  # optax's own dtypes
def test_sophia_differentiates_the_loss_twice():
    tx = optax.contrib.sophia(0.1, update_interval=1)
    params, batch = problem()
    state = jt.TrainState.create(params, tx)
    step = jt.make_train_step(loss_fn, tx)
    state, first = step(state, batch)
    hessian = state.opt_state[0].nu
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(hessian))
    for _ in range(4):
        state, metrics = step(state, batch)
    assert metrics["loss"] < first["loss"]


def test_a_search_over_microbatches_with_dropout_sees_one_function():
    params, batch = problem(dropout=0.3)
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    seen = {}

    def spy(grads, state, params, *, value, grad, value_fn, **_):
        again, slope = jax.value_and_grad(value_fn)(params)
        _, along = jax.jvp(value_fn, (params,), (grad,))
        seen.update(value=value, again=again, along=along)
        assert_same = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), grad, slope)
        far = jax.tree.reduce(jnp.maximum, assert_same)
        return grads, (value, again, far, along, optax.tree.norm(grad) ** 2)

    tx = optax.GradientTransformationExtraArgs(lambda p: (jnp.zeros(()),) * 5, spy)
    state = jt.TrainState.create(params, tx, jax.random.key(7))
    step = jt.make_train_step(loss_fn, tx, accumulate=4, clip_norm=1e-3)
    state, metrics = step(state, batch)
    value, again, far, along, square = state.opt_state
    np.testing.assert_allclose(value, metrics["loss"])
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert far < 1e-6
    np.testing.assert_allclose(along, square, rtol=1e-4)  # grad is not clipped
    np.testing.assert_allclose(np.sqrt(square), metrics["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["jit", "shard_map", "pmap"])
def test_a_search_over_devices(kind):
    search = optax.scale_by_backtracking_linesearch(10, store_grad=True)
    tx = optax.chain(optax.sgd(1.0), search)
    params, batch = problem()
    want, values = by_hand(tx, params, batch, 3)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    state = jt.TrainState.create(jax.device_put(params, NamedSharding(mesh, P())), tx)
    if kind == "jit":
        step = jt.make_train_step(loss_fn, tx)
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    elif kind == "pmap":
        step = jt.make_train_step(loss_fn, tx, parallel="pmap")
        state = jt.replicate(jt.TrainState.create(params, tx), jax.devices()[:2])
        batch = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    else:
        inner = jt.make_train_step(loss_fn, tx, axis_name="data")
        step = jax.jit(jax.shard_map(
            inner, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
        ))  # fmt: skip
    for _ in range(3):
        state, metrics = step(state, batch)
    if kind == "pmap":
        state, metrics = jt.unreplicate((state, metrics))
    np.testing.assert_allclose(metrics["loss"], values[-1], rtol=1e-4)
    assert_close(state.trainable, want, rtol=5e-3, atol=5e-4)


# -- norms -----------------------------------------------------------------------------


def test_norms_of_bfloat16_leaves_are_summed_in_float32():
    n = 4099
    params = {"w": jnp.zeros((n,), jnp.bfloat16), "q": jnp.ones((3, 2), jnp.bfloat16)}
    tree = jlora.lorafy(params, 2, {"q": jlora.Target(in_axes=(0,))}, train=["w"])
    loss = lambda p, b, k: (
        jnp.sum(p["w"].astype(jnp.float32))
        + 0 * jnp.sum(p["q"].T @ jnp.ones(3, jnp.bfloat16)).astype(jnp.float32)
    )
    state = jt.TrainState.create(tree, optax.sgd(1.0))
    step = jt.make_train_step(loss, optax.sgd(1.0), clip_norm=1.0)
    state, metrics = step(state, {})
    assert metrics["grad_norm"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(n), rtol=1e-6)
    got = state.trainable["w"].value
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), -1 / np.sqrt(n), rtol=5e-3)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(D, H)))
        tree = jlora.lorafy(
            {"w": jnp.ones((H,)), "q": kernel},
            2,
            {"q": jlora.Target(in_axes=(0,))},
            train=["w"],
        )
        x = np.random.default_rng(1).normal(size=(8, D))

        def loss(p, b, k):
            return jt.cross_entropy(b["x"] @ p["q"] + p["w"][None], b["y"])

        tx = optax.sgd(1.0)
        state = jt.TrainState.create(tree, tx)
        batch = {"x": x, "y": np.arange(8) % H}
        step = jt.make_train_step(loss, tx, donate=False, clip_norm=0.1, accumulate=2)
        new, metrics = step(state, batch)
        assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float64
        logits = x @ np.asarray(kernel) + 1
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), batch["y"]]
        np.testing.assert_allclose(metrics["loss"], nll.mean(), rtol=1e-13)
        assert new.trainable["w"].value.dtype == jnp.float64
