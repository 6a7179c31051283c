"""DoRA, biases of adapters, and trained rows of tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from tools import assert_close, check, lowrank, randomise

import jlora
from jlora._kernel import dora as _dora

KEY = jax.random.key(3)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def by_hand(w, axis=0):
    """DoRA's kernel from the paper's formula, in float64."""
    (t,) = w.adapters.values()
    base, a, b, m = (np.asarray(x, np.float64) for x in (w.base, t.a, t.b, t.magnitude))
    whole = base + float(t.scale) * a @ b
    return m * whole / np.linalg.norm(whole, axis=axis, keepdims=True)


# -- the value -------------------------------------------------------------------------


def test_the_kernel_is_the_papers():
    w = lowrank(KEY, (7, 5), dora=True)
    np.testing.assert_allclose(w.merged(), by_hand(w), rtol=2e-5, atol=2e-6)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([2, 3, 7]), st.sampled_from([2, 5]), st.floats(0.01, 100))
def test_the_norm_is_that_of_the_sum(ins, outs, scale):
    w = lowrank(KEY, (ins, outs), rank=2, dora=True, alpha=2 * scale)
    (t,) = w.adapters.values()
    whole = np.asarray(w.base, np.float64) + scale * np.asarray(t.a @ t.b, np.float64)
    want = np.linalg.norm(whole, axis=0)
    got = _dora.column_norm(w.base, t)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * want.max())


@pytest.mark.parametrize("init", ["default", "embedding"])
def test_training_starts_at_the_base(init):
    params = {"w": normal(0, 7, 5), "b": normal(1, 5)}
    tree = jlora.lorafy(params, 2, ["w"], dora=True, init=init)
    np.testing.assert_allclose(
        tree["w"].adapters[""].magnitude, np.linalg.norm(params["w"], axis=0), rtol=1e-6
    )
    x = normal(2, 3, 7)
    got = jlora.lora(lambda p, x: x @ p["w"] + p["b"])(tree, x)
    np.testing.assert_allclose(got, x @ params["w"] + params["b"], rtol=1e-5, atol=1e-5)


def test_a_column_of_zeros_stays():
    w = normal(0, 7, 5).at[:, 2].set(0)
    tree = jlora.lorafy({"w": w}, 2, ["w"], dora=True)
    half, frozen = jlora.split(tree)

    def loss(half):
        out = jlora.lora(lambda p: p["w"].T @ jnp.ones(7))(jlora.combine(half, frozen))
        return jnp.sum(out**2)

    value, grads = jax.value_and_grad(loss)(half)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.any(jlora.merge(tree)["w"][:, 2])


def test_the_norm_has_no_gradient():
    w = lowrank(KEY, (7, 5), dora=True)
    x = normal(1, 3, 7)
    (t,) = w.adapters.values()
    norm = jnp.asarray(np.linalg.norm(w.base + t.scale * t.a @ t.b, axis=0))

    def formula(a, b, m):
        return jnp.sum(jnp.sin(x @ (m * (w.base + t.scale * a @ b) / norm)))

    half, frozen = jlora.split(w)

    def loss(half):
        w = jlora.combine(half, frozen)
        return jnp.sum(jnp.sin(jlora.lora(lambda w, x: x @ w)(w, x)))

    got = jax.grad(loss)(half).adapters[""]
    want = jax.grad(formula, argnums=(0, 1, 2))(t.a, t.b, t.magnitude)
    assert_close((got.a, got.b, got.magnitude), want, rtol=1e-4, atol=1e-4)


def test_the_base_gets_a_gradient_on_request():
    w = lowrank(KEY, (7, 5), dora=True)
    f = jlora.lora(lambda w: jnp.sum(jnp.sin(jnp.ones(7) @ w)), stop_frozen=False)
    grad = jax.grad(f)(w).base
    assert np.abs(grad).max() > 0.01


# -- the rules -------------------------------------------------------------------------
# The reference is the merged kernel, whose norm has no gradient either. Squaring the
# kernel for its norm has the kernel's shape in the jaxpr, and is fused; see below.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul(dtype):
    w = lowrank(KEY, (7, 5), dtype=dtype, dora=True)
    check(lambda w, x: x @ w, w, normal(1, 3, 7, dtype=dtype), dtype=dtype,
          grad=dtype == jnp.float32, structure=False)  # fmt: skip


def test_heads_in_bfloat16():
    """A CPU has not every product of bfloat16 into float32."""
    w = lowrank(KEY, (64, 4, 16), rank=8, dtype=jnp.bfloat16, dora=True)
    x = normal(1, 3, 64, dtype=jnp.bfloat16)
    check(lambda w, x: jnp.einsum("td,dhk->thk", x, w), w, x, dtype=jnp.bfloat16,
          grad=False, structure=False)  # fmt: skip
    merged = jax.block_until_ready(jlora.merge({"w": w})["w"])
    assert merged.dtype == jnp.bfloat16


CASES = {
    "kernel on the left": ((7, 5), {}, lambda w, x: w.T @ x, (7, 3)),
    "transposed": ((7, 5), {}, lambda w, x: x @ w.T, (3, 5)),
    "looked up and transposed": (
        (7, 5), {}, lambda w, x: jnp.tanh(w[jnp.array([2, 6, 2])] * x) @ w.T, (3, 5)
    ),
    "looked up along outputs": (
        (5, 7), {"in_axes": (1,)}, lambda w, x: jnp.take(w, jnp.array([4, 1]), 0) + x,
        (2, 7),
    ),
    "several outputs": (
        (3, 2, 5), {}, lambda w, x: jnp.einsum("td,dhk->thk", x, w), (2, 3)
    ),
    "several inputs": (
        (2, 5, 3), {"in_axes": (0, 1)}, lambda w, x: jnp.einsum("thk,hkd->td", x, w),
        (3, 2, 5),
    ),
    "reshaped": ((7, 6), {}, lambda w, x: x @ w.reshape(7, 2, 3)[:, 1], (3, 7)),
    "sliced along inputs": ((7, 5), {}, lambda w, x: x @ w[2:5], (2, 3)),
    "sliced along outputs": ((7, 5), {}, lambda w, x: x @ w[:, 1:4:2], (2, 7)),
    "scaled": ((7, 5), {}, lambda w, x: x @ (-3.0 * w), (2, 7)),
    "a stack, batched": (
        (3, 7, 5), {"in_axes": (1,), "batch_axes": (0,)},
        lambda w, x: jnp.einsum("eti,eio->eto", x, w), (3, 2, 7),
    ),
    "a stack, scanned": (
        (3, 5, 5), {"in_axes": (1,), "batch_axes": (0,)},
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], (2, 5),
    ),
    "experts looked up": (
        (3, 7, 5), {"in_axes": (1,), "batch_axes": (0,)},
        lambda w, x: jnp.einsum("ti,tio->to", x, w[jnp.array([2, 0])]), (2, 7),
    ),
    "experts by ragged_dot": (
        (3, 7, 5), {"in_axes": (1,), "batch_axes": (0,)},
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (6, 7),
    ),
    "side by side": (
        (7, 5), {}, lambda w, x: x @ jnp.concatenate([w, x.T @ x, w], axis=1), (2, 7)
    ),
    "remat": ((5, 5), {}, lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), (2, 5)),
    "convolution": (
        (3, 3, 4, 6), {"in_axes": (0, 1, 2)},
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (2, 5, 7, 4),
    ),
    "convolution in groups": (
        (3, 2, 6), {"in_axes": (0, 1)},
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NCH", "HIO", "NCH"),
            feature_group_count=2),
        (2, 4, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_use_of_a_kernel(name):
    shape, axes, f, x_shape = CASES[name]
    check(
        f, lowrank(KEY, shape, dora=True, **axes), normal(1, *x_shape), structure=False
    )


def test_a_custom_rule_keeps_its_derivative():
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (x @ w, (w, x)), lambda s, g: (3 * s[1].T @ g, g @ s[0].T))
    check(f, lowrank(KEY, (7, 5), dora=True), normal(1, 2, 7), structure=False)


def test_kernels_above_each_other_have_no_low_rank_form():
    w = lowrank(KEY, (4, 5), dora=True)
    with pytest.raises(jlora.UnsupportedOpError, match="concatenate"):
        jlora.lora(lambda w, x: x @ jnp.concatenate([w, w]))(w, normal(1, 2, 8))


def test_no_kernel_is_formed():
    """Neither W + sAB nor a gradient of the kernel's size, in the compiled step."""
    n = 256
    tree = jlora.lorafy({"w": normal(0, n, n)}, 2, ["w"], dora=True)
    half, frozen = jlora.split(tree)

    def loss(half, frozen, x):
        out = jlora.lora(lambda p, x: x @ p["w"])(jlora.combine(half, frozen), x)
        return jnp.sum(jnp.sin(out))

    step = jax.jit(jax.grad(loss)).lower(half, frozen, normal(1, 3, n)).compile()
    assert step.memory_analysis().temp_size_in_bytes < n * n * 4 / 3


