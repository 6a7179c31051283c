"""The head and the cross entropy in one, against the two apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close

import jlora
from jlora.train import _chunks, _linear_loss, cross_entropy, linear_cross_entropy
from jlora.train._chunks import Asked, elsewhere, on_a_cpu

V, D = 23, 7


@pytest.fixture
def tiles_of_four(monkeypatch):
    """The chunks of a GPU, on this CPU, for a head of 23 classes."""
    monkeypatch.setattr(_linear_loss, "on_a_cpu", elsewhere)
    monkeypatch.setattr(_chunks, "_TILE", 4)


def batch(dtype=jnp.float32, shape=(2, 5)):
    keys = jax.random.split(jax.random.key(1), 4)
    hidden = jax.random.normal(keys[0], (*shape, D), dtype)
    kernel = jax.random.normal(keys[1], (D, V), dtype)
    labels = jax.random.randint(keys[2], shape, 0, V).at[0, 1].set(-100)
    return hidden, kernel, labels


def apart(hidden, kernel, labels, mask=None, **settings):
    logits = jnp.einsum(
        "...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32
    )
    return cross_entropy(logits, labels, mask, **settings)


SETTINGS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"label_smoothing": 0.2, "z_loss": 0.1},
]


@pytest.mark.parametrize("chunk", [1, 6, 23, 2048])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_value_and_both_gradients(chunk, settings, vocab_axis):
    hidden, kernel, labels = batch()
    kernel = kernel if vocab_axis else kernel.T

    def loss(f, **own):
        def mean(h, w):
            total, count = f(h, w, labels, **settings, **own)
            return total / count

        return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, kernel)

    def of_logits(h, w, *args, **settings):
        return apart(h, w if vocab_axis else w.T, *args, **settings)

    got, want = loss(linear_cross_entropy, chunk=chunk), loss(of_logits)
    assert_close(got, want, rtol=2e-5, atol=2e-6)
    told = loss(linear_cross_entropy, chunk=chunk, vocab_axis=vocab_axis)
    assert_close(told, got, rtol=0, atol=0)


# Of 10 tokens and 23 classes: all at once, two chunks of 12 and 11, six of 4 with a
# rest of 3; and of 20 tokens and 23 classes: groups of 5 tokens, and of 1.
@pytest.mark.parametrize(
    ("shape", "size", "plan"),
    [((2, 5), 920, (1, 23)), ((2, 5), 919, (1, 12)), ((2, 5), 160, (1, 4)),
     ((4, 5), 500, (4, 23)), ((4, 5), 92, (20, 23))],
)  # fmt: skip
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_chunks_of_a_gpu(shape, size, plan, vocab_axis, tiles_of_four):
    assert elsewhere(np.prod(shape), V, Asked(None, size)) == plan
    hidden, kernel, labels = batch(shape=shape)
    w = kernel if vocab_axis else kernel.T
    f = lambda h, w: linear_cross_entropy(
        h, w, labels, label_smoothing=0.2, z_loss=0.1, chunk_bytes=size
    )[0]
    got = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, w)
    value, (dh, dw) = jax.value_and_grad(
        lambda h, w: apart(h, w, labels, label_smoothing=0.2, z_loss=0.1)[0],
        argnums=(0, 1),
    )(hidden, kernel)
    want = value, (dh, dw if vocab_axis else dw.T)
    assert_close(got, want, rtol=2e-5, atol=1e-5)


def test_sizes_of_chunks():
    llama, bound = (4096, 128_256), Asked(None, _chunks.BYTES)
    assert on_a_cpu(*llama, bound) == (1, 2036)  # 63 of even sizes
    assert elsewhere(*llama, bound) == (1, 21_376)  # six of them, 167 tiles each
    assert elsewhere(4096, 50_257, bound) == (1, 16_768)  # whole tiles and a rest
    assert elsewhere(1024, 32_128, bound) == (1, 32_128)
    eight = bound._replace(ways=8)
    assert elsewhere(8 * 4096, 128_256, eight) == (1, 21_376)  # a device's own tokens
    assert elsewhere(8 * 65_536, 32_128, eight) == (32, 32_128)
    assert elsewhere(65_537, 32_128, bound) == (1, 1536)  # a prime number of tokens
    assert elsewhere(1 << 20, 32_128, bound, grouped=False) == (1, 128)
    for plan in (on_a_cpu, elsewhere):
        assert plan(0, V, bound) == (1, V)
        assert plan(*llama, Asked(1000, 1)) == (1, 995)
    assert on_a_cpu(1 << 20, 32_128, bound).classes < 128  # the bound goes for both


def test_logits_far_above_that_of_the_label(tiles_of_four):
    """The first guess at a row's maximum would overflow; a second pass does not."""
    hidden, kernel, labels = batch()
    hidden = hidden.at[0, 2].multiply(40).at[1, 3].multiply(300)
    for chunk_bytes in (160, 4000):
        got, want = (
            jax.value_and_grad(lambda h, w, f=f: f(h, w)[0], argnums=(0, 1))(
                hidden, kernel
            )
            for f in (
                lambda h, w: linear_cross_entropy(
                    h, w, labels, chunk_bytes=chunk_bytes
                ),
                lambda h, w: apart(h, w, labels),
            )
        )
        assert want[0] > 500
        assert_close(got, want, rtol=2e-5, atol=1e-4)
    none = linear_cross_entropy(hidden, kernel, jnp.full_like(labels, -100))
    assert [float(x) for x in none] == [0, 0]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_platform_that_is_lowered_for_chooses(adapted):
    n, v = 64, 5000
    keys = jax.random.split(jax.random.key(2))
    params = {"head": {"kernel": jax.random.normal(keys[0], (D, v))}}
    hidden, labels = jax.random.normal(keys[1], (n, D)), jnp.arange(n)

    def loss(p, h):
        w = p["head"]["kernel"]
        return linear_cross_entropy(h, w, labels, chunk_bytes=n * 4 * 4096)[0]

    f = jax.grad(loss, argnums=1)
    if adapted:
        params, f = jlora.lorafy(params, 2, ["head"]), jlora.lora(f)
    traced = jax.jit(f).trace(params, hidden)
    texts = {
        name: traced.lower(lowering_platforms=(name,)).as_text()
        for name in ("cpu", "cuda")
    }
    for name, own, other in (("cpu", 1667, 2560), ("cuda", 2560, 1667)):
        assert f"tensor<{n}x{own}xf32>" in texts[name]
        assert f"tensor<{n}x{other}xf32>" not in texts[name]


