"""VeRA, LoHa and LoKr: other forms of the update, on the same node."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tools import TOL, assert_close, randomise, result_shapes, scalar

import jlora
import jlora.peft
from jlora import checkpoint

T = jlora.Target
FORMS = {
    "vera": ("vera", 5),
    "loha": ("loha", 2),
    "lokr": (jlora.LoKr(factor=2), 2),
    "lokr, both": (jlora.LoKr(factor=6, decompose_both=True), 2),
}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def adapted(form, shape, target=None, dtype=jnp.float32, **settings):
    """One kernel with an adapter of a form, every trained part at random."""
    variant, rank = FORMS[form]
    w = {"w": normal(0, *shape, dtype=dtype)}
    targets = {"w": target or T(in_axes=(0,))}
    tree = jlora.lorafy(w, rank, targets, variant=variant, **settings)
    return randomise(tree, jax.random.key(1))["w"]


# -- the definitions, dense ------------------------------------------------------------


def dense_update(form, parts, scale, ins, outs):
    """ΔW [in, out] of one matrix by the paper's definition, axes flattened."""
    if form == "vera":
        a, b = parts["proj_a"].reshape(ins, -1), parts["proj_b"].reshape(-1, outs)
        d, v = jnp.diag(parts["lambda_d"]), jnp.diag(parts["lambda_b"].reshape(outs))
        return scale * a @ d @ b @ v
    if form == "loha":
        one, two = (
            parts[f"a{n}"].reshape(ins, -1) @ parts[f"b{n}"].reshape(-1, outs)
            for n in (1, 2)
        )
        return scale * one * two
    first = parts["w1"] if "w1" in parts else parts["a1"] @ parts["b1"]
    return scale * jnp.kron(first, parts["a2"] @ parts["b2"])


def dense(form, w):
    """The dense kernel of a node by the paper's definition, of every matrix of it."""
    (t,) = w.adapters.values()
    ins, outs = ([w.shape[d] for d in dims] for dims in (t.in_axes, t.out_axes))
    size = int(np.prod(ins)), int(np.prod(outs))
    stacked = {n for n, dims in t.p_dims if dims[:1] == (0,) and 0 in t.batch_axes}
    axes = {n: 0 if n in stacked else None for n in t.parts}
    one = lambda parts, scale: dense_update(form.split(",")[0], parts, scale, *size)
    for _ in t.batch_axes:
        one = jax.vmap(one, in_axes=(axes, 0))
    update = one(t.parts, t.scale)
    order = (*t.batch_axes, *t.in_axes, *t.out_axes)
    update = update.reshape([w.shape[d] for d in order])
    return w.base + update.transpose(np.argsort(order)).astype(w.dtype)


