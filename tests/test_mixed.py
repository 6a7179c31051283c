"""Mixed batches: every example as if it were alone with its own adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tools import assert_close, result_shapes, scalar

import jlora
from jlora._compat import compilations
from jlora._kernel import bank as banks
from jlora._kernel.nodes import LowRank

V, D, F, T = 11, 6, 10, 3
IDS = [1, -1, 0, 1]


def normal(key, *shape):
    return 0.5 * jax.random.normal(jax.random.key(key), shape)


def tokens(p, x):
    """An embedding, a layer with a bias, a tied head."""
    h = p["table"][x]
    h = h + jnp.tanh(h @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]
    return h @ p["table"].T


def attention(p, x):
    """A fused kernel that is split, and heads."""
    q, k, v = jnp.split(p["table"][x] @ p["c_attn"]["kernel"], 3, axis=-1)
    w = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k), axis=-1)
    return jnp.einsum("bts,bsd,dhk->bthk", w, v, p["out"]["kernel"])


def scanned(p, x):
    """Stacked layers, recomputed."""

    @jax.checkpoint
    def layer(h, own):
        return h + jnp.tanh(h @ own["kernel"]), None

    return jax.lax.scan(layer, p["table"][x], p["layers"])[0]


def others(p, x):
    """Experts, a convolution, a transposed kernel, a branch."""
    h = p["table"][x]
    h = jnp.einsum("btd,edf->btef", h, p["experts"]["kernel"]).sum(2)
    h = jax.lax.conv_general_dilated(
        h, p["conv"]["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    back = lambda h: h @ p["down"]["kernel"]
    return jax.lax.cond(h[0, 0, 0] > 9, lambda h: h[..., :D], back, h)


SHAPES = {
    tokens: {"table": (V, D), "up": (D, F), "down": (F, D)},
    attention: {"table": (V, D), "c_attn": (D, 3 * D), "out": (D, 2, 5)},
    scanned: {"table": (V, D), "layers": (3, D, D)},
    others: {"table": (V, D), "experts": (2, D, F), "conv": (3, F, F), "down": (F, D)},
}


def base_of(fn, dtype=jnp.float32):
    make = lambda n, s: normal(n, *s).astype(dtype)
    base = {
        name: make(n, shape) if name == "table" else {"kernel": make(n, shape)}
        for n, (name, shape) in enumerate(SHAPES[fn].items())
    }
    if "up" in base:
        base["up"]["bias"] = make(9, (F,))
    return base


def two(fn, base, targets="all-kernels", **options):
    """Adapters of two ranks and scales; the second one of fewer kernels if it may."""
    shapes = jax.eval_shape(lambda: base)
    survey = jlora.survey(fn, shapes, jax.ShapeDtypeStruct((2, T), int))
    trees = []
    for rank in (2, 3):
        fewer = rank == 3 and fn is tokens and not options
        chosen = ["up", "down"] if fewer else targets
        made = jlora.lorafy(
            shapes, rank, chosen, survey=survey, rslora=rank == 3, **options
        )
        trees.append(filled(made, base, np.random.default_rng(rank)))
    return trees


def filled(tree, base, rng):
    """Adapters of random numbers, scales too, on a base; without a compilation."""
    random = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype))

    def one(node, leaf):
        if not jlora.is_node(node):
            return leaf
        return node.map(leaf, lambda t: jax.tree.map(random, t))

    return jax.tree.map(one, tree, base, is_leaf=jlora.is_node)


def inputs(size=4, length=T):
    return jax.random.randint(jax.random.key(size), (size, length), 0, V)


def alone(fn, trees, base, ids, x):
    """Each example's row of what its tree alone makes of the batch."""
    made = jnp.stack([*(jlora.lora(fn)(tree, x) for tree in trees), fn(base, x)])
    return made[jnp.asarray(ids), jnp.arange(len(ids))]  # -1 is the last one