def test_one_gradient_alone_and_weights():
    hidden, kernel, labels = batch()
    mask = jax.random.uniform(jax.random.key(5), labels.shape) * (labels >= 0)
    for argnum in (0, 1):
        got, want = (
            jax.grad(lambda *x: f(*x, labels, mask)[0], argnums=argnum)(hidden, kernel)
            for f in (linear_cross_entropy, apart)
        )
        assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    hidden, kernel, labels = batch(jnp.bfloat16)
    f = lambda g: jax.value_and_grad(lambda h: g(h, kernel, labels)[0])(hidden)
    (got, dgot), (want, dwant) = f(linear_cross_entropy), f(apart)
    assert got.dtype == jnp.float32
    assert dgot.dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-3)
    np.testing.assert_allclose(
        dgot.astype(np.float32), dwant.astype(np.float32), rtol=3e-2, atol=2e-2
    )


def test_what_is_not_counted_may_hold_anything():
    hidden, kernel, labels = batch()
    hidden = hidden.at[0, 1].set(jnp.nan)
    f = lambda h, w: linear_cross_entropy(h, w, labels)[0]
    value, grads = jax.value_and_grad(f, argnums=(0, 1))(hidden, kernel)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(grads[0][0, 1])


def test_a_label_that_is_no_class_is_nan_and_a_negative_one_never_counts():
    hidden, kernel, labels = batch()
    mask = jnp.ones(labels.shape).at[1, 2].set(0)  # where labels get -100 below
    for f in (linear_cross_entropy, apart):
        total, count = f(hidden, kernel, labels, mask)
        left = linear_cross_entropy(hidden, kernel, labels.at[1, 2].set(-100))
        assert_close((total, count), left, rtol=1e-5, atol=1e-5)
        for axis, w in ((1, kernel), (0, kernel.T)):
            how = {} if f is apart else {"vocab_axis": axis}
            w = kernel if f is apart else w
            beyond = labels.at[0, 0].set(V)  # without a value, as in a step
            assert np.isnan(
                jax.jit(lambda y, f=f, w=w, how=how: f(hidden, w, y, **how)[0])(beyond)
            )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("as_it_lies", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_adapted_heads(tied, as_it_lies, settings):
    hidden, kernel, labels = batch()
    params = {"head": {"embedding": kernel.T} if tied else {"kernel": kernel}}
    tree = jlora.lorafy(params, 2, ["head"])
    half, frozen = jlora.split(tree)
    half = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), half
    )

    def loss(f):
        def plain(p, h):
            if tied and as_it_lies and f is linear_cross_entropy:
                return f(h, p["head"]["embedding"], labels, **settings)[0]
            head = p["head"]["embedding"].T if tied else p["head"]["kernel"]
            return f(h, head, labels, **settings)[0]

        return lambda half, h: jlora.lora(plain)(jlora.combine(half, frozen), h)

    got, want = (
        jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1)))(half, hidden)
        for f in (linear_cross_entropy, apart)
    )
    assert_close(got, want, rtol=5e-5, atol=1e-5)


