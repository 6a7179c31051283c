"""What has to hold on a GPU: `python -m pytest -m gpu`, a minute or two.

The reference is the same program on the machine's CPU, or the dense formula. Products
of float32 are made of TF32 on a GPU unless precision is asked for; both are tested, with
the tolerance that each deserves. Without a GPU the tests run on the CPU, and so are
known to work before there is one.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import inputs, make
from tools import adapter_of, randomise

import jlora
import jlora.train
from jlora import models

pytestmark = pytest.mark.gpu

ON_GPU = jax.default_backend() == "gpu"
# Relative to the largest entry of what is compared.
TOLERANCE = {"float32, highest": 1e-5, "float32": 5e-3, "bfloat16": 3e-2}
FORMS = [*TOLERANCE]
D = 64


@contextlib.contextmanager
def computing(form):
    highest = "highest" in form
    with jax.default_matmul_precision("highest" if highest else "default"):
        yield jnp.dtype(form.split(",")[0]).type


def on_cpu(f, *args):
    """`f` of the same numbers on the CPU, in the best precision it has."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        return jax.jit(f)(*jax.device_put(args, cpu))


def assert_near(got, want, form):
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
        most = np.abs(w).max()
        assert most > 0, "a comparison of zeros"
        assert np.abs(g - w).max() <= TOLERANCE[form] * most, jax.tree_util.keystr(path)


def net(p, ids):
    """A lookup, a fused slice, heads, a convolution, experts, a scan: each a rule."""
    x = p["table"][ids]  # [B, T, D]
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    q = jnp.einsum("btd,dhk->bthk", q, p["heads"])
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", k, v) / D**0.5, axis=-1)
    x = x + jnp.einsum("bts,bshk,hkd->btd", scores, q, p["out"])
    x = x + jax.lax.conv_general_dilated(
        x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    x = x + jnp.einsum("btd,edf->btf", jnp.tanh(x), p["experts"]) / 2
    block = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
    x, _ = jax.lax.scan(block, x, p["layers"])
    return x @ p["table"].T


SHAPES = {
    "table": (96, D), "qkv": (D, 3 * D), "heads": (D, 4, 16), "out": (4, 16, D),
    "conv": (3, D, D), "experts": (2, D, D), "layers": (3, D, D),
}  # fmt: skip
IDS = np.arange(4 * 32).reshape(4, 32) % 89


def base(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), dtype)
        for name, shape in SHAPES.items()
    }


def adapted(params, **how):
    ids = jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
    shapes = jax.eval_shape(lambda: params)
    survey = jlora.survey(net, shapes, ids)
    return adapter_of(params, 1, 8, "all-kernels", survey=survey, alpha=2.0, **how)


def loss(half, frozen, ids):
    logits = jlora.lora(net)(jlora.combine(half, frozen), ids).astype(jnp.float32)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("form", FORMS)
def test_rules_and_their_gradients(form, dora):
    with computing(form) as dtype:
        params = base(dtype)
        half, frozen = jlora.split(adapted(params, dora=dora))
        got = jax.jit(jax.value_and_grad(loss))(half, frozen, IDS)
        dense = jlora.merge(jlora.combine(half, frozen))
        logits = jax.jit(jlora.lora(net))(jlora.combine(half, frozen), IDS)
        plain = jax.jit(net)(dense, IDS)
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    want = on_cpu(jax.value_and_grad(loss), half, jax.tree.map(wide, frozen), IDS)
    loose = {"bfloat16": "bfloat16"}.get(form, form)
    assert_near(logits, plain, "bfloat16" if dtype == jnp.bfloat16 else form)
    if dtype != jnp.bfloat16:  # whose own rounding, layer by layer, is as large
        assert_near(got, want, loose)
    else:
        value = np.asarray([got[0]]), np.asarray([want[0]])
        assert_near(*value, form)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_merge_is_rounded_once_and_undone_to_the_bit(dtype):
    params = base(dtype)
    tree = adapted(params)
    dense, undo = jlora.merge(tree, undo=True)
    back = jlora.unmerge(dense, undo)

    def bits(x):
        return np.asarray(x).view(np.uint32 if dtype == jnp.float32 else np.uint16)

    for name, x in params.items():
        node = back[name]
        assert (bits(node.base if jlora.is_node(node) else node) == bits(x)).all()
        if name in ("qkv", "layers"):
            t = tree[name].adapters[""]
            delta = np.asarray(t.a, np.float64) @ np.asarray(t.b, np.float64)
            scale = np.asarray(t.scale, np.float64)
            scale = scale[:, None, None] if scale.ndim else scale  # one a layer
            want = np.asarray(x, np.float64) + scale * delta
            room = 2e-3 if ON_GPU else 1e-6  # TF32, were it not asked to be exact
            got = np.asarray(dense[name], np.float64)
            unit = 2.0**-8 if dtype == jnp.bfloat16 else room
            assert np.abs(got - want).max() <= unit * np.abs(want).max()


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_quantised_bases_are_the_same_codes(form):
    def codes(params):
        tree = jlora.quantize(params, form, targets=["qkv"])
        return jlora.dequantize(tree)

    params = {"qkv": base()["qkv"]}
    here = codes(params)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = codes(jax.device_put(params, cpu))
    for name in params:
        np.testing.assert_array_equal(here[name], there[name])
        assert np.abs(here[name] - params[name]).max() > 0


