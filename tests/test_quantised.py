"""Quantised kernels: codes, sizes, and that nothing dense is kept."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._kernel import codebooks
from jlora._kernel.quantized import Layout, Quantized
from tests.tools import assert_close, randomise, result_shapes, scalar

FORMS = ["int8", "nf4", "fp4", "fp8"]


def kernel(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.5, shape), jnp.float32)


def bytes_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def blocks_of(w, form, block):
    """What shares a statistic, [rows, blocks, block], of a kernel [in, out]."""
    rows = np.asarray(w).T
    return rows.reshape(len(rows), -1, block if form in ("nf4", "fp4") else w.shape[0])


@pytest.mark.parametrize("form", FORMS)
def test_each_weight_is_the_nearest_number_of_its_block(form):
    w = kernel((96, 7)).at[:, 3].set(0).at[5, 2].set(4)
    block = {"block": 32} if form in ("nf4", "fp4") else {}
    q = jlora.quantize({"w": w}, form, targets=["w"], double=False, **block)["w"]
    assert (q.shape, q.dtype, q.ndim) == (w.shape, w.dtype, 2)
    got, want = blocks_of(q.dense(), form, 32), blocks_of(w, form, 32)
    largest = np.abs(want).max(-1, keepdims=True)
    if form in ("nf4", "fp4"):
        numbers = codebooks.four_bits(form)
    elif form == "int8":
        numbers = np.arange(-127, 128) / 127
    else:
        every = jax.lax.bitcast_convert_type(
            jnp.arange(256, dtype=jnp.uint8), "float8_e4m3fn"
        )
        numbers = np.asarray(every, np.float32)
        numbers = numbers[np.isfinite(numbers)] / 448
    scaled = want / np.where(largest, largest, 1)
    nearest = np.abs(scaled[..., None] - numbers).min(-1)
    error = np.abs(got - want) / np.where(largest, largest, 1)
    np.testing.assert_allclose(error, nearest, atol=2e-6)
    assert (got == 0).all(-1).any(), "a column of zeros stays"


def test_sizes():
    w = {"w": kernel((512, 256))}
    size = lambda *args, **kw: (
        bytes_of(jlora.quantize(w, *args, targets=["w"], **kw)) / bytes_of(w)
    )
    assert size("int8") <= 0.27
    assert size("fp8") <= 0.27
    assert size("nf4") <= 0.14
    assert 0.14 < size("nf4", double=False) <= 0.15
    assert size("nf4", block=128, double=False) < size("nf4", double=False)
    half = {"w": w["w"].astype(jnp.bfloat16)}
    q = jlora.quantize(half, "nf4", targets=["w"])
    assert jlora.dequantize(q)["w"].dtype == jnp.bfloat16


def test_double_quantisation_loses_little_and_each_layer_is_its_own():
    w = kernel((3, 128, 640)) * jnp.asarray([1, 10, 0.1])[:, None, None]
    spec = {"w": jlora.Target(in_axes=(1,), batch_axes=(0,))}
    q = jlora.quantize({"w": w}, "nf4", targets=spec)["w"]
    single = jlora.quantize({"w": w}, "nf4", targets=spec, double=False)["w"]
    assert q.nested_absmax.shape == (3, math.ceil(2 * 640 / 256))
    np.testing.assert_array_equal(q.codes, single.codes)
    off = jnp.max(jnp.abs(q.dense() - single.dense()), axis=(1, 2))
    assert (off > 0).all()
    assert (off < 0.02 * jnp.max(jnp.abs(w), axis=(1, 2))).all()
    np.testing.assert_allclose(q.single().dense(), q.dense(), atol=1e-6)
    one = jlora.quantize({"w": w[1]}, "nf4", targets=["w"])["w"]
    for name in ("codes", "absmax", "nested_absmax"):
        np.testing.assert_allclose(getattr(q, name)[1], getattr(one, name), rtol=1e-6)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_codes_lie_along_what_makes_one_output(form):
    """Of every layout, a kernel of one column is the column quantised alone."""
    col = kernel((64,))
    alone = jlora.quantize({"w": col[:, None]}, form, targets=["w"], double=False)[
        "w"
    ].dense()[:, 0]
    layouts = {
        "a": (col.reshape(64, 1, 1), jlora.Target(in_axes=(0,))),
        "b": (col.reshape(2, 32, 1), jlora.Target(in_axes=(0, 1))),
        "c": (col.reshape(1, 64, 1), jlora.Target(in_axes=(1,), batch_axes=(0,))),
        "d": (col.reshape(1, 2, 32), jlora.Target(in_axes=(1, 2))),
    }
    tree = {name: w for name, (w, _) in layouts.items()}
    q = jlora.quantize(
        tree, form, targets={n: t for n, (_, t) in layouts.items()}, double=False
    )
    for x in jax.tree.leaves(jlora.dequantize(q)):
        np.testing.assert_allclose(x.reshape(-1), alone, rtol=1e-6)
    table = {"embedding": kernel((5, 64)).at[2].set(col)}
    q = jlora.quantize(table, form, targets=["embedding"], double=False)["embedding"]
    np.testing.assert_allclose(q.dense()[2], alone, rtol=1e-6)
    assert q.codes.shape[0] == 5


# -- in functions ----------------------------------------------------------------------


def scanned(p, x):
    """Layers one after the other, cast as a training step does it."""

    def body(x, w):
        up = jnp.tanh(x @ w["up"]["kernel"].astype(x.dtype))
        return x + up @ w["down"]["kernel"].astype(x.dtype), None

    return jax.lax.scan(jax.checkpoint(body), x, p["layers"])[0]


def stack(L=3, d=64, wide=128):
    return {
        "layers": {
            "up": {"kernel": kernel((L, d, wide), 1)},
            "down": {"kernel": kernel((L, wide, d), 2)},
            "norm": {"scale": jnp.ones((L, d))},
        }
    }


def both(tree):
    """A lorafied tree on codes, and the same adapters on what the codes say."""
    tree = randomise(tree, jax.random.key(3))
    return tree, jlora.dequantize(tree)


@pytest.mark.parametrize(("form", "dora"), [("nf4", True), ("int8", False)])
def test_training_is_that_on_the_dequantised_base(form, dora):
    tree = jlora.lorafy(jlora.quantize(stack(), form), 4, ["up", "down"], dora=dora)
    assert isinstance(tree["layers"]["up"]["kernel"].base, Quantized)
    quantised, dense = both(tree)
    x = kernel((5, 64), 4)
    f = jlora.lora(scanned)

    def run(tree):
        half, frozen = jlora.split(tree)
        return jax.value_and_grad(lambda t: scalar(f(jlora.combine(t, frozen), x)))(
            half
        )

    got, want = jax.jit(run)(quantised), jax.jit(run)(dense)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4 * float(1 + jnp.abs(w).max()))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1])) > 0.1
    formed = result_shapes(run, quantised)
    assert not {(3, 64, 128), (3, 128, 64)} & {*formed}, "a dense stack is formed"
    assert (64, 128) in formed


def test_a_backward_pass_makes_the_kernel_again():
    p = {"w": kernel((64, 96))}
    tree = jlora.lorafy(jlora.quantize(p, "nf4", targets=["w"]), 2, ["w"])
    tree = randomise(tree, jax.random.key(0))
    f = jlora.lora(lambda p, x: jnp.tanh(jnp.tanh(x) @ p["w"]))

    def saved(tree):
        half, frozen = jlora.split(tree)

        def run(half, x):
            return f(jlora.combine(half, frozen), x)

        _, pull = jax.vjp(run, half, kernel((5, 64), 1))
        return [x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape")]

    assert not {(64, 96), (96, 64)} & {*saved(tree)}
    assert (64, 96) in saved(jlora.dequantize(tree)), "a test of nothing"


def test_the_memory_of_a_scanned_step_holds_no_dense_stack():
    tree = jlora.lorafy(jlora.quantize(stack(8), "nf4"), 4, ["up", "down"])
    half, frozen = jlora.split(tree)
    f = jlora.lora(scanned)

    @jax.jit
    def step(half, frozen, x):
        return jax.grad(lambda t: scalar(f(jlora.combine(t, frozen), x)))(half)

    made = step.lower(half, frozen, kernel((5, 64))).compile().memory_analysis()
    dense = bytes_of(jlora.dequantize(frozen))
    assert made.temp_size_in_bytes < dense / 2
    assert made.argument_size_in_bytes < dense / 4


def uses(p, ids, x):
    """A kernel cast, transposed, reshaped, taken from a stack, convolved, looked up."""
    table = p["table"]["embedding"]
    h = table[ids] + x
    h = h @ p["w"]["kernel"].T.astype(jnp.bfloat16).astype(jnp.float32)
    h = jnp.einsum("bti,ihk->bthk", h, p["heads"])
    h = jnp.einsum("bthk,hko->bto", h, p["out"])
    h = h @ p["stack"]["kernel"][1] + jnp.take(p["stack"]["kernel"], 0, axis=0).sum(0)
    h = h @ p["w"]["kernel"][:, :64].reshape(8, 8, 64).reshape(64, 64)
    h = jax.lax.conv_general_dilated(
        h, p["conv"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
    )
    h = jax.jit(
        lambda w, h: jax.lax.cond(h[0, 0, 0] > 0, lambda: h @ w, lambda: -(h @ w))
    )(p["w"]["kernel"], h)
    return h @ table.T


def test_every_use_of_a_quantised_kernel():
    p = {
        "table": {"embedding": kernel((11, 64))},
        "w": {"kernel": kernel((64, 64), 1)},
        "heads": kernel((64, 4, 16), 2),
        "out": kernel((4, 16, 64), 3),
        "stack": {"kernel": kernel((2, 64, 64), 4)},
        "conv": kernel((3, 64, 64), 5),
    }
    targets = {
        "embedding": jlora.Target(),
        "w/kernel": jlora.Target(),
        "heads": jlora.Target(in_axes=(0,)),
        "out": jlora.Target(in_axes=(0, 1)),
        "stack/kernel": jlora.Target(in_axes=(1,), batch_axes=(0,)),
        "conv": jlora.Target(in_axes=(0, 1)),
    }
    q = jlora.quantize(p, "nf4", targets=targets)
    ids, x = jnp.asarray([[1, 7, 2]]), kernel((1, 3, 64), 6)
    f = jax.jit(jlora.lora(uses))
    got, want = f(q, ids, x), jax.jit(uses)(jlora.dequantize(q), ids, x)
    np.testing.assert_allclose(
        got, want, rtol=2e-4, atol=2e-4 * float(jnp.abs(want).max())
    )
    # An adapter on the quantised kernels, dropout and all.
    tree, dense = both(
        jlora.lorafy(
            q,
            2,
            {k: t for k, t in targets.items() if k in ("heads", "out", "conv")},
            dropout=0.3,
        )
    )
    key = jax.random.key(8)
    got, want = (f(jlora.with_dropout(t, key), ids, x) for t in (tree, dense))
    np.testing.assert_allclose(
        got, want, rtol=2e-4, atol=2e-4 * float(jnp.abs(want).max())
    )
    shapes = result_shapes(jlora.lora(lambda p: p["stack"]["kernel"][1]), q)
    assert (2, 64, 64) not in shapes, "a layer is cut out of the codes"


def test_quantised_kernels_fail_loudly_without_lora():
    q = jlora.quantize({"w": kernel((64, 2))}, "int8", targets=["w"])
    for use in (lambda w: w + 1, lambda w: jnp.ones(64) @ w, lambda w: w.T, np.asarray):
        with pytest.raises(jlora.UnmergedError, match=r"quantised kernel 'w'"):
            use(q["w"])
    back = jlora.lora(lambda p: (p["w"], p["w"].T))(q)
    assert isinstance(back[0], Quantized)
    np.testing.assert_array_equal(back[1], q["w"].dense().T)


# -- in trees --------------------------------------------------------------------------


def test_before_lorafy_and_after_it():
    p = stack()
    first = jlora.lorafy(jlora.quantize(p, "nf4"), 2, ["up"])
    later = jlora.quantize(jlora.lorafy(p, 2, ["up"]), "nf4")
    assert jax.tree.structure(first) == jax.tree.structure(later)
    assert_close(first, later)
    assert repr(first["layers"]["up"]["kernel"]) == (
        "LowRank('layers/up/kernel', nf4 of float32[3, 64, 128], rank 2, scale 1)"
    )
    names = [
        str(p[-1])
        for p, _ in jax.tree_util.tree_leaves_with_path(later["layers"]["up"])
    ]
    assert names[:4] == [".codes", ".absmax", ".nested_absmax", ".offset"]
    shapes = jax.eval_shape(
        lambda p: jlora.lorafy(jlora.quantize(p, "nf4"), 2, ["up"]), p
    )
    abstract = jax.eval_shape(lambda: p)
    abstract = jlora.lorafy(jlora.quantize(abstract, "nf4"), 2, ["up"])
    assert [x.shape for x in jax.tree.leaves(abstract)] == [
        x.shape for x in jax.tree.leaves(first)
    ]
    assert jax.tree.structure(shapes) == jax.tree.structure(abstract)


def test_partition_mask_and_summary():
    p = stack()
    tree = jlora.lorafy(jlora.quantize(p, "nf4"), 2, ["up"])
    half, frozen = jlora.split(tree)
    assert_close(jlora.combine(half, frozen), tree)
    assert {str(x) for x in jax.tree.leaves(jlora.labels(tree))} == {"a", "b", "frozen"}
    found = jlora.summary(tree)
    assert found.total - found.trainable == sum(x.size for x in jax.tree.leaves(p))
    scales = 3 * 4
    assert found.total_bytes == bytes_of(tree) - scales
    with pytest.raises(jlora.StructureError, match="nothing in this tree is trained"):
        jlora.split(jlora.quantize(p, "nf4"))


def test_a_quantised_tree_without_adapters_stops_no_gradient():
    q = jlora.quantize({"w": {"kernel": kernel((64, 3)), "bias": jnp.ones(3)}}, "int8")
    f = jlora.lora(lambda p, x: x @ p["w"]["kernel"] + p["w"]["bias"])
    loss = lambda bias: scalar(f({"w": {**q["w"], "bias": bias}}, kernel((2, 64))))
    assert jnp.abs(jax.grad(loss)(jnp.ones(3))).min() > 0


def test_merging():
    tree = jlora.lorafy(jlora.quantize(stack(), "int8"), 2, ["up"])
    tree, dense = both(tree)
    merged, report, undo = jlora.merge(tree, report=True, undo=True)
    assert_close(merged, jlora.merge(dense), rtol=1e-5, atol=1e-5)
    assert jlora.unmerge(merged, undo) is tree
    assert all(m.lost < 1e-6 for m in report)
    again, report = jlora.merge(tree, report=True, requantize=True)
    up, down = (again["layers"][n]["kernel"] for n in ("up", "down"))
    assert down is tree["layers"]["down"]["kernel"], "without an adapter, as it is"
    assert up.layout == tree["layers"]["up"]["kernel"].base.layout
    assert 1e-3 < report[0].lost < 0.5
    step = up.absmax[:, None] / 127
    assert (jnp.abs(up.dense() - merged["layers"]["up"]["kernel"]) <= 0.51 * step).all()
    assert_close(jax.jit(jlora.merge)(tree), merged, rtol=1e-5, atol=1e-5)
    assert_close(jlora.merge(tree, donate=True), merged, rtol=1e-5, atol=1e-5)
    broken = jax.tree.map(lambda x: x, tree)
    up = broken["layers"]["up"]["kernel"]
    bad = dataclasses.replace(up.base, absmax=up.base.absmax.at[0, 0].set(jnp.nan))
    broken["layers"]["up"]["kernel"] = dataclasses.replace(up, base=bad)
    with pytest.raises(jlora.NonFiniteError, match="its base"):
        jlora.merge(broken)


def test_errors():
    p = {"w": {"kernel": kernel((96, 4)), "steps": jnp.arange(6).reshape(2, 3)}}

    def refused(error, match, *args, tree=p, **kw):
        with pytest.raises(error, match=match):
            jlora.quantize(tree, *args, **kw)

    refused(jlora.OptionError, "expected 'int8', 'nf4', 'fp4' or 'fp8'", "nf5")
    refused(jlora.OptionError, "expected 'int8'", None)
    refused(jlora.OptionError, "has no such argument", "nf4", blocksize=64)
    refused(jlora.OptionError, "one scale", "int8", block=64)
    refused(jlora.OptionError, "an even number", "nf4", block=31)
    refused(jlora.OptionError, "double='yes'", "nf4", double="yes")
    refused(jlora.ShapeError, r"rows of 96 weights.*\n.*block=32 fits it", "nf4")
    refused(jlora.DtypeError, "only floating-point", "int8", targets=["w/steps"])
    refused(jlora.TargetError, "hits nothing", "int8", targets=["v"])
    q = jlora.quantize(p, "int8")
    refused(jlora.TargetError, "is int8 already", "int8", tree=q)
    full = jlora.lorafy(p, 2, [], train=["w/kernel"])
    refused(jlora.TargetError, "is trained as it is", "int8", tree=full)
    with pytest.raises(jlora.DtypeError, match="codes cannot be trained"):
        jlora.lorafy(q, 2, [], train=["w/kernel"])
    last = {"w": kernel((64, 3, 64))}
    spec = {"w": jlora.Target(in_axes=(0,), batch_axes=(1,))}
    refused(jlora.ShapeError, "Move the stack", "nf4", tree=last, targets=spec)


def test_a_row_that_no_block_divides_is_read():
    """Files may hold blocks that run from one row into the next, and a half byte."""
    numbers, codes = codebooks.four_bits("nf4"), np.arange(15) % 16
    packed = np.append(codes, 0).reshape(-1, 2)
    packed = jnp.asarray(packed[:, 0] * 16 + packed[:, 1], jnp.uint8)
    layout = Layout("nf4", jnp.dtype("float32"), 4, (), (-1, -2), (3, 5))
    absmax = jnp.asarray([1.0, 2, 3, 4])
    q = Quantized(packed, absmax, None, None, layout)
    want = (numbers[codes] * np.repeat(absmax, 4)[:15]).reshape(3, 5).T
    assert q.shape == (5, 3)
    np.testing.assert_allclose(q.dense(), want)
