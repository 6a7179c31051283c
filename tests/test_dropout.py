"""Dropout of adapters' inputs: no two uses share a mask, and history has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from tools import randomise

import jlora

X = jnp.ones((3, 8))


@pytest.fixture(autouse=True)
def no_leaks():
    """No tracer of a replay outlives it."""
    with jax.checking_leaks():
        yield


def dropped(params, key=7, targets="kernel", **options):
    """Adapted kernels that drop half of their inputs; no B is zero."""
    tree = jlora.lorafy(params, 4, targets, dropout=0.5, **options)
    tree = randomise(tree, jax.random.key(1))
    return jlora.with_dropout(tree, jax.random.key(key))


def one():
    return dropped({"kernel": jnp.eye(8)})


@jax.jit
def block(w, x):
    return x @ w


def distinct(ys):
    """Whether no two of the results are equal."""
    seen = {np.asarray(y).tobytes() for y in ys}
    return len(seen) == len(list(ys))


def step(c, w):
    return c, X @ w


USES = {
    "plain": lambda w: [X @ w, X @ w],
    "transposed": lambda w: [X @ w, (w.T @ X.T).T],
    "stopped": lambda w: [X @ w, X @ lax.stop_gradient(w)],
    "block": lambda w: [block(w, X), block(w, X), X @ w],
    "einsum": lambda w: [jnp.einsum("bi,io->bo", X, w), jnp.einsum("bi,io->bo", X, w)],
    "nested": lambda w: [jax.jit(lambda w: block(w, X) + block(w, X))(w),
                         2 * block(w, X)],
    "checkpoint": lambda w: [jax.checkpoint(block)(w, X), jax.checkpoint(block)(w, X)],
    "cond": lambda w: [lax.cond(X[0, 0] > 0, lambda w: X @ w, lambda w: X @ w, w), X @ w],
    "scan": lambda w: [*lax.scan(lambda c, _: (c, X @ w), 0, None, length=3)[1], X @ w],
    "scan in a block": lambda w: [
        *lax.scan(lambda c, _: (c, block(w, X)), 0, None, length=2)[1], block(w, X)],
    "scan's carry": lambda w: list(
        lax.scan(lambda w, _: (w, X @ w), w, None, length=3)[1]),
    "two scans": lambda w: [
        *lax.scan(lambda c, _: (c, X @ w), 0, None, length=2)[1],
        *lax.scan(lambda c, _: (c, X @ w), 0, None, length=2)[1]],
    "map": lambda w: list(lax.map(lambda x: x @ w, jnp.stack([X, X]))),
    "vmap": lambda w: list(jax.vmap(lambda x: x @ w)(jnp.stack([X, X]))),
    "fori_loop": lambda w: list(lax.fori_loop(
        0, 3, lambda i, y: y.at[i].set(X @ w), jnp.zeros((3, 3, 8)))),
    "while": lambda w: list(lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].at[c[0]].set(X @ w)),
        (0, jnp.zeros((3, 3, 8))))[1]),
    "while's carry": lambda w: list(lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].at[c[0]].set(X @ c[2]), c[2]),
        (0, jnp.zeros((3, 3, 8)), w))[1]),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_every_use_draws_a_mask_of_its_own(use):
    f = lambda p: USES[use](p["kernel"])
    ys = jax.jit(jlora.lora(f))(one())
    assert distinct(ys)
    again = jax.jit(jlora.lora(f))(one())
    assert [np.asarray(y).tobytes() for y in ys] == [
        np.asarray(y).tobytes() for y in again
    ]


def test_steps_of_a_scanned_stack_differ_and_so_do_later_uses():
    tree = dropped(
        {"kernel": jnp.stack([jnp.eye(8)] * 3)},
        targets={"kernel": jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))},
    )
    # All layers alike but for their masks.
    tree["kernel"] = jax.tree.map(
        lambda x: (
            x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.at[:].set(x[0])
        ),
        tree["kernel"],
    )

    def f(p):
        w = p["kernel"]
        scanned = [lax.scan(step, 0, w)[1] for _ in range(2)]
        return [*scanned[0], *scanned[1], X @ w[0], X @ w[1]]

    assert distinct(jax.jit(jlora.lora(f))(tree))


def test_masks_of_stacked_layers_are_those_of_numbered_ones():
    params = {"layers": {str(i): {"kernel": jnp.eye(8) * (1 + i)} for i in range(3)}}
    off = randomise(jlora.lorafy(params, 4, ["kernel"], dropout=0.5), jax.random.key(1))
    key = jax.random.key(5)

    def numbered(p, x):
        for layer in p["layers"].values():
            x = jnp.tanh(x @ layer["kernel"])
        return x

    def stacked(p, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)
        return lax.scan(body, x, p["layers"]["kernel"])[0]

    want = jlora.lora(numbered)(jlora.with_dropout(off, key), X)
    got = jlora.lora(stacked)(jlora.with_dropout(jlora.stack_layers(off), key), X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(want, jlora.lora(numbered)(off, X))


@pytest.mark.parametrize("order", [(2, 4), (4, 2)])
def test_a_mask_does_not_depend_on_what_was_traced_before(order):
    w = one()
    inner = jax.jit(lambda w, x: x @ w)
    f = jlora.lora(lambda p, x: inner(p["kernel"], x))
    got = {n: f(w, jnp.ones((n, 8))) for n in order}
    fresh = jax.jit(lambda w, x: x @ w)
    g = jlora.lora(lambda p, x: fresh(p["kernel"], x))
    for n in order[::-1]:
        np.testing.assert_array_equal(got[n], g(w, jnp.ones((n, 8))))


def test_keys_come_from_where_the_adapter_stands_in_the_tree():
    tree = jlora.lorafy({"kernel": jnp.eye(8)}, 4, ["kernel"], dropout=0.5)
    tree = randomise(tree, jax.random.key(1))
    on = jlora.with_dropout({"a": tree, "b": tree}, jax.random.key(2))
    shared = jax.jit(lambda p: X @ p["kernel"])
    ys = jlora.lora(lambda p: [shared(p["a"]), shared(p["b"])])(on)
    assert distinct(ys)


def test_shards_draw_masks_of_their_own():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    f = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    y = jax.jit(jlora.lora(lambda p, x: f(p["kernel"], x)))(one(), jnp.ones((6, 8)))
    assert distinct([y[:3], y[3:]])


def test_the_gradient_is_that_of_the_masked_forward_pass():
    """Reverse mode through loops and recomputation sees the forward pass's masks."""
    half, frozen = jlora.split(one())

    def f(p, x):
        w = p["kernel"]
        body = jax.checkpoint(lambda x, _: (jnp.tanh(block(w, x)), None))
        return jnp.sum(lax.scan(body, x, None, length=3)[0] ** 2)

    loss = lambda t: jlora.lora(f)(jlora.combine(t, frozen), X)
    grad = jax.jit(jax.grad(loss))(half)
    direction = jax.tree.map(jnp.ones_like, half)
    step = lambda eps: jax.jit(loss)(jax.tree.map(lambda x: x + eps, half))
    slope = (step(1e-3) - step(-1e-3)) / 2e-3
    dots = jax.tree.map(lambda g, d: jnp.vdot(g, d), grad, direction)
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(sum(jax.tree.leaves(dots)), slope, rtol=2e-2)


def test_raw_keys_are_keys():
    tree = jlora.lorafy({"kernel": jnp.eye(8)}, 4, ["kernel"], dropout=0.5)
    raw = jlora.with_dropout(tree, jax.random.PRNGKey(3))
    typed = jlora.with_dropout(tree, jax.random.key(3))
    assert jax.tree.structure(raw) == jax.tree.structure(typed)
    for x, y in zip(jax.tree.leaves(raw), jax.tree.leaves(typed), strict=True):
        assert x.dtype == y.dtype
        assert bool(jnp.all(x == y))