def test_adapter_dropout_on_a_head_is_an_error_that_says_what_to_do():
    hidden, kernel, labels = batch()
    tree = jlora.lorafy({"head": {"kernel": kernel}}, 2, ["head"], dropout=0.5)
    f = lambda p: linear_cross_entropy(hidden, p["head"]["kernel"], labels)[0]
    assert np.isfinite(jlora.lora(f)(tree))  # off, as in evaluation
    on = jlora.with_dropout(tree, jax.random.key(2))
    with pytest.raises(
        jlora.UnsupportedOpError, match=r"'head/kernel'[\s\S]*dropout=0"
    ):
        jlora.lora(f)(on)


@pytest.mark.parametrize("tied", [False, True])
def test_a_survey_of_the_loss_knows_a_head_from_an_embedding(tied):
    hidden, kernel, labels = batch()

    def loss(p, ids):
        h = p["shared"]["embedding"][ids]
        if tied:
            return linear_cross_entropy(h, p["shared"]["embedding"], ids)[0]
        return linear_cross_entropy(h, p["head"]["kernel"], ids)[0]

    params = {"shared": {"embedding": kernel.T}}
    if not tied:
        params["head"] = {"kernel": kernel}
    survey = jlora.survey(loss, params, labels)
    assert survey.axes("shared/embedding") == ((0,), (1,), (), True)
    if not tied:
        assert survey.axes("head/kernel") == ((0,), (1,), (), False)
        assert survey.matmul_kernels() == ["head/kernel"]


@pytest.mark.parametrize("kind", ["shard_map", "explicit", "auto"])
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("gpu", [False, True])
def test_split_over_devices(vocab_axis, kind, gpu, request):
    hidden, kernel, labels = batch(shape=(4, 6))
    how = {"chunk": 6}
    if gpu:
        request.getfixturevalue("tiles_of_four")
        how = {"chunk_bytes": 400}
        assert elsewhere(24, V, Asked(None, 400, ways=2)) == (3, V)
    kernel = kernel if vocab_axis else kernel.T
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))

    def loss(h, w, y):
        return linear_cross_entropy(h, w, y, vocab_axis=vocab_axis, **how)[0]

    one = jax.value_and_grad(loss, argnums=(0, 1))
    want = one(hidden, kernel, labels)
    f = one
    if kind == "shard_map":
        both = (P("data"), P())  # the kernel's gradient is summed by JAX
        f = jax.shard_map(
            lambda *x: (jax.lax.psum((out := one(*x))[0], "data"), out[1]),
            mesh=mesh, in_specs=(*both, P("data")), out_specs=(P(), both),
        )  # fmt: skip
    along = NamedSharding(mesh, P("data"))
    hidden, labels = jax.device_put((hidden, labels), along)
    with jax.set_mesh(mesh):
        got = jax.jit(f)(hidden, kernel, labels)
    assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_vmap():
    hidden, kernel, labels = batch()
    stack = jnp.stack([hidden, -hidden])
    got = jax.vmap(
        jax.grad(lambda h: linear_cross_entropy(h, kernel, labels, chunk=6)[0])
    )(stack)
    want = jax.vmap(jax.grad(lambda h: apart(h, kernel, labels)[0]))(stack)
    assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_neither_logits_nor_a_copy_of_the_kernel_is_whole(vocab_axis):
    n, d, v = 64, 32, 4096
    hidden, kernel = jnp.ones((n, d)), jnp.ones((d, v) if vocab_axis else (v, d))
    labels = jnp.zeros((n,), jnp.int32)
    f = jax.jit(
        jax.value_and_grad(
            lambda h, w: linear_cross_entropy(h, w, labels, chunk=256)[0]
        )
    )
    temp = f.lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes
    assert temp < min(n, d) * v * 4 / 2


