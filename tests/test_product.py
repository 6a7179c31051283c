"""The product with a factor: `dot_general` in all but the order of its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tools import assert_close, products

from jlora._kernel.product import factor_product

# Shapes and dimension numbers: contracted axes, batch axes.
CASES = {
    "x·A": ((2, 3, 5), (5, 7), ((2,), (0,)), ((), ())),
    "transposed factor": ((2, 3, 5), (7, 5), ((2,), (1,)), ((), ())),
    "inner axis first": ((5, 2, 3), (5, 7), ((0,), (0,)), ((), ())),
    "factor left": ((5, 7), (2, 3, 5), ((0,), (2,)), ((), ())),
    "two inner axes": ((2, 3, 5, 7), (7, 11, 5), ((2, 3), (2, 0)), ((), ())),
    "batch": ((3, 2, 5), (5, 3, 7), ((2,), (0,)), ((0,), (1,))),
}
BOTH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def operands(case):
    keys = jax.random.split(jax.random.key(5))
    return [jax.random.normal(k, s) for k, s in zip(keys, case[:2], strict=True)]


def pair(case):
    numbers = case[2:]
    return (
        lambda x, y: jnp.sin(factor_product(x, y, numbers)),
        lambda x, y: jnp.sin(lax.dot_general(x, y, numbers)),
    )


def derivatives(f):
    """Value, gradients, and forward over reverse mode, compiled as one."""
    loss = lambda x, y: jnp.sum(f(x, y) ** 2)
    grad = jax.grad(loss, argnums=(0, 1))
    return lambda x, y: (f(x, y), grad(x, y), jax.jvp(grad, (x, y), (y.sum() * x, y)))


@BOTH
def test_value_and_derivatives(case):
    args = operands(case)
    got, want = (jax.jit(derivatives(f))(*args) for f in pair(case))
    assert_close(got, want, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("axes", [(0, None), (None, -1), (-1, 1)], ids=str)
def test_vmap(case, axes):
    args = [
        x if axis is None else jnp.stack([x, 2 * x, -x], axis)
        for x, axis in zip(operands(case), axes, strict=True)
    ]
    got, want = (jax.jit(jax.vmap(derivatives(f), axes))(*args) for f in pair(case))
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_narrow_operand_comes_first():
    """XLA transposes a first operand that is contracted over its leading axes."""
    x, a, b = (jnp.ones(s) for s in ((2, 3, 11), (11, 2), (2, 13)))

    def f(a, b):
        low = factor_product(x, a, (((2,), (0,)), ((), ())))
        return jnp.sum(jnp.sin(factor_product(low, b, (((2,), (0,)), ((), ())))))

    jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(a, b)
    sizes = [tuple(v.aval.shape for v in e.invars) for e in products(jaxpr)]
    forward = [((2, 3, 11), (11, 2)), ((2, 3, 2), (2, 13))]
    assert sizes[:2] == forward
    assert sorted(sizes[2:]) == [
        ((2, 3, 2), (2, 3, 11)),  # dAᵀ = dlowᵀ·x
        ((2, 3, 2), (2, 3, 13)),  # dB = lowᵀ·dy
        ((2, 3, 13), (2, 13)),  # dlow: both as they lie
    ]


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_on_a_gpu_wide_operands_are_kept_from_other_products(platform):
    numbers = CASES["x·A"][2:]
    x, a, b = (jnp.ones(s) for s in ((2, 11, 5), (5, 3), (3, 13)))

    def text(f, *args):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    product = lambda x, y: factor_product(x, y, numbers)
    barrier = "optimization_barrier"
    # x·A reads the wide x alone; (x·A)·B has narrow operands.
    narrow, wide = text(product, x, a), text(product, jnp.ones((2, 11, 3)), b)
    assert narrow.count(barrier) == 1
    assert f"{barrier} %arg0" in narrow
    assert barrier not in wide
    backward = text(jax.grad(lambda y: product(jnp.ones((2, 11, 3)), y).sum()), b)
    assert barrier in backward
    assert barrier not in jax.jit(product).lower(x, a).as_text()


def test_precision_is_that_of_the_call():
    x = jnp.ones((2, 3))
    with jax.default_matmul_precision("float32"):
        jaxpr = jax.make_jaxpr(lambda x: factor_product(x, x, (((1,), (1,)), ((), ()))))
        (eqn,) = products(jaxpr(x))
    assert eqn.params["precision"] == "float32"


def test_dtypes():
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 5), jnp.bfloat16)
    f = lambda x, y: factor_product(
        x, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    out, back = jax.vjp(f, x, y)
    assert out.dtype == jnp.float32
    assert [g.dtype for g in back(out)] == [jnp.bfloat16] * 2


def test_in_shard_map_operands_may_vary_differently():
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    p = jax.sharding.PartitionSpec
    f = lambda x, y: factor_product(x, y, (((1,), (0,)), ((), ())))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(p("d"), p()), out_specs=p("d"))
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones((3, 5))
    np.testing.assert_allclose(jax.jit(mapped)(x, y), x @ y)


# Where the transposition of a small batched product waited behind a barrier, XLA:CPU
# could not write it, and the process died.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_gradients_of_small_batched_products_compile(dtype):
    sizes = [(2, 2, 2), (2, 3, 2), (2, 3, 5), (3, 2, 2), (128, 5, 3), (1, 7, 2)]

    def losses(operands):
        numbers = (((2,), (1,)), ((0,), (0,)))
        return sum(jnp.sum(factor_product(x, y, numbers) ** 2) for x, y in operands)

    def vmapped(operands):
        numbers = (((1,), (0,)), ((), ()))
        one = lambda x, y: jnp.sum(factor_product(x, y, numbers) ** 2)
        # Batched after the derivative is taken: what was no batch there is one here.
        return [jax.vmap(jax.grad(one, argnums=(0, 1)))(x, y) for x, y in operands]

    def plain(operands):
        return sum(jnp.sum((x @ y) ** 2) for x, y in operands)

    make = lambda n, *shape: jnp.sin(jnp.arange(n * np.prod(shape), dtype=dtype) + n)
    operands = [
        (make(4, n, i).reshape(4, n, i), make(4, i, o).reshape(4, i, o))
        for n, i, o in sizes
    ]
    want = jax.jit(jax.grad(plain))(operands)
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.1}
    assert_close(jax.jit(jax.grad(losses))(operands), want, **tol)
    assert_close(jax.jit(vmapped)(operands), want, **tol)
