"""The model without its adapters, inside of the transformed function and outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import adapter_of

import jlora
from jlora import without_adapters

PARAMS = {
    "one": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)))},
    "two": {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(7, 3)))},
}
X = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5)))


def net(params, x):
    return jnp.sin(x @ params["one"]["kernel"]) @ params["two"]["kernel"]


def both(params, x):
    return net(params, x), net(without_adapters(params), x)


FORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": lambda f: (
        lambda p, x: jax.tree.map(
            lambda y: y[0],
            jax.lax.scan(lambda c, x: (c, f(p, x)), 0, x[None])[1],
        )
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [{}, {"dora": True}])
def test_the_base_inside_of_the_function(form, kind):
    tree = adapter_of(PARAMS, 3, 2, ["one", "two"], **kind)
    new, old = jax.jit(jlora.lora(FORMS[form](both)))(tree, X)
    np.testing.assert_allclose(old, net(PARAMS, X), rtol=1e-5)
    np.testing.assert_allclose(new, net(jlora.merge(tree), X), rtol=1e-4)
    assert np.abs(new - old).max() > 0.1


def test_a_quantised_base_stays_quantised():
    tree = jlora.quantize(adapter_of(PARAMS, 3, 2, ["one"]), "int8")
    want = net(jlora.dequantize(without_adapters(tree)), X)
    _, old = jax.jit(jlora.lora(both))(tree, X)
    np.testing.assert_allclose(old, want, rtol=1e-5)
    assert isinstance(without_adapters(tree)["one"]["kernel"], jlora.Quantized)


def test_outside_it_is_the_base_itself():
    tree = adapter_of(PARAMS, 3, 2, ["one"])
    assert without_adapters(tree)["one"]["kernel"] is PARAMS["one"]["kernel"]


def test_gradients_do_not_pass_through_what_is_frozen():
    tree = adapter_of(PARAMS, 3, 2, ["one"])
    trainable, frozen = jlora.split(tree)

    def loss(f):
        run = jlora.lora(f)
        return jax.grad(lambda t: run(jlora.combine(t, frozen), X))(trainable)

    old = jnp.asarray(net(PARAMS, X))
    got = loss(lambda p, x: jnp.sum((net(p, x) - net(without_adapters(p), x)) ** 2))
    want = loss(lambda p, x: jnp.sum((net(p, x) - old) ** 2))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_what_has_no_base_is_refused():
    tree = adapter_of(PARAMS, 3, 2, ["one"], train=["two"])
    with pytest.raises(
        jlora.StructureError, match="'two/kernel' is trained as a whole"
    ):
        jlora.lora(jax.jit(both))(tree, X)
    with pytest.raises(
        jlora.StructureError, match="'two/kernel' is trained as a whole"
    ):
        without_adapters(tree)
    assert jlora.lora(net)(tree, X).shape == (2, 3)  # nobody asked
    layer = {"kernel": PARAMS["one"]["kernel"], "bias": jnp.ones(7)}
    biased = jlora.lorafy(layer, 2, ["kernel"], lora_bias=True)
    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    with pytest.raises(jlora.StructureError, match="has a bias"):
        jlora.lora(lambda p, x: dense(without_adapters(p), x))(biased, X)