def test_a_base_of_4_bits_trains():
    params = {"w": base()["qkv"]}
    tree = jlora.lorafy(jlora.quantize(params, "nf4"), 8, ["w"])
    tree = randomise(tree, jax.random.key(1))
    half, frozen = jlora.split(tree)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(16, D)), jnp.float32)

    def f(half, frozen, x):
        y = jlora.lora(lambda p, x: jnp.tanh(x @ p["w"]))(
            jlora.combine(half, frozen), x
        )
        return jnp.sum(y**2)

    with computing("float32, highest"):
        got = jax.jit(jax.grad(f))(half, frozen, x)
    assert_near(got, on_cpu(jax.grad(f), half, frozen, x), "float32, highest")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_heads_loss_without_logits(dtype):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(4, 32, D)), dtype)
    kernel = jnp.asarray(rng.normal(size=(D, 5003)) / 8, dtype)
    labels = np.where(rng.random((4, 32)) < 0.2, -100, rng.integers(0, 5003, (4, 32)))

    def ours(hidden):
        total, count = jlora.train.linear_cross_entropy(hidden, kernel, labels)
        return total / count

    def plain(hidden, kernel):
        wide = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
        total, count = jlora.train.cross_entropy(wide, labels)
        return total / count

    with computing("float32, highest"):
        got = jax.jit(jax.value_and_grad(ours))(hidden)
    want = on_cpu(jax.value_and_grad(plain), hidden, kernel)
    assert_near(got, want, "bfloat16" if dtype == jnp.bfloat16 else "float32, highest")


def test_dropout_is_drawn_anew_for_each_key_and_repeats_for_one():
    params = {"w": base()["qkv"]}
    tree = jlora.lorafy(params, 8, ["w"], dropout=0.25)
    tree = randomise(tree, jax.random.key(1))
    x = jnp.ones((512, D))
    f = jax.jit(lambda t, x, key: jlora.lora(lambda p, x: x @ p["w"])(
        jlora.with_dropout(t, key), x))  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2)
    one, again, other = f(tree, x, keys[0]), f(tree, x, keys[0]), f(tree, x, keys[1])
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).mean() > 0.9
    kept = np.asarray(jlora.lora(lambda p, x: x @ p["w"])(tree, x))
    mean = np.abs(np.asarray(one).mean(0) - kept[0]).max()
    assert mean < 0.2 * np.abs(kept).max()  # its mean is what there is without


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step(form):
    """Some steps, with clipping and microbatches: the losses of the CPU's run."""

    def run(params):
        ids = jax.ShapeDtypeStruct(IDS.shape, jnp.int32)
        survey = jlora.survey(net, jax.eval_shape(lambda: params), ids)
        tree = jlora.lorafy(params, 8, ["qkv", "layers", "table"], survey=survey)
        tx = optax.sgd(0.5)
        state = jlora.train.TrainState.create(tree, tx, jax.random.key(0))
        step = jlora.train.make_train_step(
            lambda p, ids, key: jlora.train.cross_entropy(net(p, ids), ids),
            tx, clip_norm=1.0, accumulate=2,
        )  # fmt: skip
        losses = []
        for _ in range(4):
            state, metrics = step(state, IDS)
            losses.append(metrics["loss"])
        assert step.cache_size() == 1
        return np.asarray([float(x) for x in losses])

    with computing(form) as dtype:
        got = run(base(dtype))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu), computing("float32, highest"):
        want = run(jax.device_put(base(), cpu))
    assert want[-1] < want[0]
    assert_near(got, want, form)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "gemma2", "roberta"])
def test_a_model_of_each_family(kind):
    model, params = make(kind)
    tree = adapter_of(params, 4, 4, ["query", "value"])
    f = jlora.lora(lambda p, *x: model.apply({"params": p}, *x))
    for form in ("float32, highest", "float32"):
        with computing(form):
            got = jax.jit(f)(tree, *inputs(kind))
        assert_near(got, on_cpu(f, tree, *inputs(kind)), form)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_generated_tokens(kind):
    model, params = make(kind)
    tree = adapter_of(params, 4, 4, ["query", "value"])
    prompts = np.array([[3, 4, 5, 6], [7, 8, 9, 0]])
    how = {"max_new_tokens": 6, "num_beams": 2, "transform": jlora.lora}

    def tokens(tree):
        return models.generate(model, tree, prompts, (prompts > 0).astype(int), **how)

    with computing("float32, highest"):
        got = tokens(tree)
        cpu = jax.devices("cpu")[0]
        with jax.default_device(cpu):
            want = tokens(jax.device_put(tree, cpu))
    np.testing.assert_array_equal(got, want)