@pytest.mark.parametrize(
    ("h", "w", "y", "says"),
    [((2, 7), (6, 5), (2,), "do not fit"), ((2, 7), (7, 5), (3,), "without its last axis"),
     ((2, 7), (7,), (2,), "do not fit"), ((2, 7), (7, 7), (2,), "fit either way")],
)  # fmt: skip
def test_shapes_that_do_not_fit(h, w, y, says):
    with pytest.raises(jlora.ShapeError, match=says):
        linear_cross_entropy(jnp.ones(h), jnp.ones(w), jnp.zeros(y, jnp.int32))


def test_what_is_said_of_a_square_kernel_and_of_chunks():
    hidden, kernel, labels = jnp.eye(3), jnp.arange(9.0).reshape(3, 3), jnp.arange(3)
    f = lambda w, **how: linear_cross_entropy(hidden, w, labels, **how)
    np.testing.assert_allclose(f(kernel, vocab_axis=0), f(kernel.T, vocab_axis=1))
    with pytest.raises(jlora.ShapeError, match="vocab_axis=2"):
        f(kernel, vocab_axis=2)
    with pytest.raises(jlora.ShapeError, match="vocab_axis=0: the kernel"):
        f(jnp.ones((3, 5)), vocab_axis=0)
    with pytest.raises(jlora.ShapeError, match="chunk=0"):
        f(kernel, vocab_axis=1, chunk=0)


CONFIGS = {
    "t5": {"model_type": "t5", "d_model": 6, "d_ff": 7, "d_kv": 3, "num_heads": 2,
           "num_layers": 1, "vocab_size": V, "tie_word_embeddings": True},
    "t5 untied": {"model_type": "t5", "d_model": 6, "d_ff": 7, "d_kv": 3, "num_heads": 2,
                  "num_layers": 1, "vocab_size": V, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 6, "n_head": 2, "n_layer": 1,
             "n_positions": 11, "vocab_size": V},
    "llama": {"model_type": "llama", "hidden_size": 8, "intermediate_size": 7,
              "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": V},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_features_of_the_models(name, dtype):
    from jlora.models._hf.families import FAMILIES

    config = CONFIGS[name]
    family = FAMILIES[config["model_type"]]
    model = family.model(config=family.config.from_dict(config), dtype=dtype)
    ids = jnp.array([[3, 5, 7, 2], [4, 1, 0, 0]])
    args = (ids, ids != 0, *([ids[:, :3]] if name.startswith("t5") else []))
    variables = model.init(jax.random.key(0), *args)
    labels = jnp.arange(ids.shape[0] * args[-1].shape[1]).reshape(2, -1)
    hidden, kernel = model.apply(variables, *args, method="features")
    assert hidden.dtype == kernel.dtype == dtype
    got = linear_cross_entropy(hidden, kernel, labels)
    want = cross_entropy(model.apply(variables, *args), labels)
    rtol = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got, want, rtol=rtol)


def test_groups_of_rows_without_columns():
    """What a pass without gradients gives in the mean's place."""
    x = jnp.arange(12.0).reshape(6, 2)
    whole, none = _linear_loss._in_groups(lambda x: (2 * x, x[:, :0]), 3, x)
    assert jnp.array_equal(whole, 2 * x)
    assert none.shape == (6, 0)
