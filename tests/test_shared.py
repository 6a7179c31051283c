"""Adapters whose kernels share an input share one pass over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import assert_close, products, randomise

import jlora

KEY = jax.random.key(7)
SHAPES = {"query": (5, 7), "key": (5, 2, 3), "value": (5, 7), "out": (7, 5)}
RANKS = {"query": 1, "key": 3, "value": 2, "out": 2}


def tree(dtype=jnp.float32, **settings):
    keys = jax.random.split(KEY, len(SHAPES))
    params = {
        name: {"kernel": jax.random.normal(k, SHAPES[name], dtype)}
        for k, name in zip(keys, SHAPES, strict=True)
    }
    targets = {
        name: jlora.Target(rank=rank, alpha=rank + 1.0, in_axes=(0,))
        for name, rank in RANKS.items()
    }
    return randomise(jlora.lorafy(params, targets=targets, **settings), KEY)


def layer(p, x):
    q, v = x @ p["query"]["kernel"], jnp.tanh(x @ p["value"]["kernel"])
    k = jnp.einsum("td,dhk->thk", x, p["key"]["kernel"])
    return (q * v) @ p["out"]["kernel"] + jnp.sum(k)


X = jax.random.normal(jax.random.key(1), (11, 5))


def formed(f, *args):
    """The shapes of all products of a program."""
    jaxpr = jax.make_jaxpr(f)(*args)
    return [tuple(e.outvars[0].aval.shape) for e in products(jaxpr)]


def test_one_down_projection_for_three_kernels():
    shapes = formed(jlora.lora(layer), tree(), X)
    assert (11, 6) in shapes  # ranks 1, 3 and 2, side by side
    assert shapes.count((11, 2)) == 1  # the output's, whose input is its own
    assert len(shapes) == 4 + 1 + 1 + 4  # kernels, shared A, out's A, each B


@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=str)
def test_value_and_gradients(settings):
    params = tree(**settings)
    half, frozen = jlora.split(params)
    low = lambda h, x: jnp.sum(jnp.sin(jlora.lora(layer)(jlora.combine(h, frozen), x)))
    dense = lambda h, x: jnp.sum(
        jnp.sin(layer(jlora.merge(jlora.combine(h, frozen)), x))
    )
    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(half, X) for f in (low, dense)
    )
    assert_close(got, want, rtol=2e-4, atol=2e-4)


def test_in_scans_remat_and_branches():
    params = tree()

    def f(p, x):
        body = jax.checkpoint(lambda x: jnp.tanh(layer(p, x)))
        x, _ = jax.lax.scan(lambda x, _: (body(x), None), x, None, length=2)
        return jax.lax.cond(x[0, 0] > 9, lambda x: x, lambda x: layer(p, x), x)

    got = jax.jit(jlora.lora(f))(params, X)
    np.testing.assert_allclose(got, f(jlora.merge(params), X), rtol=1e-4, atol=1e-4)


def test_slices_of_one_fused_kernel():
    params = {"c_attn": {"kernel": jax.random.normal(KEY, (5, 9))}}
    params = randomise(jlora.lorafy(params, 2, ["query", "value"]), KEY)
    f = lambda p, x: x @ p["c_attn"]["kernel"]
    assert formed(jlora.lora(f), params, X).count((11, 4)) == 1
    got = jlora.lora(f)(params, X)
    np.testing.assert_allclose(got, f(jlora.merge(params), X), rtol=1e-5, atol=1e-5)


def test_stacks_that_are_summed_over():
    """Both factors need the stack's index, so no product with A alone is whole."""
    keys = jax.random.split(KEY, 3)
    params = {
        n: jax.random.normal(k, (3, 7, 11)) for n, k in zip("ab", keys[:2], strict=True)
    }
    target = jlora.Target(rank=2, in_axes=(1,), batch_axes=(0,))
    params = randomise(jlora.lorafy(params, targets={"a": target, "b": target}), KEY)
    x = jax.random.normal(keys[2], (5, 3, 7))
    f = lambda p, x: jnp.tensordot(x, p["a"], 2) + jnp.tensordot(x, p["b"], 2)
    got = jlora.lora(f)(params, x)
    np.testing.assert_allclose(got, f(jlora.merge(params), x), rtol=1e-4, atol=1e-4)


def test_dropout_keeps_masks_apart():
    params = jlora.with_dropout(tree(dropout=0.5), jax.random.key(3))
    assert (11, 6) not in formed(jlora.lora(layer), params, X)


def test_another_precision_stands_alone():
    def f(p, x):
        high = jnp.dot(x, p["query"]["kernel"], precision="highest")
        return high + x @ p["value"]["kernel"]

    assert formed(jlora.lora(f), tree(), X).count((11, 3)) == 0


def test_bfloat16():
    params = tree(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    got = jlora.lora(layer)(params, x)
    assert got.dtype == jnp.bfloat16
    want = layer(jlora.merge(params), x)
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.03 * np.abs(want).max())


def test_slices_of_one_kernel_take_its_a_once():
    params = randomise(
        jlora.lorafy({"w": jax.random.normal(KEY, (5, 9))}, 2, ["w"]), KEY
    )

    def f(p, x):
        return sum(jnp.sin(x @ part) for part in jnp.split(p["w"], 3, axis=1))

    assert formed(jlora.lora(f), params, X).count((11, 2)) == 1
    got = jlora.lora(f)(params, X)
    np.testing.assert_allclose(got, f(jlora.merge(params), X), rtol=1e-5, atol=1e-5)
