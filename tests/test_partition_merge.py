"""split/combine, masks and labels; merge, its report, and unmerge; summary, survey."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close, equations, lowrank, randomise

import jlora
from jlora._transform._rules.layout import reshape_groups
from jlora._tree import merge_kernels as _merge_kernels

PARAMS = {
    "query": {"kernel": jnp.linspace(-1, 1, 35).reshape(7, 5), "bias": jnp.ones(5)},
    "norm": {"scale": jnp.ones(5)},
    "head": {"kernel": jnp.ones((5, 3))},
}


def tree_of(dtype=jnp.float32, **kwargs):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    kwargs.setdefault("train", ["head"])
    return randomise(jlora.lorafy(params, 2, ["query"], **kwargs), jax.random.key(0))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# -- partition -------------------------------------------------------------------------


def test_split_is_lossless_and_the_halves_are_plain_trees():
    tree = tree_of()
    trainable, frozen = jlora.split(tree)
    assert len(jax.tree.leaves(trainable)) == 3  # a, b, head
    assert len(jax.tree.leaves(frozen)) == 4  # base, scale, bias, norm
    back = jlora.combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert bits(back) == bits(tree)
    tx = optax.adamw(1e-3)
    state = tx.init(trainable)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * (14 + 10 + 15)


def test_split_keeps_none_and_other_leaves():
    tree = {**tree_of(), "none": None, "act": jnp.tanh, "n": 3}
    trainable, frozen = jlora.split(tree)
    assert frozen["act"] is jnp.tanh
    back = jlora.combine(trainable, frozen)
    assert back["none"] is None
    assert back["n"] == 3


def test_combine_refuses_what_does_not_fit():
    tree = tree_of()
    trainable, frozen = jlora.split(tree)
    with pytest.raises(jlora.StructureError, match="not of one tree"):
        jlora.combine(trainable, {"other": frozen})
    with pytest.raises(jlora.StructureError, match="both halves hold"):
        jlora.combine(trainable, tree)


def test_a_tree_that_trains_nothing_is_refused():
    for f in (jlora.split, jlora.trainable_mask):
        with pytest.raises(
            jlora.StructureError, match="nothing in this tree is trained"
        ):
            f(PARAMS)


def test_masks_and_labels():
    tree = tree_of(bias="lora_only")
    mask = jlora.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert mask["query"]["kernel"].base is False
    assert mask["query"]["kernel"].adapters[""].a is True
    labels = jlora.labels(tree)
    assert labels["query"]["bias"].value == "bias"
    assert labels["head"]["kernel"].value == "full"
    # LoRA+: another rate for b.
    tx = optax.multi_transform(
        {"a": optax.sgd(1.0), "b": optax.sgd(16.0), "full": optax.sgd(1.0),
         "bias": optax.sgd(1.0), "frozen": optax.set_to_zero()},
        labels,
    )  # fmt: skip
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(ones, tx.init(tree), tree)
    t = updates["query"]["kernel"]
    assert float(t.adapters[""].b[0, 0]) == -16
    assert not jnp.any(t.base)


@pytest.mark.parametrize(("kernel", "bias"), [("w", "b"), ("weight", "bias")])
def test_a_bias_is_labelled_so_whatever_the_framework_calls_it(kernel, bias):
    params = {"lin": {kernel: jnp.ones((3, 5)), bias: jnp.ones(5), "c": jnp.ones(5)}}
    tree = jlora.lorafy(params, 2, [f"lin/{kernel}"], train=["c"], bias="all")
    labels = jlora.labels(tree)["lin"]
    assert (labels[bias].value, labels["c"].value) == ("bias", "full")
    tree = jlora.lorafy(params, 2, [f"lin/{kernel}"], train=[bias])
    assert jlora.labels(tree)["lin"][bias].value == "bias"


def test_masked_training_equals_training_the_half():
    tree = tree_of()
    x = jnp.ones((2, 7))

    def apply(p, x):
        h = x @ p["query"]["kernel"] + p["query"]["bias"]
        return jnp.tanh(h * p["norm"]["scale"]) @ p["head"]["kernel"]

    loss = lambda p: jnp.mean(jlora.lora(apply)(p, x) ** 2)
    tx = optax.adamw(1e-2)
    masked = optax.masked(tx, jlora.trainable_mask(tree))
    half, frozen = jlora.split(tree)
    whole, state, half_state = tree, masked.init(tree), tx.init(half)
    for _ in range(3):
        updates, state = masked.update(jax.grad(loss)(whole), state, whole)
        whole = optax.apply_updates(whole, updates)
        grads = jax.grad(lambda t: loss(jlora.combine(t, frozen)))(half)
        updates, half_state = tx.update(grads, half_state, half)
        half = optax.apply_updates(half, updates)
    got, still = jlora.split(whole)
    assert_close(got, half, rtol=1e-6, atol=1e-6)
    assert bits(still) == bits(frozen)


# -- merge -----------------------------------------------------------------------------


def test_merge_is_the_formula():
    tree = tree_of()
    w = tree["query"]["kernel"]
    t = w.adapters[""]
    want = np.asarray(w.base, np.float64) + float(t.scale) * (
        np.asarray(t.a, np.float64) @ np.asarray(t.b, np.float64)
    )
    merged = jlora.merge(tree)
    np.testing.assert_allclose(merged["query"]["kernel"], want, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert merged["head"]["kernel"] is tree["head"]["kernel"].value


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_rounds_once(dtype):
    tree = tree_of(dtype, train=())
    w = tree["query"]["kernel"]
    exact = np.asarray(w.base.astype(jnp.float32)) + np.asarray(w.delta())
    merged = jlora.merge(tree)["query"]["kernel"]
    assert merged.dtype == dtype
    assert bits(merged) == bits(jnp.asarray(exact).astype(dtype))


def test_the_report_says_what_rounding_lost():
    base = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    tree = jlora.lorafy({"query": base}, 2, ["query"])
    small = jax.tree.map(
        lambda x, m: jnp.full_like(x, 0.01) if m else x,
        tree,
        jlora.trainable_mask(tree),
    )
    merged, report = jlora.merge(small, report=True)
    (leaf,) = report
    delta = np.asarray(small["query"].delta(), np.float64)
    base64, merged64 = (np.asarray(v, np.float64) for v in (base, merged["query"]))
    lost = np.linalg.norm(merged64 - base64 - delta) / np.linalg.norm(delta)
    assert leaf.lost == pytest.approx(lost, rel=1e-3)
    assert leaf.lost > 0.5  # an update of 2e-4 on weights near 1 drowns in bfloat16
    assert leaf.unchanged == pytest.approx(np.mean(base64 == merged64), abs=1e-6)
    assert leaf.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-3)
    assert "query" in str(report)
    _, exact = jlora.merge(tree_of(), report=True)
    assert exact[0].lost < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_returns_the_original_bits(dtype):
    tree = tree_of(dtype)
    merged, undo = jlora.merge(tree, undo=True)
    assert bits(merged) != bits(PARAMS)
    back = jlora.unmerge(merged, undo)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert bits(back) == bits(tree)
    merged["norm"]["scale"] += 1
    with pytest.raises(jlora.StructureError, match="norm/scale"):
        jlora.unmerge(merged, undo)
    with pytest.raises(jlora.StructureError, match="not of one tree"):
        jlora.unmerge({"x": 1}, undo)


def test_unmerge_merges_nothing_and_takes_equal_bits(monkeypatch):
    tree = tree_of()
    merged, undo = jlora.merge(tree, undo=True)
    monkeypatch.setattr("jlora._tree.merge.merge_kernels", None)
    loaded = jax.tree.map(lambda x: jnp.asarray(np.array(x)), merged)
    assert bits(jlora.unmerge(loaded, undo)) == bits(tree)
    kernel = merged["query"]["kernel"]
    for other in (kernel.at[0, 0].add(1e-3), kernel.astype(jnp.bfloat16)):
        changed = {**merged, "query": {**merged["query"], "kernel": other}}
        with pytest.raises(jlora.StructureError, match="query/kernel"):
            jlora.unmerge(changed, undo)
    kernel.delete()
    with pytest.raises(jlora.StructureError, match="query/kernel"):
        jlora.unmerge(loaded, undo)


@pytest.mark.parametrize("where", ["base", "adapter"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_and_infinity_are_refused(where, bad):
    tree = tree_of()
    w = tree["query"]["kernel"]
    place = lambda x: x.at[0, 0].set(bad)
    if where == "base":
        tree["query"]["kernel"] = w.map(place(w.base), lambda t: t)
    else:
        tree = jax.tree.map(lambda x: x, tree)
        tree["query"]["kernel"] = w.map(
            w.base, lambda t: t.map(lambda x, d: (place(x) if x is t.a else x, d))
        )
    with pytest.raises(jlora.NonFiniteError, match=rf"'query/kernel'.*{where}"):
        jlora.merge(tree)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_one_bad_weight_anywhere_is_found(dtype, bad):
    tree = tree_of(dtype, train=())
    w = tree["query"]["kernel"]
    for place in [(0, 0), (6, 4), (3, 2)]:
        tree["query"]["kernel"] = w.map(w.base.at[place].set(bad), lambda t: t)
        with pytest.raises(jlora.NonFiniteError, match="its base"):
            jlora.merge(tree)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]
)
def test_weights_as_large_as_the_dtype_has_are_finite_and_overflow_is_not(dtype):
    most = jnp.finfo(dtype).max
    tree = jlora.lorafy({"query": jnp.full((7, 5), most, dtype)}, 2, ["query"])
    assert bits(jlora.merge(tree)) == bits(jnp.full((7, 5), most, dtype))
    w = tree["query"]
    large = {"a": jnp.ones((7, 2)), "b": jnp.full((2, 5), most.astype(jnp.float32) / 4)}
    over = w.map(w.base, lambda t: dataclasses.replace(t, **large))
    with pytest.raises(jlora.NonFiniteError, match="their sum"):
        jlora.merge({"query": over})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias", "rank 1"])
def test_float64_is_summed_in_float64(dtype, variant):
    """Merging, the report and the transform, whatever the dtype of the factors."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        params = {"query": {"kernel": rng.normal(size=(13, 11)), "bias": np.ones(11)}}
        params = jax.tree.map(jnp.asarray, params)
        rank = 1 if variant == "rank 1" else 3  # fused with the sum, and not
        options = {variant: True} if variant in ("dora", "lora_bias") else {}
        tree = jlora.lorafy(params, rank, ["query"], dtype=jnp.dtype(dtype), **options)
        tree = randomise(tree, jax.random.key(1))
        w = tree["query"]["kernel"]
        t = w.adapters[""]
        host = lambda x: np.asarray(x, np.float64)
        delta = float(t.scale) * host(t.a) @ host(t.b)
        kernel, bias = host(w.base) + delta, host(tree["query"]["bias"])
        if variant == "dora":
            kernel *= host(t.magnitude) / np.linalg.norm(kernel, axis=0)
            delta = kernel - host(w.base)
        if variant == "lora_bias":
            bias = bias + float(t.scale) * host(t.bias)

        merged, report = jlora.merge(tree, report=True)
        close = {"rtol": 1e-13, "atol": 1e-14}
        assert_close(merged["query"]["kernel"], jnp.asarray(kernel), **close)
        assert_close(merged["query"]["bias"], jnp.asarray(bias), **close)
        assert_close(w.merged(), jnp.asarray(kernel), **close)
        assert report[0].delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-13)
        assert report[0].max_error < 1e-14
        x = rng.normal(size=(2, 13))
        f = lambda p, x: x @ p["query"]["kernel"] + p["query"]["bias"]
        got = jax.jit(jlora.lora(f))(tree, x)
        assert_close(got, jnp.asarray(x @ kernel + bias), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_report_changes_no_bit(dtype, dora):
    tree = tree_of(dtype, dora=dora)
    merged, report = jlora.merge(tree, report=True)
    assert report[0].delta_norm > 0
    assert bits(merged) == bits(jlora.merge(tree))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x", "y"), P(None, "y"), P("x")])
def test_sharded_kernels_merge_where_they_lie(kind, spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
        dense = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)
        tree = jlora.lorafy({"query": put(dense)}, 2, ["query"])
        merged, _ = jlora.merge(tree, report=True)
        assert bits(merged) == bits(dense)  # B is zero
        where = tree["query"].base.sharding
        assert merged["query"].sharding.is_equivalent_to(where, 2)
        merged = jlora.merge(jax.tree.map(jnp.copy, tree), donate=True)
        assert bits(merged) == bits(dense)
        assert merged["query"].sharding.is_equivalent_to(where, 2)
        dense[5, 3] = np.nan  # the last device's
        tree["query"] = tree["query"].map(put(dense), lambda t: t)
        with pytest.raises(jlora.NonFiniteError, match="its base"):
            jlora.merge(tree)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_base_is_written_over(dtype, dora):
    tree = jax.tree.map(jnp.copy, tree_of(dtype, dora=dora))
    want = jlora.merge(tree)
    base = tree["query"]["kernel"].base
    place = base.unsafe_buffer_pointer()
    merged = jlora.merge(tree, donate=True)
    assert bits(merged) == bits(want)
    assert merged["query"]["kernel"].unsafe_buffer_pointer() == place
    assert base.is_deleted()
    assert not tree["query"]["bias"].is_deleted()


def test_a_base_that_stands_twice_is_not_donated(getkey):
    kernel = jax.random.normal(getkey(), (7, 5))
    params = {"query": {"kernel": kernel}, "copy": kernel}
    tree = randomise(jlora.lorafy(params, 2, ["query"]), getkey())
    tree["copy"] = tree["query"]["kernel"].base
    merged = jlora.merge(tree, donate=True)
    assert bits(merged["copy"]) == bits(tree["query"]["kernel"].base)
    w = tree["query"]["kernel"]
    again = jax.device_put(w.base, w.base.sharding)  # the same memory
    for both in ([w, w], [w, w.map(again, lambda t: t)]):
        merged = jlora.merge(both, donate=True)
        assert bits(merged[0]) == bits(merged[1])


def test_what_donating_cannot_do_is_refused():
    tree = jax.tree.map(jnp.copy, tree_of())
    for what in ("report", "undo"):
        with pytest.raises(jlora.StructureError, match="writes over"):
            jlora.merge(tree, donate=True, **{what: True})
    with pytest.raises(jlora.StructureError, match="donate_argnums"):
        jax.jit(lambda t: jlora.merge(t, donate=True))(tree)
    w = tree["query"]["kernel"]
    tree["query"]["kernel"] = w.map(w.base.at[0, 0].set(jnp.nan), lambda t: t)
    with pytest.raises(jlora.NonFiniteError, match="donated and are gone: load them"):
        jlora.merge(tree, donate=True)


def test_arrays_that_are_gone_are_named():
    tree = jax.tree.map(jnp.copy, tree_of())
    jlora.merge(tree, donate=True)
    with pytest.raises(jlora.StructureError, match="of 'query/kernel' is gone"):
        jlora.merge(tree)


def test_rows_of_a_donated_table_are_written_into_it(getkey):
    params = {"embed": {"embedding": jax.random.normal(getkey(), (7, 5))}}
    tree = randomise(
        jlora.lorafy(params, targets=[], trainable_tokens={"embed": [1, 4]}), getkey()
    )
    want, place = jlora.merge(tree), tree["embed"]["embedding"].base
    place = place.unsafe_buffer_pointer()
    merged = jlora.merge(tree, donate=True)
    assert bits(merged) == bits(want)
    assert merged["embed"]["embedding"].unsafe_buffer_pointer() == place


def test_kernels_of_one_shape_share_a_program(getkey):
    kernel = {"kernel": jax.random.normal(getkey(), (13, 11))}
    params = {f"layer_{i}": {"query": kernel, "value": kernel} for i in range(3)}
    tree = randomise(jlora.lorafy(params, 3, ["query", "value"]), getkey())
    program = _merge_kernels.merge_node
    before = program._cache_size()
    merged = jlora.merge(tree)
    assert program._cache_size() == before + 1
    for i in range(3):
        for name in ("query", "value"):
            w = tree[f"layer_{i}"][name]["kernel"]
            got = merged[f"layer_{i}"][name]["kernel"]
            assert_close(got, w.merged(), rtol=1e-6, atol=1e-6)


def test_merged_kernels_lie_where_their_bases_do(getkey):
    w = lowrank(getkey(), (7, 5))
    there = jax.device_put(w, jax.devices()[1])
    here = jax.device_put(w, jax.devices()[0])  # committed, as a user asked
    merged = jlora.merge({"w": w, "x": there, "y": here})
    assert bits(merged["w"]) == bits(merged["x"]) == bits(merged["y"])
    places = [(x.devices(), x.committed) for x in merged.values()]
    assert places == [(x.base.devices(), x.base.committed) for x in (w, there, here)]


@pytest.mark.parametrize("donate", [False, True])
def test_of_many_kernels_the_bad_one_is_named(getkey, donate):
    tree = {f"w{i}": lowrank(getkey(), (7, 5)) for i in range(5)}
    for name in ("w3", "w4"):
        w = tree[name]
        tree[name] = w.map(w.base.at[6, 4].set(jnp.inf), lambda t: t)
    with pytest.raises(jlora.NonFiniteError, match="'w3'"):
        jlora.merge(tree, donate=donate)


def test_merge_under_jit_and_of_stacks_and_slices(getkey):
    tree = {"w": lowrank(getkey(), (3, 7, 5), batch_axes=(0,), in_axes=(1,))}
    assert_close(jax.jit(jlora.merge)(tree), jlora.merge(tree), rtol=1e-6, atol=1e-6)
    t = tree["w"].adapters[""]
    want = tree["w"].base + jnp.einsum("l,lir,lro->lio", t.scale, t.a, t.b)
    assert_close(jlora.merge(tree)["w"], want, rtol=1e-5, atol=1e-5)
    with pytest.raises(jlora.StructureError, match="outside of jit"):
        jax.jit(lambda t: jlora.merge(t, report=True)[0])(tree)


def test_merge_inside_jit_of_a_tree_from_outside(getkey):
    tree = {"w": lowrank(getkey(), (7, 5))}
    assert_close(jax.jit(lambda: jlora.merge(tree))(), jlora.merge(tree), rtol=1e-6)
    with pytest.raises(jlora.StructureError, match="outside of jit"):
        jax.jit(lambda: jlora.merge(tree, report=True)[0])()
    with pytest.raises(jlora.StructureError, match="donate_argnums"):
        jax.jit(lambda: jlora.merge(tree, donate=True))()
    assert not tree["w"].base.is_deleted()


def lowered(w, platform):
    traced = _merge_kernels.merge_node.trace(w.base, _merge_kernels.without_base(w))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "rank"), [("cuda", 16), ("cpu", 8)])
