"""Training trees of other libraries: leaves that are no arrays, and other containers."""

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tools import assert_close, randomise

import jlora
import jlora.train as jt

D, H = 5, 3


def batch():
    keys = jax.random.split(jax.random.key(1))
    return {"x": jax.random.normal(keys[0], (4, D)), "y": jnp.ones((4, H))}


def squared(out, batch):
    return jnp.mean((out - batch["y"]) ** 2)


class Net(eqx.Module):
    """A layer with leaves of every kind, as Equinox's users write them."""

    weight: jax.Array
    activation: object
    scale: float
    name: str
    flag: bool

    def __call__(self, x):
        assert self.flag is True
        return self.activation(x @ self.weight) * self.scale


def net(activation=jnp.tanh, **more):
    kernel = jax.random.normal(jax.random.key(0), (D, H))
    tree = Net(
        kernel, activation, **{"scale": 2.0, "name": "net", "flag": True, **more}
    )
    target = {"weight": jlora.Target(rank=2, in_axes=(0,))}
    return randomise(jlora.lorafy(tree, targets=target), jax.random.key(2))


def loss_fn(params, batch, key):
    return squared(params(batch["x"]), batch)


def gradient_step(tree, loss, batch, rate=0.1):
    half, frozen = jlora.split(tree)
    f = lambda h: loss(jlora.merge(jlora.combine(h, frozen)), batch, None)
    value, grads = jax.value_and_grad(f)(half)
    return value, jax.tree.map(lambda p, g: p - rate * g, half, grads)


def test_leaves_that_are_no_arrays_are_part_of_the_program():
    tree, data = net(), batch()
    value, want = gradient_step(tree, loss_fn, data)
    tx = optax.sgd(0.1)
    state = jt.TrainState.create(tree, tx)
    assert jt.check_gradients(loss_fn, state, data) == ()
    step = jt.make_train_step(loss_fn, tx, accumulate=2)
    new, metrics = step(state, data)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_close(
        jax.tree.leaves(new.trainable), jax.tree.leaves(want), rtol=1e-5, atol=1e-6
    )
    params = new.params
    assert params.activation is jnp.tanh
    assert (params.name, params.scale, params.flag) == ("net", 2.0, True)
    new, _ = step(new, data)
    assert step.cache_size() == 1
    other = jt.TrainState.create(net(scale=3.0), tx)
    assert step(other, data)[1]["loss"] != metrics["loss"]
    assert step.cache_size() == 2


def test_one_and_true_are_two_programs():
    tx = optax.sgd(0.1)
    step = jt.make_train_step(loss_fn, tx)
    step(jt.TrainState.create(net(), tx), batch())
    with pytest.raises(AssertionError):
        step(jt.TrainState.create(net(flag=1), tx), batch())


def test_evaluation_and_pmap_and_shapes_of_such_trees():
    tree, data = net(), batch()
    tx = optax.sgd(0.1)
    want = loss_fn(jlora.merge(tree), data, None)
    metric = lambda p, b: {"loss": loss_fn(p, b, None)}
    evaluation = jt.make_eval_step(metric)
    np.testing.assert_allclose(evaluation(tree, data)["loss"], want, rtol=1e-5)
    state = jt.TrainState.create(tree, tx)
    got = jt.evaluate(evaluation, state, [data, data])
    np.testing.assert_allclose(got["loss"], want, rtol=1e-5)
    several = jt.replicate(state, jax.devices()[:2])
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), data)
    mapped = jt.make_eval_step(metric, parallel="pmap")
    np.testing.assert_allclose(mapped(several, halves)["loss"], want, rtol=1e-5)
    step = jt.make_train_step(loss_fn, tx, parallel="pmap")
    several, metrics = step(several, halves)
    np.testing.assert_allclose(jt.unreplicate(metrics)["loss"], want, rtol=1e-5)
    assert jt.unreplicate(several).params.activation is jnp.tanh
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, tree
    )
    abstract = jt.TrainState.create(shapes, tx)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert abstract.params.name == "net"
    assert abstract.params.weight.shape == (D, H)


def test_equinox_own_mlp_trains():
    mlp = eqx.nn.MLP(D, H, 7, 2, key=jax.random.key(0))
    loss = lambda p, b, k: squared(jax.vmap(p)(b["x"]), b)
    targets = {"weight": jlora.Target(rank=2, in_axes=(1,))}
    targets = {r"layers/\d/weight": targets["weight"]}
    tree = randomise(jlora.lorafy(mlp, targets=targets), jax.random.key(2))
    value, want = gradient_step(tree, loss, batch())
    tx = optax.sgd(0.1)
    state, metrics = jt.make_train_step(loss, tx)(
        jt.TrainState.create(tree, tx), batch()
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_close(
        jax.tree.leaves(state.trainable), jax.tree.leaves(want), rtol=1e-5, atol=1e-6
    )


def test_a_leaf_without_a_hash_is_named():
    class Odd:
        __hash__ = None

    tree = net(name=Odd())
    tx = optax.sgd(0.1)
    state = jt.TrainState.create(tree, tx)
    with pytest.raises(jlora.StructureError, match="'name' is a Odd"):
        jt.make_train_step(loss_fn, tx)(state, batch())


def test_nnx_state_with_dropout_and_statistics_trains():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(D, 7, rngs=rngs)
            self.norm = nnx.BatchNorm(7, rngs=rngs)
            self.drop = nnx.Dropout(0.0, rngs=rngs)
            self.value = nnx.Linear(7, H, rngs=rngs)

        def __call__(self, x):
            return self.value(self.drop(self.norm(self.query(x))))

    graph, state, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    tree = randomise(jlora.lorafy(state, 2, ["query", "value"]), jax.random.key(2))

    def loss(params, batch, key):
        model = nnx.merge(graph, params, batch["rest"])
        out = squared(model(batch["x"]), batch)
        return out, {"mean": jnp.mean(model.norm.mean[...])}

    tx = optax.sgd(0.1)
    data = {**batch(), "rest": rest}
    half, frozen = jlora.split(tree)

    def f(h):
        own = jax.tree.map(jnp.asarray, data)  # NNX mutates what this trace made
        return loss(jlora.merge(jlora.combine(h, frozen)), own, None)[0]

    value, grads = jax.value_and_grad(f)(half)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, half, grads)
    new, metrics = jt.make_train_step(loss, tx)(jt.TrainState.create(tree, tx), data)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert metrics["mean"] != 0
    assert_close(new.trainable, want, rtol=1e-4, atol=1e-6)


def test_frozen_dicts_train():
    params = flax.core.freeze({"query": {"kernel": jnp.ones((D, H))}})
    tree = randomise(jlora.lorafy(params, 2, ["query"]), jax.random.key(2))
    loss = lambda p, b, k: squared(b["x"] @ p["query"]["kernel"], b)
    tx = optax.sgd(0.1)
    value, want = gradient_step(tree, loss, batch())
    state, metrics = jt.make_train_step(loss, tx)(
        jt.TrainState.create(tree, tx), batch()
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert isinstance(state.params, flax.core.FrozenDict)
    assert_close(state.trainable, want, rtol=1e-5, atol=1e-6)