STACK = T(in_axes=(1,), batch_axes=(0,))
# A rule sees the factors that were made, so each form is tried where it may differ.
CASES = {
    "matmul": (FORMS, (12, 42), None, lambda w, x: x @ w, (3, 12)),
    "a tied head": (
        ["loha"], (14, 8), None,
        lambda w, x: jnp.tanh(w[jnp.array([2, 9])] * x) @ w.T, (2, 8),
    ),
    "heads": (
        ["vera", "loha", "lokr"], (8, 2, 7), None,
        lambda w, x: jnp.einsum("td,dhk->thk", x, w), (3, 8),
    ),
    "of heads": (
        ["lokr"], (2, 6, 10), T(in_axes=(0, 1)),
        lambda w, x: jnp.einsum("thk,hkd->td", x, w), (3, 2, 6),
    ),
    "scanned, remat": (
        ["vera", "lokr"], (3, 10, 10), STACK,
        lambda w, x: lax.scan(
            jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0],
        (2, 10),
    ),
    "experts": (
        ["vera", "loha"], (3, 8, 6), STACK,
        lambda w, x: jnp.einsum("eti,eio->eto", x, w), (3, 2, 8),
    ),
    "experts looked up": (
        ["vera"], (3, 8, 6), STACK,
        lambda w, x: jnp.einsum("ti,tio->to", x, w[jnp.array([2, 0])]), (2, 8),
    ),
    "experts by ragged_dot": (
        ["vera"], (3, 8, 6), STACK,
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 3])), (5, 8),
    ),
    "convolution": (
        ["vera", "loha"], (3, 4, 8), T(in_axes=(0, 1)),
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (2, 5, 4),
    ),
    "vmap": (
        ["loha"], (8, 6), T(in_axes=(1,)),
        lambda w, x: jax.vmap(lambda x: w @ x[0])(x.reshape(3, 1, 6)), (3, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_papers(case):
    forms, shape, target, f, x_shape = CASES[case]
    x = normal(2, *x_shape)
    nodes = {form: adapted(form, shape, target) for form in forms}
    halves = {form: jlora.split(w) for form, w in nodes.items()}
    trainable = {form: half for form, (half, _) in halves.items()}

    def loss(form, half, low):
        w = jlora.combine(half, halves[form][1])
        if low:
            return scalar(jlora.lora(f)(w, x))
        return scalar(f(dense(form, w), x))

    @jax.jit
    def both(trainable):
        return [
            {form: jax.value_and_grad(functools.partial(loss, form))(half, low)
             for form, half in trainable.items()}
            for low in (True, False)
        ]  # fmt: skip

    got, want = both(trainable)
    tol = TOL[jnp.float32]
    for form in forms:
        sizes = [float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(want[form][1])]
        assert min(sizes) > 1e-3, f"{form}: a test of nothing"
        assert_close(
            got[form], want[form], rtol=5e-3, atol=20 * tol["atol"] * max(sizes)
        )
    for form, w in nodes.items():
        half = trainable[form]
        formed = result_shapes(jax.grad(lambda t: loss(form, t, True)), half)
        assert w.shape not in formed, f"{form}: a dense update is formed"


# -- trees -----------------------------------------------------------------------------

LAYERS = {
    "layers": {
        str(n): {"q": {"kernel": normal(n, 12, 42)}, "o": {"kernel": normal(7 + n, 42, 12)}}
        for n in range(2)
    }
}  # fmt: skip
BASE = {**LAYERS, "up": {"kernel": normal(5, 12, 10)}}


def tree_of(form, params=BASE, **settings):
    variant, rank = FORMS[form]
    return jlora.lorafy(params, rank, "all-linear", variant=variant, **settings)


def apply(params, x):
    for layer in params["layers"].values():
        x = x + jnp.tanh(x @ layer["q"]["kernel"]) @ layer["o"]["kernel"]
    return x @ params["up"]["kernel"]


X = normal(3, 5, 12)


@pytest.mark.parametrize("form", ["vera", "loha", "lokr"])
def test_a_tree_trains_merges_and_is_kept(form, tmp_path):
    tree = tree_of(form)
    got = jlora.lora(apply)(tree, X)
    np.testing.assert_allclose(got, apply(BASE, X), rtol=1e-6, atol=1e-6)

    trainable, frozen = jlora.split(tree)
    tx = optax.adam(0.05)

    @jax.jit
    def step(trainable, state):
        def loss(half):
            return jnp.mean(jlora.lora(apply)(jlora.combine(half, frozen), X) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state)
        return value, optax.apply_updates(trainable, updates), state

    state, losses = tx.init(trainable), []
    for _ in range(3):
        value, trainable, state = step(trainable, state)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert losses[2] < losses[0]

    tree = jlora.combine(trainable, frozen)
    merged, report, undo = jlora.merge(tree, report=True, undo=True)
    assert all(m.delta_norm > 0 for m in report)
    kernel = merged["layers"]["1"]["q"]["kernel"]
    np.testing.assert_allclose(
        kernel, dense(form, tree["layers"]["1"]["q"]["kernel"]), rtol=1e-5, atol=1e-6
    )
    want = jlora.lora(apply)(tree, X)
    np.testing.assert_allclose(apply(merged, X), want, rtol=1e-4, atol=1e-5)
    assert jlora.unmerge(merged, undo) is tree

    checkpoint.save_adapter(tmp_path / "a", tree)
    back = checkpoint.load_adapter(tmp_path / "a", BASE)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)

    stacked = jlora.stack_layers(tree)
    again = jlora.unstack_layers(stacked, ["layers"])
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_veras_projections_are_there_once(tmp_path):
    tree = tree_of("vera")
    nodes = jax.tree.leaves(tree, is_leaf=jlora.is_node)
    parts = [node.adapters[""].parts for node in nodes]
    of = {name: {id(p[name]) for p in parts} for name in ("proj_a", "proj_b")}
    assert {name: len(ids) for name, ids in of.items()} == {"proj_a": 2, "proj_b": 3}
    assert [x.shape for x in jax.tree.leaves(jlora.split(tree)[0])] == [
        s for node in nodes for s in [(node.shape[1],), (5,)]
    ]
    checkpoint.save_adapter(tmp_path / "a", randomise(tree, jax.random.key(0)))
    back = checkpoint.load_adapter(tmp_path / "a", BASE)
    parts = [
        node.adapters[""].parts for node in jax.tree.leaves(back, is_leaf=jlora.is_node)
    ]
    assert len({id(p["proj_a"]) for p in parts}) == 2
    stacked = jlora.stack_layers(tree)["layers"]["q"]["kernel"].adapters[""].parts
    assert (
        stacked["proj_a"]
        is tree["layers"]["0"]["q"]["kernel"].adapters[""].parts["proj_a"]
    )
    assert stacked["lambda_d"].shape == (2, 5)


def test_a_scanned_stack_shares_one_projection():
    w = adapted("vera", (3, 8, 8), STACK)
    layer = jax.checkpoint(lambda x, w: (x @ w, None))
    f = jlora.lora(lambda w, x: lax.scan(layer, x, w)[0])
    formed = result_shapes(jax.grad(lambda w: scalar(f(w, normal(1, 2, 8)))), w)
    assert (3, 8, 5) not in formed, "the projection is copied for every layer"


def test_a_stack_is_its_layers():
    for form in ("vera", "loha", "lokr"):
        variant, rank = FORMS[form]
        targets = {"q": STACK, "o": STACK, "up": T()}
        both = jlora.lorafy(jlora.stack_layers(BASE), rank, targets, variant=variant)
        stacked = jlora.stack_layers(tree_of(form))
        assert jax.tree.structure(stacked) == jax.tree.structure(both)
        both = randomise(both, jax.random.key(2))
        want = jlora.merge(both)["layers"]["q"]["kernel"]
        layers = jlora.merge(jlora.unstack_layers(both, ["layers"]))["layers"]
        got = np.stack([layers[n]["q"]["kernel"] for n in "01"])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_labels_and_summary():
    tree = tree_of("vera")
    kinds = [str(x) for x in jax.tree.leaves(jlora.labels(tree["up"]))]
    assert kinds == ["frozen", "frozen", "b", "a", "frozen", "frozen"]
    row = jlora.summary(tree["up"]).rows[0]
    assert (row.rank, row.trainable) == (5, 5 + 10)
    assert "vera 5" in repr(tree["up"]["kernel"])
    mixed = jlora.lorafy(
        BASE, 2, {"q": T(variant="loha"), "o": T(variant=jlora.LoKr(factor=2)),
                  "up": T(variant="lora")}, variant="vera",
    )  # fmt: skip
    rows = {r.path: r.trainable for r in jlora.summary(mixed).rows}
    assert rows["layers/0/q/kernel"] == 2 * 2 * (12 + 42)
    assert rows["layers/0/o/kernel"] == 2 * 2 + 2 * (21 + 6)
    assert rows["up/kernel"] == 2 * (12 + 10)


@pytest.mark.parametrize("form", ["vera", "loha"])
def test_dtypes_dropout_and_slices(form):
    variant, rank = FORMS[form]
    base = {"c_attn": {"kernel": normal(0, 12, 36, dtype=jnp.bfloat16)}}
    tree = jlora.lorafy(base, rank, ["query", "value"], variant=variant, dropout=0.5)
    tree = randomise(tree, jax.random.key(1))
    node = tree["c_attn"]["kernel"]
    assert {*node.adapters} == {"query", "value"}
    f = lambda p, x: x @ p["c_attn"]["kernel"]
    x = normal(1, 3, 12, dtype=jnp.bfloat16)

    @jax.jit
    def run(tree):
        dropped = jlora.with_dropout(tree, jax.random.key(0))
        return jlora.lora(f)(tree, x), jlora.lora(f)(dropped, x), jlora.merge(tree)

    out, dropped, merged = run(tree)
    assert out.dtype == jnp.bfloat16
    want = np.asarray(f(merged, x), np.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, rtol=0.1, atol=0.3)
    assert np.any(np.asarray(out != dropped))
    same = np.asarray(out[:, 12:24] == dropped[:, 12:24])
    assert same.all(), "the slice of the key has no adapter"


@pytest.mark.parametrize("form", ["vera", "loha", "lokr"])
def test_shapes_and_shardings(form):
    abstract = jax.eval_shape(lambda p: p, BASE)
    tree = tree_of(form)
    shapes = tree_of(form, abstract)
    assert jax.tree.structure(shapes) == jax.tree.structure(tree)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(t)] for t in (shapes, tree)]
    assert kinds[0] == kinds[1]

    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    out = NamedSharding(mesh, PartitionSpec(None, "model"))
    placed = {"up": {"kernel": jax.device_put(BASE["up"]["kernel"], out)}}
    variant, rank = FORMS[form]
    tree = jlora.lorafy(placed, rank, ["up"], variant=variant)
    parts = tree["up"]["kernel"].adapters[""].parts
    along = {"vera": ("lambda_b", "proj_b"), "loha": ("b1", "b2")}.get(form, ())
    for name, x in parts.items():
        assert ("model" in x.sharding.spec) == (name in along), name
    x = normal(1, 3, 12)
    got = jax.jit(jlora.lora(lambda p, x: x @ p["up"]["kernel"]))(tree, x)
    np.testing.assert_allclose(got, x @ BASE["up"]["kernel"], rtol=1e-5, atol=1e-5)