def test_a_small_update_is_no_array_of_its_own(getkey, platform, rank):
    small, large = (lowrank(getkey(), (37, 31), rank=r) for r in (rank, rank + 1))
    checks = lowered(small, platform).count("dot_general")
    assert checks == (platform == "cpu")
    assert lowered(large, platform).count("dot_general") == checks + 1


@pytest.mark.parametrize(("dtype", "bytes_a_weight"), [("float32", 0), ("bfloat16", 1)])
def test_a_donated_merge_needs_little_memory(getkey, dtype, bytes_a_weight):
    """For factors, and for what the check of a narrow dtype says of each weight."""
    w = lowrank(getkey(), (370, 310), rank=8, dtype=dtype)
    step = _merge_kernels._merge_onto.lower(
        w.base, _merge_kernels.without_base(w)
    ).compile()
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes == w.base.nbytes
    assert memory.temp_size_in_bytes < (bytes_a_weight + 0.1) * w.base.size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_bad_weight_is_found_anywhere(dtype):
    x = jnp.full((67, 41), jnp.finfo(dtype).max, dtype)
    for where in ((0, 0), (66, 40), (31, 17)):
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            one = x.at[where].set(bad)
            for check in (_merge_kernels._is_finite, _merge_kernels._is_finite_on_cpu):
                assert jax.jit(check)(x)
                assert not jax.jit(check)(one)


