"""Merging with stochastic rounding, the report's figures, undo of every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import lowrank, randomise

import jlora
from jlora._kernel.rounding import rounded_at_random, steps_between
from jlora._tree import merge_kernels

NARROW = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def every_number(dtype):
    """All finite numbers of a dtype of at most 16 bits, in order, zero once."""
    width = 8 * jnp.dtype(dtype).itemsize
    all_bits = jnp.arange(2**width, dtype=jnp.uint32).astype(f"uint{width}")
    x = np.asarray(jax.lax.bitcast_convert_type(all_bits, jnp.dtype(dtype)))
    x = x[np.isfinite(x.astype(np.float32)) & (all_bits != 2 ** (width - 1))]
    # By their bits: a library may have had the processor take subnormals for zero.
    bits = x.view(f"int{width}").astype(np.int64)
    return x[np.argsort(np.where(bits < 0, -(2 ** (width - 1)) - bits, bits))]


@pytest.mark.parametrize("dtype", NARROW)
def test_of_two_neighbours_one_is_taken_and_the_mean_is_exact(dtype):
    """Between all neighbours of the dtype, subnormals and binades among them."""
    numbers = every_number(dtype)
    wide = numbers.astype(np.float32)
    low, high = wide[:-1], wide[1:]
    at = np.random.default_rng(0).uniform(0.05, 0.95, low.shape)
    x = jnp.asarray((low + at * (high - low)).astype(np.float32))
    keys = jax.random.split(jax.random.key(0), n := 400)
    # CPUs take float32's smallest numbers, subnormal there too, for zero.
    normal = np.minimum(np.abs(low), np.abs(high)) > 1e-34

    @jax.jit
    def totals(x):
        def one(total, key):
            y = rounded_at_random(x, jnp.dtype(dtype), key).astype(jnp.float32)
            return (total[0] + (y == high), total[1] & ((y == low) | (y == high))), None

        start = jnp.zeros(x.shape), jnp.ones(x.shape, bool)
        return jax.lax.scan(one, start, keys)[0]

    ups, neighbours = totals(x)
    assert np.all(neighbours[normal])
    share = (np.asarray(x) - low) / (high - low)  # of ups, that is, at
    off = (ups / n - share) * np.sqrt(n / (share * (1 - share)))  # in standard errors
    off = off[normal]
    assert abs(np.mean(off)) < 5 / np.sqrt(len(off))
    assert np.max(np.abs(off)) < 6
    assert 0.85 < np.std(off) < 1.15


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_of_the_dtype_stay_and_the_largest_is_not_left_for_infinity(dtype):
    numbers = jnp.asarray(every_number(dtype))
    wide = numbers.astype(jnp.float32)
    f = jax.jit(lambda x, key: rounded_at_random(x, numbers.dtype, key))
    kept = f(wide, jax.random.key(0))
    normal = (jnp.abs(wide) > 1e-34) | (wide == 0)
    assert bits(kept[normal]) == bits(numbers[normal])
    most = float(numbers[-1])
    over = jnp.full(500, most * (1 + 2.0 ** -(jnp.finfo(dtype).nmant + 2)), jnp.float32)
    assert jnp.all(f(over, jax.random.key(1)).astype(jnp.float32) == most)
    bad = f(jnp.array([jnp.nan, jnp.inf]), jax.random.key(1)).astype(jnp.float32)
    assert not jnp.any(jnp.isfinite(bad))


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
def test_steps_count_the_numbers_between(dtype):
    if dtype == "float32":
        x = np.array([-3e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 3e38], np.float32)
        ups = np.nextafter(x, np.float32(np.inf))
        assert np.all(steps_between(x, ups) == 1)
        assert np.all(steps_between(ups, x) == 1)
        ends = float(steps_between(x[0], x[-1]))
        assert ends == pytest.approx(2.0 * x[-1:].view(np.int32)[0], rel=1e-6)
    numbers = jnp.asarray(every_number(dtype if dtype != "float32" else "float16"))
    count = jnp.arange(len(numbers), dtype=jnp.float32)
    assert np.array_equal(steps_between(numbers, numbers[:1]), count)
    assert not jnp.any(steps_between(-jnp.zeros(1, dtype), jnp.zeros(1, dtype)))


def drowning(dtype=jnp.bfloat16, n=64):
    """An update that is small beside the weights."""
    base = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    tree = jlora.lorafy({"query": base, "bias": jnp.ones(n, dtype)}, 2, ["query"])
    mask = jlora.trainable_mask(tree)
    return jax.tree.map(lambda x, m: jnp.full_like(x, 0.01) if m else x, tree, mask)


def test_a_small_update_survives_in_the_mean():
    """On average over weights, each of which moves by many times the update or not."""
    tree = drowning()
    base, delta = (
        np.asarray(x, np.float64) for x in (tree["query"].base, tree["query"].delta())
    )
    moved = lambda merged: np.mean(np.asarray(merged["query"], np.float64) - base)
    _, report = jlora.merge(tree, report=True)
    key = jax.random.key(7)
    merged, other = jlora.merge(tree, report=True, rounding="stochastic", key=key)
    want, error = (
        np.mean(delta),
        np.std(np.asarray(merged["query"], np.float64) - base) / 64,
    )
    assert abs(moved(merged) - want) < 5 * error < 0.5 * want
    assert report[0].unchanged > other[0].unchanged
    assert other[0].ulps > 0
    assert bits(merged) == bits(jlora.merge(tree, rounding="stochastic", key=key))
    again = jlora.merge(tree, rounding="stochastic", key=jax.random.key(8))
    assert bits(merged) != bits(again)
    jitted = jax.jit(lambda t, k: jlora.merge(t, rounding="stochastic", key=k))
    assert bits(jitted(tree, key)) == bits(merged)
    undone, undo = jlora.merge(tree, undo=True, rounding="stochastic", key=key)
    assert bits(jlora.unmerge(undone, undo)) == bits(tree)


def test_kernels_have_random_numbers_of_their_own_and_float32_needs_none():
    one = drowning()["query"]
    merged = jlora.merge(
        {"x": one, "y": one}, rounding="stochastic", key=jax.random.key(0)
    )
    assert bits(merged["x"]) != bits(merged["y"])
    tree = drowning(jnp.float32)
    key = jax.random.key(0)
    assert bits(jlora.merge(tree, rounding="stochastic", key=key)) == bits(
        jlora.merge(tree)
    )


def test_rounding_and_key_belong_together():
    tree = drowning()
    for wrong in ({"rounding": "stochastic"}, {"key": jax.random.key(0)}, {"rounding": "up"},
                  {"rounding": "stochastic", "key": 3}):  # fmt: skip
        with pytest.raises(jlora.OptionError, match=r"rounding|key"):
            jlora.merge(tree, **wrong)


def test_the_report_is_the_definition():
    tree = drowning()
    merged, (leaf,) = jlora.merge(tree, report=True)
    base, delta, got = (
        np.asarray(x, np.float64)
        for x in (tree["query"].base, tree["query"].delta(), merged["query"])
    )
    error = np.linalg.norm(got - base - delta)
    assert leaf.relative_error == pytest.approx(
        error / np.linalg.norm(base + delta), rel=1e-3
    )
    # Weights within a binade: steps are differences over the spacing there.
    spacing = 2.0 ** (np.floor(np.log2(np.abs(base))) - 7)
    inside = np.floor(np.log2(np.abs(base))) == np.floor(np.log2(np.abs(got)))
    steps = np.asarray(steps_between(tree["query"].base, merged["query"]), np.float64)
    assert np.array_equal(steps[inside], (np.abs(got - base) / spacing)[inside])
    assert leaf.ulps == pytest.approx(np.mean(steps), rel=1e-5)
    printed = str(jlora.merge(tree, report=True)[1])
    assert "ulps" in printed
    assert "relative error" in printed


TOKENS = {"embed": [2, 4]}


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        ("float32", {}, 5),
        ("bfloat16", {"dora": True}, 5),
        ("float16", {"trainable_tokens": TOKENS}, 5),
        ("float8_e4m3fn", {"dora": True}, 5),
        ("float8_e5m2", {"lora_bias": True}, 8),
    ],
)
def test_undo_is_exact_for_every_dtype_and_variant(dtype, options, most):
    """Linear, fused, stacked, table and convolution kernels."""
    rng = np.random.default_rng(0)
    shapes = {
        "q": {"kernel": (7, 5), "bias": (5,)},
        "c_attn": {"kernel": (7, 15), "bias": (15,)},
        "layers": {"kernel": (2, 7, 5), "bias": (2, 5)},
        "conv": {"kernel": (3, 2, 7, 5), "bias": (5,)},
        "embed": {"embedding": (11, 7)},
    }
    make = lambda s: jnp.asarray(rng.normal(size=s), dtype)
    params = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    targets = {
        "q": jlora.Target(), "value": jlora.Target(),
        "layers/kernel": jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
        "conv/kernel": jlora.Target(in_axes=(0, 1, 2), out_axes=(3,)),
    }  # fmt: skip
    if not {"lora_bias", "trainable_tokens"} & {*options}:
        targets["embed"] = jlora.Target()
    tree = randomise(jlora.lorafy(params, 3, targets, **options), jax.random.key(1))
    merged, undo = jlora.merge(tree, undo=True)
    assert sum(x != y for x, y in zip(bits(merged), bits(params), strict=True)) == most
    back = jlora.unmerge(merged, undo)
    assert bits(back) == bits(tree)
    assert bits(jlora.merge(back)) == bits(merged)


@pytest.mark.parametrize("dtype", NARROW)
def test_an_update_of_zero_leaves_every_number_of_the_dtype(dtype):
    """Subnormal ones too, of which float16 has those below 6e-5."""
    base = jnp.asarray(every_number(dtype))
    base = base[jnp.abs(base.astype(jnp.float32)) > 1e-37 * (dtype == "bfloat16")]
    tree = jlora.lorafy({"query": base[None, :]}, 1, ["query"])
    assert bits(jlora.merge(tree)) == bits(base)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", AxisType.Auto), ("bfloat16", AxisType.Explicit)]
)
def test_sharded_kernels_are_gathered_nowhere(dtype, kind):
    """Of every variant: neither kernels nor factors; only flags and norms are summed."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    key = None if dtype == "float32" else jax.random.key(3)
    with jax.set_mesh(mesh):
        put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
        for spec, shape, batch in (
            (P("x", "y"), (8, 6), ()),
            (P("x", None, "y"), (2, 7, 6), (0,)),
        ):
            w = lowrank(jax.random.key(0), shape, rank=3, dtype=jnp.dtype(dtype), dora=not batch,
                        in_axes=(len(batch),), batch_axes=batch)  # fmt: skip
            there = jlora.lorafy(
                {"w": put(w.base, spec)}, 3, {"w": jlora.Target(in_axes=(len(batch),), batch_axes=batch)},
                dora=not batch,
            )["w"]  # fmt: skip
            sharded = jax.tree.map(lambda x, y: put(x, y.sharding.spec), w, there)
            program = merge_kernels.merge_node.lower(
                sharded.base, merge_kernels.without_base(sharded), key
            ).compile()
            text = program.as_text()
            assert "all-gather" not in text
            assert "all-to-all" not in text
            options = {} if key is None else {"rounding": "stochastic", "key": key}
            merged = jlora.merge({"w": sharded}, **options)["w"]
            assert merged.sharding.is_equivalent_to(sharded.base.sharding, w.ndim)
            want = jlora.merge({"w": w}, **options)["w"]
            off = np.asarray(steps_between(jnp.asarray(np.asarray(merged)), want))
            assert np.max(off) <= (4 if dtype == "float32" else 1)
            assert np.mean(off > 0) < 0.5