CASES = {
    "tokens": (tokens, {}),
    "fused": (attention, {"targets": ["query", "value", "out"]}),
    "dora": (attention, {"targets": ["query", "out"], "dora": True}),
    "scanned": (scanned, {}),
    "others": (others, {}),
    "biases": (tokens, {"targets": ["up"], "lora_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_example_is_as_alone_with_its_adapter(case):
    """Values to 1e-6, and of each adapter the sum of its examples' gradients."""
    fn, options = CASES[case]
    base = base_of(fn)
    trees, x = two(fn, base, **options), inputs()
    halves, frozen = zip(*map(jlora.split, trees), strict=True)

    def trees_of(halves):
        return [jlora.combine(*pair) for pair in zip(halves, frozen, strict=True)]

    def ours(halves):
        mixture = jlora.with_ids(jlora.bank(trees_of(halves)), jnp.asarray(IDS))
        out = jlora.mixed(fn)(mixture, x)
        return scalar(out), out

    def theirs(halves):
        out = alone(fn, trees_of(halves), base, IDS, x)
        return scalar(out), out

    both = [jax.value_and_grad(f, has_aux=True) for f in (ours, theirs)]
    got, want = jax.jit(lambda halves: [f(halves) for f in both])(halves)
    assert_close(got[0][1], want[0][1], rtol=1e-6, atol=2e-6)
    assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    for n, grads in enumerate(got[1]):
        size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
        assert size > 1e-2, f"adapter {n} has no gradient"
    assert float(jnp.abs(want[0][1] - fn(base, x)).max()) > 1e-2, "a test of nothing"


def test_side_by_side_and_picked_are_equal(monkeypatch):
    base = base_of(scanned)
    mixture = jlora.with_ids(jlora.bank(two(scanned, base, ["layers"])), IDS)
    x, found, formed = inputs(), [], []
    wide = (len(IDS), 1, T, 2, 3)  # of the products with all A side by side
    for limit in (0, 10**6):
        monkeypatch.setattr(banks, "_SIDE_BY_SIDE", limit)
        f = lambda m, x: jlora.mixed(scanned)(m, x)
        loss = lambda b: scalar(f(mixture._replace(bank=b), x))
        found.append(jax.jit(jax.value_and_grad(loss))(mixture.bank))
        formed.append(wide in result_shapes(f, mixture, x))
    assert formed == [False, True]
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_each_examples_value():
    base = base_of(tokens, jnp.bfloat16)
    trees, x = two(tokens, base), inputs()
    mixture = jlora.with_ids(jlora.bank(trees), IDS)
    both = lambda m, trees: (
        jlora.mixed(tokens)(m, x),
        alone(tokens, trees, base, IDS, x),
    )
    got, want = jax.jit(both)(mixture, trees)
    assert_close(got, want, rtol=4e-2, atol=4e-2)
    assert got.dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def compiled():
    base = base_of(tokens)
    trees = two(tokens, base)
    bank = jlora.bank(trees)
    f = jax.jit(lambda ids, x: jlora.mixed(tokens)(jlora.with_ids(bank, ids), x))
    x = inputs(6)
    rows = [jax.jit(jlora.lora(tokens))(tree, x) for tree in trees]
    return f, x, np.stack([*rows, tokens(base, x)])


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(-1, 1), min_size=6, max_size=6))
def test_any_mixture_is_one_program(compiled, ids):
    f, x, rows = compiled  # rows [K + 1, B, ...]
    want = rows[np.asarray(ids), np.arange(6)]  # -1 is the last row, the base's
    np.testing.assert_allclose(f(np.asarray(ids), x), want, rtol=1e-6, atol=2e-6)
    assert compilations(f) == 1


def test_a_batch_split_over_devices():
    base = base_of(tokens)
    bank = jlora.bank(two(tokens, base))
    x, ids = inputs(8), jnp.asarray([0, 0, 1, -1, 1, 1, 0, 1])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    f = jax.jit(lambda b, i, x: jlora.mixed(tokens)(jlora.with_ids(b, i), x))
    got = f(bank, jax.device_put(ids, split), jax.device_put(x, split))
    assert got.sharding.spec[0] == "data"
    want = f(bank, ids, x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)


def test_nothing_of_a_kernels_size_is_made_for_each_example():
    base = base_of(tokens)
    bank = jlora.bank(two(tokens, base))
    mixture, x = jlora.with_ids(bank, IDS), inputs()
    half, frozen = jlora.split(bank)
    loss = lambda h, x: scalar(
        jlora.mixed(tokens)(mixture._replace(bank=jlora.combine(h, frozen)), x)
    )
    formed = result_shapes(jax.grad(loss), half, x, skip=("stop_gradient", "transpose"))
    for shape in SHAPES[tokens].values():
        for n in (2, len(IDS)):
            assert (n, *shape) not in formed
            assert (n, *shape[::-1]) not in formed


def test_the_axis_of_the_examples_is_the_one_that_is_named():
    base = base_of(tokens)
    trees = two(tokens, base)
    mixture = jlora.with_ids(jlora.bank(trees), IDS[:T])
    x, shift = inputs(T, T), normal(5, T, D)  # as many examples as tokens

    def fn(p, batch, shift, *, flag):
        assert flag == "shared"
        by_example = tokens(p, batch["x"].T)
        return by_example, (by_example @ p["table"] + shift).sum()

    @jax.jit
    def both(mixture, trees):
        run = jlora.mixed(fn, ({"x": 1}, None))
        got = run(mixture, {"x": x.T}, shift, flag="shared")
        one = lambda p, y: (y @ p["table"] + shift).sum((1, 2))
        want = alone(tokens, trees, base, IDS[:T], x)
        return got, (want, alone(one, trees, base, IDS[:T], want))

    got, want = both(mixture, trees)
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got[1].shape == (T,)


def test_dropout_differs_from_example_to_example():
    base = base_of(tokens)
    trees = two(tokens, base, ["up"], dropout=0.5)
    bank = jlora.with_dropout(jlora.bank(trees), jax.random.key(3))
    x = jnp.repeat(inputs(1, 7), 4, axis=0)
    out = jax.jit(jlora.mixed(tokens))(jlora.with_ids(bank, [0, 0, 1, -1]), x)
    assert float(jnp.abs(out[0] - out[1]).max()) > 1e-2
    np.testing.assert_allclose(out[3:], tokens(base, x[3:]), rtol=1e-6, atol=2e-6)


def test_picked_adapters_are_what_went_in():
    base = base_of(tokens)
    trees = two(tokens, base)
    bank = jlora.bank(trees)
    for n, tree in enumerate(trees):
        one = jlora.pick(bank, n)
        assert not any(map(banks.has_bank, jax.tree.leaves(one, is_leaf=jlora.is_node)))
        assert_close(jlora.merge(one), jlora.merge(tree), rtol=1e-6, atol=1e-6)
    labels = jlora.labels(bank)["up"]["kernel"].adapters[""]
    assert (labels.a, labels.b, labels.scale) == ("a", "b", "frozen")
    assert jlora.is_node(bank["up"]["kernel"])
    assert isinstance(bank["up"]["kernel"], LowRank)
    assert "up/kernel" in str(jlora.summary(bank))


BASE = {"q": {"kernel": normal(0, 4, 6)}, "v": {"kernel": normal(1, 4, 6)}}


def lorafied(base=BASE, **options):
    return jlora.lorafy(base, 2, ["q"], **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jlora.bank([]), "one adapter at least"),
        (lambda: jlora.bank([BASE]), "none of the trees holds an adapter"),
        (lambda: jlora.bank([lorafied(), {"q": 1}]), "is of another base"),
        (lambda: jlora.bank([lorafied(), lorafied(dora=True)]), "DoRA in some"),
        (lambda: jlora.bank([lorafied(train=["v"])]), "'v/kernel' .* is no adapter"),
        (lambda: jlora.bank([jlora.bank([lorafied()])]), "holds a bank already"),
        (
            lambda: jlora.bank([lorafied(), lorafied(jax.tree.map(lambda x: x + 1, BASE))]),
            "'1' is of another base",
        ),
        (lambda: jlora.with_ids(lorafied(), [0]), "no bank"),
        (lambda: jlora.with_ids(jlora.bank([lorafied()]), [0, 1]), "ids hold 1, .* 0 to 0"),
        (lambda: jlora.with_ids(jlora.bank([lorafied()]), [0.0]), "must be integers"),
        (lambda: jlora.with_ids(jlora.bank([lorafied()]), 0), r"must be \[B\]"),
        (lambda: jlora.pick(jlora.bank([lorafied()]), 1), "none of 0 to 0"),
        (lambda: jlora.merge(jlora.bank([lorafied()])), "holds a bank"),
        (
            lambda: jlora.lora(lambda p: p["q"]["kernel"].T)(jlora.bank([lorafied()])),
            "nothing says which",
        ),
        (lambda: jlora.mixed(lambda p: p)(lorafied()), "with_ids"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(make, words):
    with pytest.raises(jlora.LoraError, match=words):
        make()


def test_an_array_without_the_examples_is_refused():
    mixture = jlora.with_ids(jlora.bank([lorafied()]), [0, -1])
    f = lambda p, x, y: x["a"] @ p["q"]["kernel"] + y
    with pytest.raises(
        jlora.ShapeError, match=r"0/a float32\[3, 4\] has not 2 examples"
    ):
        jlora.mixed(f)(mixture, {"a": jnp.ones((3, 4))}, 1.0)
    with pytest.raises(jlora.OptionError, match="does not fit"):
        jlora.mixed(f, in_axes=(0,))(mixture, {"a": jnp.ones((2, 4))}, jnp.ones(2))


def test_what_returns_the_parameters_is_refused():
    mixture = jlora.with_ids(jlora.bank([lorafied()]), [0, -1])
    with pytest.raises(jlora.UnsupportedOpError, match=r"'q/kernel' .* returned"):
        jlora.mixed(lambda p, x: (x, p))(mixture, jnp.ones((2, 4)))
