"""What functions return under `lora`: nodes as they went in, and what is no array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools import assert_close, randomise

import jlora


def all_kinds(dora=True):
    """A tree with every kind of node and of trainable leaf; no B is zero."""
    params = {
        "q": {"kernel": jnp.eye(5, 7) + 0.1, "bias": jnp.ones(7)},
        "norm": {"scale": jnp.ones(5)},
        "embed": {"embedding": jnp.arange(55.0).reshape(11, 5) / 55},
        "plain": jnp.arange(5.0),
    }
    tree = jlora.lorafy(
        params, 2, ["q"], train=["norm"], trainable_tokens={"embed": [1, 3]},
        dora=dora, lora_bias=not dora,
    )  # fmt: skip
    return randomise(tree, jax.random.key(1))


def with_loop(p):
    return lax.scan(lambda p, _: (p, None), p, None, length=3)[0]


def with_while(p):
    body = lambda c: (c[0] + 1, c[1])
    return lax.while_loop(lambda c: c[0] < 3, body, (0, p))[1]


WAYS = {
    "as it is": lambda p: p,
    "jit": jax.jit(lambda p: p),
    "nested jit": jax.jit(lambda p: jax.jit(lambda p: p)(p)),
    "checkpoint": jax.checkpoint(lambda p: p),
    "cond": lambda p: lax.cond(p["plain"][0] > 0, lambda: p, lambda: p),
    "scan": with_loop,
    "while": with_while,
    "barrier": lax.optimization_barrier,
}


@pytest.mark.parametrize("under_jit", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_nodes_come_back_as_they_went_in(way, dora, under_jit):
    tree = all_kinds(dora)
    f = jlora.lora(lambda p, x: (WAYS[way](p), x @ p["q"]["kernel"]))
    got, y = (jax.jit(f) if under_jit else f)(tree, jnp.ones((2, 5)))
    assert_close(got, tree, rtol=0, atol=0)
    assert jlora.summary(got).trainable == jlora.summary(tree).trainable
    want = jnp.ones((2, 5)) @ jlora.merge(tree)["q"]["kernel"]
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_parts_of_a_tree_come_back_too():
    tree = all_kinds()
    q, scale = jlora.lora(lambda p: (p["q"], p["norm"]["scale"]))(tree)
    assert_close((q, scale), (tree["q"], tree["norm"]["scale"]), rtol=0, atol=0)


def test_a_changed_dora_kernel_comes_back_with_a_magnitude():
    tree = all_kinds()
    half = lambda p: {"kernel": 0.5 * p["q"]["kernel"].T}
    got = jax.jit(jlora.lora(half))(tree)
    assert "magnitude" in jax.tree.leaves(jlora.labels(got))
    want = half(jlora.merge(tree))
    assert_close(jlora.merge(got), want, rtol=1e-5, atol=1e-5)


def test_a_changed_table_with_trained_rows_is_refused():
    double = jlora.lora(lambda p: 2 * p["embed"]["embedding"])
    with pytest.raises(jlora.UnsupportedOpError, match="embed/embedding"):
        double(all_kinds())


def test_what_is_no_array_passes_through():
    tree, x = all_kinds(), jnp.ones((2, 5))

    def f(p, x):
        y = x @ p["q"]["kernel"]
        rest = {"name": "foo", "n": 3, "none": None, "flag": True, "f": jnp.sin}
        return {"y": y, "host": np.arange(3), **rest}

    got, want = jlora.lora(f)(tree, x), f(jlora.merge(tree), x)
    np.testing.assert_allclose(got.pop("y"), want.pop("y"), rtol=1e-5)
    np.testing.assert_array_equal(got.pop("host"), want.pop("host"))
    assert got == want
    assert type(got["n"]) is int
    assert jlora.lora(lambda p: None)(tree) is None
    assert jlora.lora(lambda p: "text")(tree) == "text"
    assert jlora.lora(lambda p: 3)(tree) == 3