@pytest.mark.parametrize("base", ["float32", "float16"])
def test_another_dtype_is_rounded_to_once(base, getkey):
    plain = {
        "dense": {
            "kernel": jax.random.normal(getkey(), (97, 61)).astype(base),
            "bias": jax.random.normal(getkey(), (61,)).astype(base),
        },
        "table": jax.random.normal(getkey(), (9, 3)).astype(base),
        "norm": jax.random.normal(getkey(), (89,)).astype(base),
        "steps": jnp.arange(3),
    }
    tree = jlora.lorafy(
        plain, 2, ["dense"], lora_bias=True, trainable_tokens={"table": [2, 4]}
    )
    tree = randomise(tree, getkey())
    got, report = jlora.merge(tree, report=True, dtype="bfloat16")
    wide = jlora.merge(tree, dtype=jnp.float32)
    assert wide["dense"]["kernel"].dtype == jnp.float32
    want = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, wide
    )
    assert bits(got) == bits(want)
    assert got["steps"].dtype == jnp.int32
    twice = jlora.merge(tree)["dense"]["kernel"].astype(jnp.bfloat16)
    if base == "float16":  # the sum in float16 is rounded a first time there
        assert jnp.any(twice != got["dense"]["kernel"])
    (kernel,) = [leaf for leaf in report if leaf.path == "dense/kernel"]
    x = tree["dense"]["kernel"]
    error = got["dense"]["kernel"].astype(jnp.float32) - x.value()
    assert kernel.max_error == pytest.approx(float(jnp.abs(error).max()), rel=1e-3)
    assert 0 < kernel.lost < 0.1
    jitted = jax.jit(lambda tree: jlora.merge(tree, dtype="bfloat16"))(tree)
    assert bits(jitted) == bits(want)


def test_dtypes_that_no_merged_tree_can_have():
    tree = jlora.lorafy({"w": jnp.ones((4, 3))}, 1, ["w"])
    for dtype in ("int8", "fp33", jnp.int32):
        with pytest.raises(jlora.OptionError, match="of floating-point numbers"):
            jlora.merge(tree, dtype=dtype)
    with pytest.raises(jlora.OptionError, match="Leave one of the two out"):
        jlora.merge(tree, dtype="float32", requantize=True)
    # A base of another dtype is no room for the merged kernel.
    jlora.merge(tree, dtype="bfloat16", donate=True)
    assert not tree["w"].base.is_deleted()
