"""What programs do to whole kernels: scales, sums, products, choices, parts, penalties.

Each function is compared with itself on the merged kernel: value, dtype, gradients of
the factors, forward mode, and the number of kernel-sized arrays, of which there must be
no more than the function forms of the plain kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from tools import TOL, assert_close, equations, lowrank, result_shapes, scalar

import jlora
from jlora._transform.replay import Replay


def kernels(dtype=jnp.float32, dora=False, rank=2):
    """Two kernels [11, 7], the second with another rank."""
    keys = jax.random.split(jax.random.key(3))
    return {
        "w": lowrank(keys[0], (11, 7), dtype=dtype, dora=dora, rank=rank),
        "v": lowrank(keys[1], (11, 7), dtype=dtype, rank=1),
    }


def agree(f, tree, *args, dtype=jnp.float32, structure=True, tol=1):
    """Values, gradients, forward mode and structure of f with adapted kernels."""
    half, frozen = jlora.split(tree)
    low = jlora.lora(f)

    def loss(g, half, args):
        return scalar(g(jlora.combine(half, frozen), *args))

    def dense(tree, *args):
        return f(jlora.merge(tree), *args)

    @jax.jit
    def everything(half, *args):
        tangents = jax.tree.map(lambda x: jnp.cos(x), half)
        values, slopes, grads = [], [], []
        for g in (low, dense):
            values.append(g(jlora.combine(half, frozen), *args))
            pull = lambda half, g=g: loss(g, half, args)
            grads.append(jax.grad(pull)(half))
            slopes.append(jax.jvp(pull, (half,), (tangents,))[1])
        return values, grads, slopes

    (got, want), grads, slopes = everything(half, *args)
    close = {k: tol * v for k, v in TOL[dtype].items()}
    assert_close(got, want, **close)
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads[1]))
    assert size > 0, "a test of nothing"
    assert_close(*grads, rtol=20 * close["rtol"], atol=5 * close["atol"] * (1 + size))
    assert_close(*slopes, rtol=50 * close["rtol"], atol=50 * close["atol"] * (1 + size))
    if structure:
        is_node = lambda x: isinstance(x, jlora.LowRank)
        bases = jax.tree.map(lambda w: w.base, tree, is_leaf=is_node)
        limit = large(f, bases, *args)
        assert large(low, tree, *args) <= limit
        assert large(jax.grad(lambda half: loss(low, half, args)), half) <= limit


def large(f, *args):
    """How many arrays as large as a kernel [11, 7] a program forms."""
    return sum(np.prod(shape) >= 77 for shape in result_shapes(f, *args))


X = jnp.cos(jnp.arange(22.0)).reshape(2, 11)
IN, OUT = jnp.linspace(0.5, 2, 11), jnp.linspace(-1, 1, 7) + 0.01
IDS = jnp.array([0, 3, 10])

ONE = {
    "negative": lambda p, x: x @ -p["w"],
    "per output": lambda p, x: x @ (p["w"] * OUT),
    "per output, the other way round": lambda p, x: x @ (OUT * p["w"]),
    "per input": lambda p, x: x @ (p["w"] * IN[:, None]),
    "divided per output": lambda p, x: x @ (p["w"] / OUT),
    "divided per input": lambda p, x: x @ (p["w"] / IN[:, None]),
    "a scale of one entry": lambda p, x: x @ (p["w"] * OUT[:1] / IN[None, :1]),
    "a scale that is spread out": lambda p, x: x @ (jnp.broadcast_to(OUT, (11, 7)) * p["w"]),
    "both sides, one after the other": lambda p, x: x @ (p["w"] * OUT * IN[:, None]),
    "tied, scaled": lambda p, x: (x @ (p["w"] * OUT)) @ (p["w"] * OUT).T,
    "plus an array": lambda p, x: x @ (p["w"] + jnp.ones((11, 7))),
    "plus a number": lambda p, x: x @ (p["w"] + 1.5),
    "from an array": lambda p, x: x @ (jnp.ones((11, 7)) - p["w"]),
    "plus a vector of outputs": lambda p, x: x @ (p["w"] + OUT),
    "minus a vector of inputs": lambda p, x: x @ (p["w"] - IN[:, None]),
    "from a vector": lambda p, x: x @ (OUT - p["w"]),
    "minus its stopped self": lambda p, x: x @ (2 * p["w"] - lax.stop_gradient(p["w"])),
    "centred": lambda p, x: x @ (p["w"] - p["w"].mean(0)),
    "centred along inputs": lambda p, x: x @ (p["w"] - p["w"].mean(1, keepdims=True)),
    "standardised": lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / p["w"].std(0)),
    "normalised": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)),
    "normalised along inputs":
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=1, keepdims=True)),
    "normalised as a whole": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
    "sums": lambda p, x: (p["w"].sum(), p["w"].sum(0), p["w"].mean(1), x @ p["w"]),
    "penalty": lambda p, x: jnp.sum(x @ p["w"]) + 0.1 * jnp.sum(p["w"] ** 2),
    "penalty, halved inside": lambda p, x: jnp.sum(0.5 * jnp.square(p["w"]) / 3) + x[0, 0],
    "optax's norm": lambda p, x: optax.tree.norm(p["w"]) * x,
    "squares by output": lambda p, x: x @ p["w"] * jnp.mean(jnp.square(p["w"]), axis=0),
    "distances": lambda p, x: jnp.sum((x[:, None] - p["w"].T) ** 2, -1),
    "running sums": lambda p, x: x @ jnp.cumsum(jnp.cumsum(p["w"], 0), 1, dtype=None),
    "padded": lambda p, x: jnp.pad(x, ((0, 0), (1, 2))) @ jnp.pad(p["w"], ((1, 2), (0, 3))),
    "padded inside": lambda p, x: x @ lax.pad(p["w"], 0.0, ((0, 0, 0), (1, -1, 2))),
    "padded with ones": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (2, 0)), constant_values=1),
    "tiled": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.tile(p["w"], (2, 3)),
    "repeated": lambda p, x: x @ jnp.repeat(p["w"], 2, axis=1),
    "repeated along inputs": lambda p, x: jnp.tile(x, 2) @ jnp.repeat(p["w"], 2, axis=0),
    "padded, looked up": lambda p, x: jnp.pad(p["w"], ((0, 3), (0, 0)))[IDS + 2] * x[0, 0],
    "a row of zeros": lambda p, x: p["w"].at[0].set(0.0)[IDS] * x[0, 0],
    "rows of something": lambda p, x: x @ p["w"].at[IDS].set(2.0),
    "a column set": lambda p, x: x @ p["w"].at[:, 2].set(IN),
    "rows added to": lambda p, x: x @ p["w"].at[IDS].add(1.0),
    "a row written over": lambda p, x:
        x @ lax.dynamic_update_slice(p["w"], jnp.ones((1, 7)), (3, 0)),
    "set into zeros": lambda p, x:
        jnp.pad(x, ((0, 0), (0, 2))) @ jnp.zeros((13, 9)).at[:11, 1:8].set(p["w"]),
    "written into zeros": lambda p, x:
        jnp.pad(x, ((0, 0), (0, 2)))
        @ lax.dynamic_update_slice(jnp.zeros((13, 9)), p["w"], (0, 2)),
    "set into a stack": lambda p, x:
        jnp.einsum("ei,eio->eo", x, jnp.zeros((2, 11, 7)).at[1].set(p["w"])),
    "masked by output": lambda p, x: x @ jnp.where(OUT > 0, p["w"], 0.0),
    "masked by input": lambda p, x: x @ jnp.where((IN > 1)[:, None], p["w"], 3.0),
    "times a mask": lambda p, x: x @ (p["w"] * (OUT > 0)),
    "a gate": lambda p, x: x @ (p["w"] * jnp.tanh(p["w"].sum())),
    "scaled, then padded": lambda p, x: x @ jnp.pad(p["w"] * OUT, ((0, 0), (0, 3))),
    "scaled, then added": lambda p, x: x @ (p["w"] * OUT - p["w"] / IN[:, None]),
    "scaled, then cut": lambda p, x: x[:, 1:5] @ (p["w"] * OUT)[1:5, 2:].astype(x.dtype),
    "on a device": lambda p, x: x @ jax.device_put(p["w"], jax.devices()[0]),
    "in a memory space": lambda p, x: x @ jax.device_put(p["w"], jax.memory.Space.Device),
    "tied convolutions": lambda p, x: autoencoder(p["w"].reshape(1, 11, 7), x),
    "a convolution of window one": lambda p, x: lax.conv_general_dilated(
        x[:, None, None], p["w"][None, None], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "complex": lambda p, x: jnp.abs(jnp.fft.fft(x) @ (p["w"] * (1 + 2j))),
    "a gradient step": lambda p, x: x @ (
        p["w"] - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(p["w"])),
}  # fmt: skip
FORMS_MORE = {  # dW is the function's own; a cast; the base turned round once more
    "a gradient step", "complex", "tied convolutions",
}  # fmt: skip

TWO = {
    "sum": lambda p, x: x @ (p["w"] + p["v"]),
    "difference": lambda p, x: x @ (p["w"] - 2 * p["v"]),
    "interpolated": lambda p, x: x @ (p["w"] + x[0, 0] * (p["v"] - p["w"])),
    "product": lambda p, x: x @ (p["w"] @ p["v"].T),
    "product of a square": lambda p, x: x @ (p["w"] @ p["w"].T) @ p["v"],
    "product in einsum": lambda p, x: jnp.einsum("bi,io,jo->bj", x, p["w"], p["v"]),
    "symmetric": lambda p, x: x @ (p["w"] @ p["v"].T + (p["w"] @ p["v"].T).T),
    "inner product": lambda p, x: jnp.einsum("io,io->", p["w"], p["v"]) * x,
    "inner products by output": lambda p, x: jnp.einsum("io,io->o", p["w"], p["v"]),
    "sum of entries' products": lambda p, x: jnp.sum(p["w"] * p["v"], axis=1) + x,
    "cosine": lambda p, x: jnp.vecdot(p["w"], p["v"], axis=0)
        / jnp.linalg.norm(p["w"], axis=0) / jnp.linalg.norm(p["v"], axis=0),
    "chosen": lambda p, x: x @ lax.select(x[0, 0] > 0, p["w"], p["v"]),
    "chosen by where": lambda p, x: x @ jnp.where(x[0, 0] < 0, p["w"], p["v"]),
    "chosen by output": lambda p, x: x @ jnp.where(OUT > 0, p["w"], p["v"]),
    "a branch each": lambda p, x:
        x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"]),
    "a branch, or zeros": lambda p, x:
        x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: jnp.zeros((11, 7))) @ p["v"].T,
    "of three": lambda p, x: x @ lax.switch(
        1, [lambda: p["w"], lambda: p["v"] - p["w"], lambda: jnp.ones((11, 7))]),
    "into each other": lambda p, x: x @ lax.dynamic_update_slice(p["w"], p["v"][:2], (4, 0)),
    "side by side, looked up": lambda p, x:
        jnp.concatenate([p["w"], p["v"]])[IDS + 9] * x[0, 0],
    "stacked, one turned": lambda p, x:
        jnp.einsum("ei,eij->ej", x, jnp.stack([p["w"] @ p["v"].T, p["v"] @ p["w"].T])),
    "side by side, a convolution": lambda p, x: lax.conv_general_dilated(
        x[:, None], jnp.concatenate([p["w"], p["v"]], 1)[None], (1,), "SAME",
        dimension_numbers=("NWC", "WIO", "NWC")),
}  # fmt: skip


def autoencoder(kernel, x):
    """A convolution and its transpose, with one kernel."""
    conv = lambda x: lax.conv_general_dilated(
        x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = x[:, None] * jnp.ones((1, 3, 1))
    hidden, pullback = jax.vjp(conv, x)
    return pullback(hidden)[0]


@pytest.mark.parametrize("name", ONE)
def test_one_kernel(name):
    tree = {"w": kernels()["w"]}
    agree(ONE[name], tree, X, structure=name not in FORMS_MORE)


@pytest.mark.parametrize("name", TWO)
def test_two_kernels(name):
    agree(TWO[name], kernels(), X, tol=3)


NOT_KERNELS = ("sums", "penalty, halved inside", "optax's norm", "distances", "inner",
               "sum of entries", "cosine")  # fmt: skip


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_a_survey_follows_kernels_to_their_products(name):
    trees = {"w": jnp.ones((11, 7)), "v": jnp.ones((11, 7))}
    f = (ONE | TWO)[name]
    survey = jlora.survey(f, trees, X)
    if not name.startswith(NOT_KERNELS):
        assert survey.is_kernel("w")
        ins, outs, batch, _ = survey.axes("w")
        assert {*ins, *outs} == {0, 1}
        assert not batch


def test_a_survey_tells_a_scale_and_a_shift_from_a_kernel():
    def f(p, x):
        return x @ (p["w"] * p["scale"] + p["shift"][:, None]) + p["bias"]

    params = {"w": jnp.ones((11, 7)), "scale": OUT, "shift": IN, "bias": OUT}
    survey = jlora.survey(f, params, X)
    assert survey.matmul_kernels() == ["w"]
    kinds = {path: [u.kind for u in leaf.uses] for path, leaf in survey.leaves.items()}
    assert kinds == {
        "w": ["matmul"], "scale": ["scale"], "shift": ["bias"], "bias": ["bias"],
    }  # fmt: skip


def test_kernels_in_bfloat16():
    tree = kernels(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    for name in ("normalised", "per output", "product", "difference", "centred"):
        f = (ONE | TWO)[name]
        got = jlora.lora(lambda p, x, f=f: f(p, x))(tree, x)
        exact = jax.tree.map(lambda w: w.astype(jnp.float32), jlora.merge(tree))
        want = f(exact, x.astype(jnp.float32))
        size = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05 * size)


def test_under_vmap_scan_and_remat():
    tree = kernels()

    def norm_of_product(p, x):
        w = (p["w"] * OUT) @ p["v"].T
        return jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0)))

    def scanned(p, x):
        body = jax.checkpoint(lambda x, s: (norm_of_product(p, x * s), None))
        return lax.scan(body, x, jnp.array([1.0, 0.5]))[0]

    agree(scanned, tree, X, structure=False, tol=3)
    agree(lambda p, x: jax.vmap(lambda x: scanned(p, x))(x), tree, X, structure=False,
          tol=3)  # fmt: skip
    got = jax.vmap(jlora.lora(scanned), (None, 0))(tree, X)
    assert_close(got, scanned(jlora.merge(tree), X), **TOL[jnp.float32])


def test_dora_keeps_its_gain():
    tree = kernels(dora=True)
    for name in ("per output", "normalised", "masked by output", "plus a vector of outputs",
                 "a row of zeros", "sums", "penalty", "padded inside"):  # fmt: skip
        agree(ONE[name], {"w": tree["w"]}, X, structure=False, tol=3)
    agree(TWO["chosen"], tree, X, structure=False, tol=3)


def test_adapters_of_two_dtypes_are_stacked():
    tree = kernels()
    half = lambda t: t.map(lambda x, d: (x.astype(jnp.bfloat16), d))
    v = tree["v"]
    tree["v"] = v.map(v.base, half)
    agree(
        lambda p, x: x @ jnp.stack([p["w"], p["v"]]), tree, X, structure=False, tol=99
    )


def test_stacked_kernels_summed_over_the_stack(getkey):
    w = lowrank(getkey(), (3, 11, 7), batch_axes=(0,), in_axes=(1,))
    agree(lambda p, x: x @ p["w"].sum(0) @ p["w"].mean(0).T, {"w": w}, X)
    agree(lambda p, x: x[:, :3] @ p["w"].sum(1), {"w": w}, X, structure=False)


def test_a_stack_merged_with_the_outputs(getkey):
    w = lowrank(getkey(), (3, 11, 7), batch_axes=(0,), in_axes=(1,))
    agree(lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(11, 21), {"w": w}, X,
          structure=False)  # fmt: skip


def test_lookups_along_a_stack_of_tables(getkey):
    w = lowrank(getkey(), (3, 11, 7), batch_axes=(0,), in_axes=(1,))
    ids = jnp.array([[0, 3], [10, 2], [5, 5]])
    agree(lambda p, i: jax.vmap(lambda t, i: t[i])(p["w"], i), {"w": w}, ids)
    one = lowrank(getkey(), (11, 7))
    row = lambda t, i: lax.dynamic_index_in_dim(t, i, 0, keepdims=False)
    f = lambda p, i: jax.vmap(jax.vmap(row, (None, 0)), (None, 0))(p["w"], i)
    agree(f, {"w": one}, ids)
    assert jlora.survey(f, {"w": one.base}, ids).axes("w")[:2] == ((0,), (1,))


def test_functions_with_rules_of_their_own():
    tree = kernels()

    @jax.custom_batching.custom_vmap
    def product(x, w):
        return x @ w

    @product.def_vmap
    def by_rule(size, batched, x, w):
        return 2 * (x @ w), True  # another value, to tell which rule ran

    got = jax.vmap(jlora.lora(lambda p, x: product(x, p["w"])), (None, 0))(tree, X)
    assert_close(got, 2 * X @ jlora.merge(tree)["w"], **TOL[jnp.float32])

    def call(p, x):  # with a transpose that is not the true one
        forward = lambda w, x: x @ w
        back = lambda w, g: 3 * (g @ w.T)
        return jax.custom_derivatives.linear_call(forward, back, p["w"], x)

    got = jax.grad(lambda x: jlora.lora(call)(tree, x).sum())(X)
    want = 3 * jnp.ones((2, 7)) @ jlora.merge(tree)["w"].T
    assert_close(got, want, **TOL[jnp.float32])

    def solve(p, x):
        matvec = lambda v: v + 0.1 * (v @ p["w"]) @ p["w"].T
        return jax.scipy.sparse.linalg.cg(matvec, x[0])[0]

    agree(solve, {"w": tree["w"]}, X, structure=False, tol=30)
    composite = lambda p, x: lax.composite(lambda x, w: x @ w, "a.b")(x, p["w"])
    got = jlora.lora(composite)(tree, X)
    assert_close(got, X @ jlora.merge(tree)["w"], **TOL[jnp.float32])


def test_a_custom_rule_is_asked_for_no_more_than_is_differentiated():
    tree = {"w": kernels()["w"]}

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def forward(x, w):
        assert not x.perturbed, "a rule that knows no gradient of x"
        return x.value @ w.value, x.value

    product.defvjp(
        forward, lambda x, g: (jnp.zeros_like(x), 2 * x.T @ g), symbolic_zeros=True
    )
    f = lambda p: jnp.sum(jnp.sin(jlora.lora(lambda p: product(X, p["w"]))(p)))
    half, frozen = jlora.split(tree)
    got = jax.jit(jax.grad(lambda t: f(jlora.combine(t, frozen))))(half)

    def reference(half):
        w = jlora.merge(jlora.combine(half, frozen))["w"]
        y = lax.stop_gradient(X @ w)
        return 2 * jnp.sum(jnp.cos(y) * (X @ w))  # the rule's factor of two

    assert_close(got, jax.grad(reference)(half), rtol=1e-4, atol=1e-4)


def test_a_kernel_that_a_custom_rule_closes_over_is_named():
    tree = {"w": kernels()["w"]}
    half, frozen = jlora.split(tree)

    def f(p):
        @jax.custom_vjp
        def product(x):
            return x @ p["w"]

        product.defvjp(lambda x: (product(x), None), lambda _, g: (g @ p["w"].T,))
        return product(X).sum()

    with pytest.raises(jlora.UnsupportedOpError, match=r"closes over .*'w'"):
        jax.grad(lambda t: jlora.lora(f)(jlora.combine(t, frozen)))(half)


def test_a_branch_is_traced_once(monkeypatch):
    replayed = []
    plain = Replay.replay
    monkeypatch.setattr(
        Replay, "replay", lambda *args: [replayed.append(1), plain(*args)][1]
    )
    f = lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["v"])
    jax.make_jaxpr(jlora.lora(f))(kernels(), X)
    assert len(replayed) == 3  # the function, and each branch


def test_factors_stay_out_of_eight_bits():
    dtype = jnp.float8_e4m3fn

    def product(w, x):
        numbers = (((1,), (0,)), ((), ()))
        x, w = x.astype(dtype), w.astype(dtype)
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)

    tree = kernels()["w"]
    factors = [
        v.aval.dtype
        for e in equations(jax.make_jaxpr(jlora.lora(product))(tree, X))
        if e.primitive.name == "factor_product"
        for v in e.invars
    ]
    assert len(factors) == 4
    assert dtype not in factors
    want = product(tree.merged(), X)
    size = float(jnp.max(jnp.abs(want)))
    got = jlora.lora(product)(tree, X)
    np.testing.assert_allclose(got, want, atol=0.1 * size)
