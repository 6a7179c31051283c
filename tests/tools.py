"""What several tests need: random low-rank trees, and what a program forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

import jlora

TOL = {
    jnp.float32: {"rtol": 2e-5, "atol": 2e-5},
    jnp.bfloat16: {"rtol": 4e-2, "atol": 8e-2},
}


def randomise(tree, key):
    """Give every trainable leaf random values, so that no B is zero."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    mask = jlora.trainable_mask(tree)

    def one(x, flag):
        return jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype) if flag else x

    return jax.tree.map(one, tree, mask)


def adapter_of(params, seed, rank, targets, **how):
    """A random adapter, for which nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    half, frozen = jlora.split(jlora.lorafy(shapes, rank, targets, **how))

    def drawn(x):
        return jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)

    def scaled(path, x):
        is_scale = path[-1] == jax.tree_util.GetAttrKey("scale")
        return abs(drawn(x)) + 0.3 if is_scale else x

    def put_on(x, base):
        if isinstance(x, jlora.Full):
            return x
        return dataclasses.replace(x, base=base) if jlora.is_node(x) else base

    frozen = jax.tree_util.tree_map_with_path(scaled, frozen)
    tree = jlora.combine(jax.tree.map(drawn, half), frozen)
    return jax.tree.map(put_on, tree, params, is_leaf=jlora.is_node)


def lowrank(key, shape, rank=2, dtype=jnp.float32, alpha=3.0, dora=False, **target):
    """One random adapted kernel of that shape, B not zero; nothing is compiled for it."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    target.setdefault("in_axes", (0,))
    spec = {"w": jlora.Target(rank=rank, alpha=alpha, **target)}
    shapes = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    abstract = jlora.lorafy(shapes, targets=spec, dora=dora)["w"]
    drawn = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)

    def one(t):
        scale = jnp.full(t.scale.shape, alpha / t.rank, t.scale.dtype)
        return dataclasses.replace(jax.tree.map(drawn, t), scale=scale)

    return abstract.map(jnp.asarray(rng.normal(0, 1, shape), dtype), one)


def assert_close(got, want, **tol):
    """Equal structure, shapes and dtypes, values within the tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        x, y = (np.asarray(v, np.float64) for v in (x, y))
        np.testing.assert_allclose(x, y, **tol)


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    bare = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in bare.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def products(jaxpr):
    """The equations that multiply matrices: JAX's own, and those with a factor."""
    names = ("dot_general", "factor_product")
    return [e for e in equations(jaxpr) if e.primitive.name in names]


def result_shapes(f, *args, skip=("stop_gradient",)):
    """The shapes of all arrays that f's program forms, inner programs included."""
    jaxpr = jax.make_jaxpr(f)(*args)
    return [
        tuple(v.aval.shape)
        for eqn in equations(jaxpr)
        if eqn.primitive.name not in skip
        for v in eqn.outvars
        if hasattr(v.aval, "shape")
    ]


def check(f, w, *args, dtype=jnp.float32, grad=True, structure=True):
    """A rule's four checks: value and dtype, structure, gradient; under jit.

    The reference is the same function of the merged kernel; its gradient with respect
    to the factors goes through the merge.
    """
    low = jlora.lora(f, stop_frozen=False)
    half, frozen = jlora.split(w)

    def dense(w, *args):
        return f(w.merged(), *args)

    def loss(g):
        return lambda t, *args: scalar(g(jlora.combine(t, frozen), *args))

    @jax.jit
    def all_at_once(half, *args):
        w = jlora.combine(half, frozen)
        values = low(w, *args), dense(w, *args)
        if not grad:
            return values, None
        return values, [jax.grad(loss(g))(half, *args) for g in (low, dense)]

    (got, want), grads = all_at_once(half, *args)
    tol = TOL[dtype]
    assert_close(got, want, **tol)
    if grad:
        size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads[1]))
        assert size > 0, "a test of nothing"
        assert_close(*grads, rtol=20 * tol["rtol"], atol=5 * tol["atol"] * (1 + size))
    if structure:
        formed = result_shapes(low, w, *args)
        if grad:
            formed += result_shapes(jax.grad(loss(low)), half, *args)
        assert w.shape not in formed, "an array of the kernel's shape is formed"


def scalar(out):
    """A scalar that depends on every float of the output, and not linearly."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves)


def compilations(f, *calls):
    """How often XLA compiles in the calls of `f`, each with a tuple of arguments."""
    count = 0

    def listen(name, *_, **__):
        nonlocal count
        count += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for args in calls:
            jax.block_until_ready(f(*args))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count
