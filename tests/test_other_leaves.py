"""Leaves that are no arrays pass through everything that takes a tree."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import randomise

import jlora

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)


def linear(seed, n, m):
    rng = np.random.default_rng(seed)
    return {"kernel": jnp.asarray(rng.normal(size=(n, m)), jnp.float32)}


def dicts():
    """A tree with all kinds of leaves beside its kernels, and a function of it."""
    other = {
        "act": jnp.tanh, "ufunc": jnp.add, "name": "up", "none": None, "flag": True,
        "n": 3, "eps": 1e-5, "kind": jnp.float32, "np": np.float32(2), "key":
        jax.random.key(3), "sentinel": object(), "set": frozenset({1}),
    }  # fmt: skip
    params = {"mlp": {"up": linear(0, 5, 7), **other}, "down": linear(1, 7, 4)}

    def f(p, x):
        mlp = p["mlp"]
        assert mlp["flag"] is True
        assert mlp["name"] == "up"
        h = mlp["act"](x @ mlp["up"]["kernel"]) + mlp["eps"]
        return h @ p["down"]["kernel"]

    return f, params, ["up", "down"]


def equinox():
    """Equinox's own MLP: its activation is a leaf."""
    mlp = eqx.nn.MLP(5, 4, 7, 2, key=jax.random.key(0))
    assert any(x is mlp.activation or callable(x) for x in jax.tree.leaves(mlp))
    return lambda p, x: jax.vmap(p)(x), mlp, ["layers"]


class Gated(eqx.Module):
    """A module of others with functions, strings and numbers as leaves."""

    inner: eqx.nn.MLP
    gate: eqx.nn.Linear
    how: Any = jax.nn.sigmoid
    words: tuple = ("a", 2, None)

    def __call__(self, x):
        return self.inner(x) * self.how(self.gate(x))


def gated():
    keys = jax.random.split(jax.random.key(1))
    inner = eqx.nn.MLP(5, 4, 7, 1, activation=jax.nn.gelu, key=keys[0])
    model = Gated(inner, eqx.nn.Linear(5, 4, key=keys[1]))
    return lambda p, x: jax.vmap(p)(x), model, ["layers", "gate"]


MODELS = [dicts, equinox, gated]


def is_other(x):
    return not isinstance(x, jax.Array | np.ndarray)


def others(tree):
    return [x for x in jax.tree.leaves(tree) if is_other(x)]


@pytest.mark.parametrize("with_survey", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_they_pass_through_a_life_of_a_tree(make, with_survey):
    f, params, targets = make()
    survey = jlora.survey(f, params, X) if with_survey else None
    assert survey is None or not any("act" in path for path in survey.leaves)
    tree = jlora.lorafy(
        params, 2, "all-linear" if with_survey else targets, survey=survey, bias="none"
    )
    tree = randomise(tree, jax.random.key(1))
    kept = others(params)
    assert kept
    assert all(x is y for x, y in zip(others(tree), kept, strict=True))
    # Masks, labels and halves.
    mask = jlora.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    flags = zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True)
    assert not any(flag for x, flag in flags if is_other(x))
    assert set(jax.tree.leaves(jlora.labels(tree))) == {"a", "b", "frozen"}
    trainable, frozen = jlora.split(tree)
    assert not others(trainable)
    assert all(x is y for x, y in zip(others(frozen), kept, strict=True))
    back = jlora.combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    # The function, its gradient, and the merged tree.
    got = jlora.lora(f)(tree, X)
    merged, report, undo = jlora.merge(tree, report=True, undo=True)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(x is y for x, y in zip(others(merged), kept, strict=True))
    np.testing.assert_allclose(got, f(merged, X), rtol=2e-4, atol=2e-4)
    assert jlora.unmerge(merged, undo) is tree
    loss = lambda t: jnp.sum(jlora.lora(f)(jlora.combine(t, frozen), X) ** 2)
    grads = jax.jit(jax.grad(loss))(trainable)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))
    # The table counts arrays alone.
    summary = jlora.summary(tree)
    assert len(summary.rows) == len(report)
    sizes = [x.size for x in jax.tree.leaves(params) if not is_other(x)]
    assert summary.total - summary.trainable == sum(sizes)
    assert summary.trainable == sum(x.size for x in jax.tree.leaves(trainable))


def test_dropout_leaves_them_alone():
    f, params, targets = dicts()
    tree = randomise(jlora.lorafy(params, 2, targets, dropout=0.5), jax.random.key(1))
    wet = jlora.with_dropout(tree, jax.random.key(2))
    assert jnp.any(jlora.lora(f)(wet, X) != jlora.lora(f)(tree, X))


def test_abstract_trees_have_them_too():
    _, params, targets = dicts()
    shapes = jax.tree.map(
        lambda x: x if is_other(x) else jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    tree = jlora.lorafy(shapes, 2, targets)
    assert all(x is y for x, y in zip(others(params), _no_shapes(tree), strict=True))
    assert len(jlora.summary(tree).rows) == 2


def _no_shapes(tree):
    return [x for x in others(tree) if not isinstance(x, jax.ShapeDtypeStruct)]


def test_what_an_entry_sweeps_along_stays_as_it_is():
    _, params, _ = dicts()
    tree = jlora.lorafy(params, 2, ["down"], train=["mlp"], bias="none")
    assert isinstance(tree["mlp"]["up"]["kernel"], jlora.Full)
    assert all(x is y for x, y in zip(others(tree), others(params), strict=True))
    assert not jlora.is_node(tree["mlp"]["key"])
    merged = jlora.merge(tree)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    model = gated()[1]
    tree = jlora.lorafy(model, 2, ["gate"], train=["inner"], bias="lora_only")
    assert isinstance(tree.inner.layers[0].weight, jlora.Full)
    assert isinstance(tree.gate.bias, jlora.Full)
    assert tree.inner.activation is model.inner.activation


def test_they_are_no_targets():
    _, params, _ = dicts()
    with pytest.raises(jlora.TargetError, match="hits no kernel, only mlp/act a "):
        jlora.lorafy(params, 2, ["act"])
    with pytest.raises(jlora.DtypeError, match=r"'mlp/name' is a str and no array"):
        jlora.lorafy(params, 2, ["down"], train=["mlp/name"])
    with pytest.raises(jlora.DtypeError, match="is key<"):
        jlora.lorafy(params, 2, ["down"], train=["mlp/key"])
    integers = {**params, "table": jnp.ones((3, 4), jnp.int8)}
    with pytest.raises(jlora.DtypeError, match="is int8"):
        jlora.lorafy(integers, 2, ["down"], train=["table"])


def test_a_node_in_a_dataclass_of_the_users():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: Any
        act: Any

    params = Layer(jnp.ones((5, 4)), jnp.tanh)
    tree = randomise(jlora.lorafy(params, 2, ["kernel"]), jax.random.key(1))
    f = lambda p, x: p.act(x @ p.kernel)
    got = jlora.lora(f)(tree, X)
    np.testing.assert_allclose(got, f(jlora.merge(tree), X), rtol=2e-4, atol=2e-4)