def test_sums_and_banks_take_every_form():
    base = {"up": BASE["up"]}
    trees = {
        form: randomise(tree_of(form, base), jax.random.key(n))
        for n, form in enumerate(("vera", "loha", "lokr"))
    }
    held = base
    for form, tree in trees.items():
        held = jlora.add(held, form, tree)
    update = {form: tree["up"]["kernel"].delta() for form, tree in trees.items()}
    total = jlora.weighted(held, {"vera": 0.5, "lokr": -2.0})["up"]["kernel"].delta()
    want = 0.5 * update["vera"] - 2 * update["lokr"]
    np.testing.assert_allclose(total, want, rtol=1e-4, atol=1e-5)
    bank = jlora.bank(list(trees.values()))
    for n, form in enumerate(trees):
        got = jlora.pick(bank, n)["up"]["kernel"].delta()
        np.testing.assert_allclose(got, update[form], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_pefts_files_hold_them(form, tmp_path):
    variant, rank = FORMS[form]
    targets = ["q", "o"] if form != "lokr, both" else ["q"]
    tree = jlora.lorafy(BASE, rank, targets, variant=variant, train=["up"])
    tree = randomise(tree, jax.random.key(1))
    jlora.peft.save(tmp_path / "a", tree)
    back = jlora.peft.load(tmp_path / "a", BASE)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    if form == "vera":
        one, two = (back["layers"][n]["q"]["kernel"].adapters[""].parts for n in "01")
        assert one["proj_a"] is two["proj_a"]


def test_what_pefts_files_cannot_hold(tmp_path):
    q = {"q": BASE["layers"]["0"]["q"], "up": BASE["up"]}
    for settings, says in [
        (dict(targets={"q": T(variant="loha"), "up": T()}), "several forms"),
        (dict(targets={"q": T(), "up": T(rank=3)}, variant="vera"), "one for all"),
        (dict(targets=["q"], variant="loha", dropout=0.1), "drops inputs"),
    ]:
        tree = jlora.lorafy(q, 2, **settings)
        with pytest.raises(jlora.StructureError, match=says):
            jlora.peft.save(tmp_path / "a", tree)
    assert not (tmp_path / "a").exists()


ERRORS = [
    (
        dict(variant="dora"),
        jlora.OptionError,
        "expected 'lora', 'vera', 'loha', 'lokr'",
    ),
    (dict(variant="vera", dora=True), jlora.OptionError, "dora=True"),
    (dict(variant="loha", rslora=True), jlora.OptionError, "rslora=True"),
    (dict(variant="vera", alpha=3), jlora.OptionError, "alpha=3"),
    (dict(variant="lokr", init="gaussian"), jlora.OptionError, "init='gaussian'"),
    (dict(variant="loha", rank=4), jlora.ShapeError, "from 1 to 3"),
    (dict(variant="lokr", rank=4), jlora.ShapeError, "rank below 3"),
    (dict(variant="vera", rank=0), jlora.ShapeError, "rank=0"),
]


@pytest.mark.parametrize(("settings", "error", "says"), ERRORS)
def test_what_cannot_be_is_an_error(settings, error, says):
    with pytest.raises(error, match=says):
        jlora.lorafy(BASE, **{"rank": 2, "targets": ["up"], **settings})


def test_settings_are_checked():
    for make, says in [
        (lambda: jlora.VeRA(d_initial=0), "d_initial=0"),
        (lambda: jlora.VeRA(seed=-1), "seed=-1"),
        (lambda: jlora.LoKr(factor=0), "factor=0"),
        (lambda: jlora.LoKr(decompose_both=1), "decompose_both=1"),
        (lambda: T(variant="ia3"), "variant='ia3'"),
    ]:
        with pytest.raises(jlora.OptionError, match=says):
            make()
    with pytest.raises(jlora.ShapeError, match="looked up"):
        jlora.lorafy({"embedding": jnp.ones((9, 4))}, 2, ["embedding"], variant="vera")