@pytest.mark.parametrize("bad", [None, jnp.nan, jnp.inf])
def test_what_a_gpu_does_is_what_a_cpu_does(getkey, bad):
    # Of a rank that a GPU fuses and a CPU does not.
    w = lowrank(getkey(), (17, 13), rank=11, dtype=jnp.bfloat16)
    if bad is not None:
        w = w.map(w.base.at[6, 4].set(bad), lambda t: t)
    k = _merge_kernels
    gpu = jax.jit(lambda w: k._sum_and_check(w, w.dtype, k._is_finite, k._FUSED))
    merged, finite = gpu(w)
    want, also = k.merge_node(w.base, k.without_base(w))
    assert bool(finite) == bool(also) == (bad is None)
    assert_close(merged, want, rtol=2**-8)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7, 5), {}),
        ((3, 7, 5), {"batch_axes": (0,), "in_axes": (1,)}),
        ((3, 7, 5), {"in_axes": (0, 1)}),
        ((7, 2, 3, 5), {"in_axes": (0,)}),
    ],
)
def test_the_fused_update_is_the_update(getkey, shape, axes, dora):
    w = lowrank(getkey(), shape, rank=3, dora=dora, **axes)
    trainable, frozen = jlora.split({"w": w})

    def loss(trainable, **how):
        delta = jlora.combine(trainable, frozen)["w"].delta(**how)
        return jnp.sum(jnp.sin(delta)), delta

    grad = jax.grad(loss, has_aux=True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(grad(trainable, fuse_up_to=3), grad(trainable), **close)


def test_gradients_of_the_fused_update_are_products(getkey):
    """Two of them, and no pass over the kernel for each rank."""
    w = lowrank(getkey(), (7, 5), rank=3)

    def loss(a, b):
        changed = w.map(w.base, lambda t: dataclasses.replace(t, a=a, b=b))
        return jnp.sum(jnp.sin(changed.delta(fuse_up_to=3)))

    t = w.adapters[""]
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(t.a, t.b)
    names = [e.primitive.name for e in equations(jaxpr)]
    assert names.count("factor_product") == 2
    assert names.count("reduce_sum") == 1  # the loss


def test_the_fused_update_of_a_part_is_the_update(getkey):
    tree = jlora.lorafy({"c_attn": {"kernel": jnp.ones((4, 12))}}, 2, ["query"])
    w = randomise(tree, getkey())["c_attn"]["kernel"]
    assert list(w.adapters) == ["query"]
    assert_close(w.delta(fuse_up_to=3), w.delta(), rtol=1e-5, atol=1e-6)
    assert not np.any(w.delta(fuse_up_to=3)[:, 4:])


def test_merging_a_dropout_trees_keys_do_not_matter():
    tree = tree_of(dropout=0.5)
    on = jlora.with_dropout(tree, jax.random.key(0))
    assert bits(jlora.merge(on)) == bits(jlora.merge(tree))


# -- summary, survey -------------------------------------------------------------------


def test_summary_counts():
    s = jlora.summary(tree_of())
    assert s.trainable == 2 * 7 + 2 * 5 + 15
    assert s.total == 35 + 5 + 5 + s.trainable
    assert s.trainable_bytes == 4 * s.trainable
    assert "head/kernel" in str(s)
    assert f"{s.trainable:,} of {s.total:,}" in str(s)


def test_summary_puts_repeated_layers_in_one_line():
    params = {f"layers_{i}": {"query": jnp.zeros((7, 5))} for i in range(12)}
    text = str(jlora.summary(jlora.lorafy(params, 2, ["query"])))
    assert text.count("query") == 1
    assert "layers_*/query" in text


def test_survey_reads_uses_through_layout_and_control_flow():
    params = {
        "stack": jnp.zeros((3, 7, 7)),
        "heads": jnp.zeros((7, 2, 5)),
        "tied": jnp.zeros((11, 7)),
        "scale": jnp.ones(7),
        "bias": jnp.ones(7),
        "exp": jnp.ones((2, 2)),
        "unused": jnp.ones((2, 2)),
        "either": jnp.zeros((7, 7)),
    }

    def f(p, ids):
        x = p["tied"][ids] * p["scale"] + p["bias"]
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.T), None))
        x, _ = jax.lax.scan(step, x, p["stack"])
        x = jax.lax.cond(x[0, 0] > 0, lambda: x @ p["either"], lambda: x)
        y = x @ p["heads"].reshape(7, 10)
        return y, jax.jit(lambda x, t: x @ t.T)(x, p["tied"]), jnp.exp(p["exp"])

    s = jlora.survey(f, params, jnp.array([1, 2, 3]))
    axes = lambda n: s.axes(n)
    assert axes("stack") == ((2,), (1,), (0,), False)
    assert axes("heads") == ((0,), (1, 2), (), False)
    assert axes("tied") == ((0,), (1,), (), True)
    assert axes("either") == ((0,), (1,), (), False)
    assert [u.kind for u in s.leaves["tied"].uses] == ["gather", "matmul"]
    assert [u.flops for u in s.leaves["stack"].uses] == [3 * 2 * 3 * 7 * 7]
    assert sorted(s.matmul_kernels()) == ["either", "heads", "stack"]
    assert not any(s.is_kernel(n) for n in ("scale", "bias", "exp", "unused"))
    assert s.leaves["exp"].uses[0].primitive == "exp"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    again = jlora.survey(f, shapes, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert again == s
    tree = jlora.lorafy(params, 2, "all-linear", survey=s)
    assert tree["stack"].adapters[""].a.shape == (3, 7, 2)


@given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=4), st.integers(0, 99))
def test_reshape_groups_pair_equal_sizes(old, seed):
    rng = np.random.default_rng(seed)
    new, rest = [], int(np.prod(old))
    while rest > 1:
        new.append(int(rng.choice([d for d in (1, 2, 3, 4) if rest % d == 0])))
        rest //= new[-1]
    groups = reshape_groups(old, new)
    assert [d for left, _ in groups for d in left] == list(range(len(old)))
    assert [d for _, right in groups for d in right] == list(range(len(new)))
    for left, right in groups:
        assert np.prod([old[d] for d in left]) == np.prod([new[d] for d in right])


def test_what_is_trained_is_looked_up_for_trees_of_one_structure(monkeypatch):
    def lorafied(name):
        return jlora.lorafy({name: jnp.ones((3, 2))}, 1, [name])

    first = jlora.split(lorafied("w"))
    monkeypatch.setattr(jlora._tree.partition, "labels", None)
    again = jlora.split(lorafied("w"))
    assert jax.tree.structure(again) == jax.tree.structure(first)


def test_halves_of_a_tree_whose_structure_has_no_hash():
    @jax.tree_util.register_pytree_node_class
    class Noted:
        def __init__(self, x):
            self.x = x

        def tree_flatten(self):
            return [self.x], ["no", "hash"]

        @classmethod
        def tree_unflatten(cls, notes, children):
            return cls(*children)

    tree = [Noted(jnp.ones(2)), jlora.lorafy({"w": jnp.ones((3, 2))}, 1, ["w"])]
    half, frozen = jlora.split(tree)
    assert (half[0].x, frozen[1]["w"].adapters[""].a) == (None, None)
    assert jlora.combine(half, frozen)[1]["w"].base is tree[1]["w"].base