def test_slices_of_a_fused_kernel():
    params = {"c_attn": {"kernel": normal(0, 7, 15), "bias": normal(1, 15)}}
    tree = jlora.lorafy(params, 2, ["query", "value"], dora=True, lora_bias=False)
    tree = randomise(tree, KEY)
    x = normal(2, 3, 7)
    f = lambda p, x: x @ p["c_attn"]["kernel"] + p["c_attn"]["bias"]
    got = jlora.lora(f)(tree, x)
    np.testing.assert_allclose(got, f(jlora.merge(tree), x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        got[:, 5:10], f(params, x)[:, 5:10], rtol=1e-5, atol=1e-5
    )
    t = tree["c_attn"]["kernel"].adapters["value"]
    whole = params["c_attn"]["kernel"][:, 10:] + t.scale * t.a @ t.b
    want = t.magnitude * whole / np.linalg.norm(whole, axis=0)
    merged = jlora.merge(tree)["c_attn"]["kernel"][:, 10:]
    np.testing.assert_allclose(merged, want, rtol=1e-4, atol=1e-5)


# -- trees -----------------------------------------------------------------------------


def everything(**settings):
    params = {
        "table": {"embedding": normal(0, 11, 6)},
        "query": {"kernel": normal(1, 6, 6), "bias": normal(2, 6)},
    }
    tokens = {"table": [7, 2]}
    tree = jlora.lorafy(params, 2, ["query"], trainable_tokens=tokens, **settings)
    return params, randomise(tree, KEY)


def model(p, ids):
    x = p["table"]["embedding"][ids] @ p["query"]["kernel"] + p["query"]["bias"]
    return jnp.tanh(x) @ p["table"]["embedding"].T


IDS = jnp.array([[7, 3, 2], [0, 7, 10]])


@pytest.mark.parametrize("settings", [{"dora": True}, {"lora_bias": True}, {}])
def test_adapted_equals_merged(settings):
    _, tree = everything(**settings)
    got = jax.jit(jlora.lora(model))(tree, IDS)
    merged, report = jlora.merge(tree, report=True)
    np.testing.assert_allclose(got, model(merged, IDS), rtol=2e-5, atol=2e-5)
    assert {leaf.path for leaf in report} == {"query/kernel", "table/embedding"}


def test_a_bias_counts_scale_times_and_is_merged_into_the_layers():
    params, tree = everything(lora_bias=True, alpha=6.0)
    bias = tree["query"]["kernel"].adapters[""].bias
    want = params["query"]["bias"] + 3 * bias
    np.testing.assert_allclose(jlora.merge(tree)["query"]["bias"], want, rtol=1e-6)


def test_a_bias_beside_a_trained_bias_and_on_slices_of_a_stack():
    params = {"c_attn": {"kernel": normal(0, 2, 7, 15), "bias": normal(1, 2, 15)}}
    axes = {"in_axes": (1,), "out_axes": (2,), "batch_axes": (0,)}
    whole = jlora.lorafy(
        params, targets={"c_attn": jlora.Target(rank=2, **axes)}, lora_bias=True,
        train=["bias"],
    )  # fmt: skip
    tree = randomise(whole, KEY)
    f = lambda p, x: lax.scan(
        lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"])[:, :7], None),
        x,
        p["c_attn"],
    )[0]
    x = normal(2, 3, 7)
    got = jlora.lora(f)(tree, x)
    np.testing.assert_allclose(got, f(jlora.merge(tree), x), rtol=1e-4, atol=1e-4)


def test_trained_rows_are_merged_bit_for_bit():
    params, tree = everything()
    merged = jlora.merge(tree)["table"]["embedding"]
    want = (
        params["table"]["embedding"]
        .at[jnp.array([7, 2])]
        .set(tree["table"]["embedding"].rows)
    )
    np.testing.assert_array_equal(merged, want)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rows = jlora.lorafy(low, 2, ["query"], trainable_tokens={"table": [7]})
    assert rows["table"]["embedding"].rows.dtype == jnp.float32
    assert jlora.merge(rows)["table"]["embedding"].dtype == jnp.bfloat16


ROWS = {
    "lookup": lambda p, ids: p["table"][ids],
    "take": lambda p, ids: jnp.take(p["table"], ids, axis=0),
    "out of bounds": lambda p, ids: jnp.take(p["table"], ids + 5, axis=0, mode="clip"),
    "cast": lambda p, ids: p["table"].astype(jnp.float32)[ids],
    "scaled": lambda p, ids: (p["table"] * 2)[ids],
    "one hot": lambda p, ids: (
        jax.nn.one_hot(ids, 11, dtype=p["table"].dtype) @ p["table"]
    ),
    "transposed": lambda p, ids: p["table"].T[:, ids],
    "joined": lambda p, ids: (
        jnp.eye(6, dtype=p["table"].dtype) @ jnp.concatenate([p["table"], p["other"]]).T
    ),
    "joined wide": lambda p, ids: jnp.concatenate([p["table"], p["other"]], 1)[ids],
    "in a loop": lambda p, ids: lax.map(lambda i: p["table"][i[None]], ids),
    "head of units": lambda p, ids: jnp.eye(6, dtype=p["table"].dtype) @ p["table"].T,
    "both": lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T,
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("use", ROWS)
def test_trained_rows_are_those_of_the_merged_table_bit_for_bit(use, dtype):
    params = {
        "table": normal(0, 11, 6, dtype=dtype),
        "other": normal(1, 11, 6, dtype=dtype),
    }
    tree = jlora.lorafy(params, targets=[], trainable_tokens={"table": [7, 2, 10]})
    tree = randomise(tree, KEY)
    ids = jnp.array([7, 3, 2, 0, 10, 7])
    f = lambda p: ROWS[use](p, ids)
    if use == "joined wide":  # a row of both has no gain of its own
        with pytest.raises(jlora.UnsupportedOpError, match="table"):
            jlora.lora(f)(tree)
        return
    got, want = jax.jit(jlora.lora(f))(tree), jax.jit(f)(jlora.merge(tree))
    assert got.dtype == want.dtype
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    if use == "both" and dtype == jnp.float32:
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, want)

    # The gradient is that of the merged table's rows, in the rows' own dtype.
    half, frozen = jlora.split(tree)
    loss = lambda g: lambda t: jnp.sum(jnp.sin(g(t).astype(jnp.float32)))
    low = loss(lambda t: jlora.lora(f)(jlora.combine(t, frozen)))
    dense = loss(
        lambda t: f({**tree, "table": jlora.combine(t, frozen)["table"].merged()})
    )
    one, two = (jax.jit(jax.grad(g))(half)["table"].rows for g in (low, dense))
    assert one.dtype == two.dtype == jnp.float32
    tol = 1e-5 if dtype == jnp.float32 else 2e-2
    assert float(jnp.max(jnp.abs(two))) > 0.1
    np.testing.assert_allclose(one, two, rtol=tol, atol=tol * float(jnp.max(abs(two))))


@pytest.mark.parametrize("settings", [{"dora": True}, {"lora_bias": True}])
def test_training_moves_what_is_trained_and_nothing_else(settings):
    _, tree = everything(**settings)
    labels = set(jax.tree.leaves(jlora.labels(tree)))
    extra = {"magnitude"} if "dora" in settings else {"bias"}
    assert labels == {"a", "b", "rows", "frozen"} | extra
    half, frozen = jlora.split(tree)
    tx = optax.adam(0.03)

    @jax.jit
    def step(half, state):
        loss = lambda h: jnp.mean(jlora.lora(model)(jlora.combine(h, frozen), IDS) ** 2)
        value, grads = jax.value_and_grad(loss)(half)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(half, updates), state, value

    state, new, losses = tx.init(half), half, []
    for _ in range(20):
        new, state, value = step(new, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    for before, after in zip(jax.tree.leaves(half), jax.tree.leaves(new), strict=True):
        assert not np.allclose(before, after, atol=1e-4)
    # The same over the whole tree, masked: the frozen leaves have no gradient.
    grads = jax.grad(lambda t: jnp.mean(jlora.lora(model)(t, IDS) ** 2))(tree)
    for g, trained in zip(
        jax.tree.leaves(grads), jax.tree.leaves(jlora.trainable_mask(tree)), strict=True
    ):
        assert bool(np.any(g)) == trained


def test_summary_counts_all():
    _, tree = everything(dora=True)
    rows = {row.path: row.trainable for row in jlora.summary(tree).rows}
    assert rows == {"query/kernel": 6 * 2 * 2 + 6, "table/embedding": 12}
    assert "rows" in str(jlora.summary(tree))


@pytest.mark.parametrize("settings", [{"dora": True}, {"lora_bias": True}])
def test_checkpoints_keep_all(tmp_path, settings):
    from jlora import checkpoint

    params, tree = everything(**settings)
    checkpoint.save_adapter(tmp_path / "c", tree)
    again = checkpoint.load_adapter(tmp_path / "c", params)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_abstract_and_sharded_trees():
    mesh = jax.make_mesh((1,), ("x",))
    place = lambda x: jax.device_put(
        x,
        jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[None] * (x.ndim - 1), "x")
        ),
    )
    params, _ = everything()
    sharded = jax.tree.map(place, params)
    settings = {"dora": True, "trainable_tokens": {"table": [7, 2]}}
    real = jlora.lorafy(sharded, 2, ["query"], **settings)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract = jlora.lorafy(shapes, 2, ["query"], **settings)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    t = real["query"]["kernel"].adapters[""]
    assert tuple(t.magnitude.sharding.spec) == ("x",)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"dora": True, "lora_bias": True}, jlora.OptionError, "refuses the two"),
        ({"lora_bias": True, "targets": ["table"]}, jlora.StructureError, "has none"),
        ({"trainable_tokens": {"tables": [1]}}, jlora.TargetError, "table/embedding"),
        ({"trainable_tokens": {"query/kernel": [1]}}, jlora.TargetError, "choose one"),
        ({"trainable_tokens": {"table": [11]}}, jlora.ShapeError, "rows 0 to 10"),
        ({"trainable_tokens": {"table": [1, 1]}}, jlora.ShapeError, "each once"),
        ({"trainable_tokens": {"query/bias": [1]}}, jlora.ShapeError, "no table"),
    ],
)
def test_refusals(settings, error, says):
    params, _ = everything()
    with pytest.raises(error, match=says):
        jlora.lorafy(params, **{"rank": 2, "targets": ["query"], **settings})


def test_nodes_do_not_merge_quietly():
    _, tree = everything()
    with pytest.raises(jlora.UnmergedError, match=r"lora\(model.apply\)"):
        jnp.dot(jnp.ones((2, 11)), tree["table"]["embedding"])
