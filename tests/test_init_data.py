"""How adapters start from data: against the papers' definitions."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora import (
    NonFiniteError,
    OptionError,
    ShapeError,
    StructureError,
    Target,
    TargetError,
)
from jlora.init._eva import share_out
from jlora.init._inputs import fresh_nodes, input_sums

CLOSE = dict(rtol=1e-4, atol=1e-4)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


PARAMS = {
    "q": {"kernel": normal(0, 7, 5)},
    "layers": {"kernel": normal(1, 3, 5, 5)},
    "heads": {"kernel": normal(2, 5, 2, 3)},
    "out": {"kernel": normal(3, 2, 3, 4)},
}
TARGETS = {
    "q": Target(),
    "layers": Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    "heads": Target(in_axes=(0,)),
    "out": Target(in_axes=(0, 1)),
}
X = normal(9, 2, 11, 7) * jnp.arange(1.0, 8) + 0.3  # [batch, tokens, 7]


def apply(p, x):
    x = jnp.tanh(x @ p["q"]["kernel"])

    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = lax.scan(jax.checkpoint(layer), x, p["layers"]["kernel"])
    heads = jax.vmap(lambda x: jnp.einsum("td,dhk->thk", x, p["heads"]["kernel"]))
    return jnp.einsum("bthk,hko->bto", jnp.tanh(heads(x)), p["out"]["kernel"])


def inputs(x):
    """What flows into each kernel, as rows, in numpy."""
    w = {n: np.asarray(p["kernel"]) for n, p in PARAMS.items()}
    x = np.asarray(x).reshape(-1, 7)
    layers = [np.tanh(x @ w["q"])]
    for i in range(3):
        layers.append(np.tanh(layers[-1] @ w["layers"][i]))
    heads = np.tanh(layers[3] @ w["heads"].reshape(5, 6))
    return {"q": [x], "layers": layers[:3], "heads": layers[3:], "out": [heads]}


def lorafy(rank=2, **options):
    return jlora.lorafy(PARAMS, rank, TARGETS, alpha=5.0, **options)


def small(rank=2, **options):
    params = {"w": normal(4, 7, 5), "v": normal(5, 7, 5)}
    return jlora.lorafy(params, rank, ["w", "v"], alpha=5.0, **options)


def both(p, x):
    return x @ p["w"] + jnp.sin(x) @ p["v"]


def span(x):
    """The projection onto the columns of x."""
    q, _ = np.linalg.qr(np.asarray(x, np.float64))
    return q @ q.T


# -- what flows into kernels -----------------------------------------------------------


def test_sums_over_inputs_of_every_kind_of_kernel():
    """Through scan, checkpoint, vmap and jit, over several axes, of two batches."""
    tree = lorafy()
    nodes = fresh_nodes("eva", tree)
    *_, sums = input_sums("eva", apply, tree, nodes, [X, 2 * X])
    one, two = inputs(X), inputs(2 * X)
    for name in PARAMS:
        found = sums[f"{name}/kernel"]
        rows = [np.concatenate(pair) for pair in zip(one[name], two[name], strict=True)]
        np.testing.assert_allclose(found.second, [x.T @ x for x in rows], **CLOSE)
        np.testing.assert_allclose(found.first, [x.sum(0) for x in rows], **CLOSE)
        np.testing.assert_array_equal(found.number, [len(x) for x in rows])


# -- EVA -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eva():
    return jlora.init.eva(apply, lorafy(), [X], rho=1.0, centered=False)


def test_evas_a_spans_the_inputs_largest_singular_vectors(eva):
    before = lorafy()
    for name, rows in inputs(X).items():
        node, t = eva[name]["kernel"], eva[name]["kernel"].adapters[""]
        assert node.base is before[name]["kernel"].base
        assert not jnp.any(t.b)
        assert t.a.shape == before[name]["kernel"].adapters[""].a.shape
        for x, a in zip(rows, np.reshape(t.a, (len(rows), -1, 2)), strict=True):
            vt = np.linalg.svd(x, full_matrices=False)[2]
            np.testing.assert_allclose(span(a), span(vt[:2].T), **CLOSE)
            np.testing.assert_allclose(a.T @ a, np.eye(2), **CLOSE)
    got = jlora.lora(apply)(eva, X)
    np.testing.assert_allclose(got, apply(PARAMS, X), rtol=1e-5)


def test_the_mean_is_taken_off_unless_told(eva):
    tree = jlora.init.eva(both, small(), [X + 3], rho=1.0, whiten=True)
    x = np.asarray(X).reshape(-1, 7) + 3
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    a = tree["w"].adapters[""].a
    np.testing.assert_allclose(span(a), span(vt[:2].T), **CLOSE)
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=0), s[:2] ** -0.5, rtol=1e-3)


def test_ranks_go_where_inputs_vary_in_few_directions():
    def f(p, x):
        flat = x[..., :1] * jnp.ones(7) + 0.01 * x  # one direction has it all
        return flat @ p["w"] + x @ p["v"]

    x = normal(8, 400, 7) * jnp.asarray([3.0, 2, 2, 1, 1, 1, 1])
    tree = small(2, rslora=True)
    out = jlora.init.eva(f, tree, [x], rho=2.0)
    ranks = {n: w.adapters[""].rank for n, w in out.items()}
    assert ranks == {"w": 1, "v": 3}
    for n, r in ranks.items():  # alpha r'/r over sqrt(r')
        assert float(out[n].adapters[""].scale) == pytest.approx(5.0 * (r / 2) / r**0.5)
    kept = jlora.init.eva(f, tree, [x], rho=2.0, adjust_scale=False)
    assert float(kept["v"].adapters[""].scale) == pytest.approx(5.0 / 3**0.5)


def unit(rank, count=1):
    def make(explained):
        adapter = types.SimpleNamespace(rank=rank)
        return (
            types.SimpleNamespace(adapter=adapter, count=count),
            types.SimpleNamespace(
                explained=np.broadcast_to(explained, (count, len(explained)))
            ),
        )

    return make


def test_the_budget_is_spent_to_the_last_rank():
    made = {
        "few": unit(2)([0.9, 0.05, 0.01, 0.01]),
        "many": unit(2)([0.3, 0.2, 0.2, 0.1]),
        "none": unit(1)([0.02, 0.02]),
    }
    units, found = ({n: x[k] for n, x in made.items()} for k in (0, 1))
    assert share_out(units, found) == {"few": 1, "many": 4, "none": 0}
    stack = {"stack": unit(2, 3)([0.5, 0.4, 0.3]), "one": unit(1)([0.45, 0.35, 0.2])}
    units, found = ({n: x[k] for n, x in stack.items()} for k in (0, 1))
    assert share_out(units, found) == {"stack": 2, "one": 1}


def test_a_kernel_without_a_rank_is_plain_again():
    two = jnp.asarray([1.0, 1, 0, 0, 0, 0, 0])  # its inputs vary in two directions
    f = lambda p, x: (two * x) @ p["w"] + x @ p["v"]
    tree = small(1)
    out = jlora.init.eva(f, tree, [normal(8, 400, 7)])
    assert out["w"].adapters[""].rank == 2
    assert out["v"] is tree["v"].base
    assert len(jax.tree.leaves(jlora.split(out)[0])) == 2


def test_no_more_batches_are_read_than_the_components_need():
    taken = []

    def batches():
        for n in range(20):
            taken.append(n)
            yield X

    jlora.init.eva(both, small(), batches(), tau=0.999)
    assert taken == [0, 1]
    some = [normal(20 + n, 12, 7) for n in range(5)]
    out = jlora.init.eva(both, small(), some, tau=1.0, rho=1.0, centered=False)
    vt = np.linalg.svd(np.concatenate(some), full_matrices=False)[2]
    np.testing.assert_allclose(span(out["w"].adapters[""].a), span(vt[:2].T), atol=1e-3)


# -- CorDA -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_components_that_the_inputs_orient(mode):
    tree = lorafy() if mode == "ipm" else small(3)
    f, names = (apply, [*PARAMS]) if mode == "ipm" else (both, ["w"])
    out = jlora.init.corda(f, tree, [X], mode=mode)
    rows = inputs(X) if mode == "ipm" else {"w": [np.asarray(X).reshape(-1, 7)]}
    for name in names:
        node = out[name]["kernel"] if mode == "ipm" else out[name]
        w = np.asarray(PARAMS[name]["kernel"] if mode == "ipm" else tree["w"].base)
        kernels = w.reshape(len(rows[name]), rows[name][0].shape[1], -1)
        deltas = np.reshape(node.delta(), kernels.shape)
        rank = node.adapters[""].rank
        for x, kernel, delta in zip(rows[name], kernels, deltas, strict=True):
            c = x.T @ x
            c = c / np.mean(np.diag(c)) + 0.01 * np.eye(len(c))
            u, s, vt = np.linalg.svd(c @ kernel, full_matrices=False)
            part = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, None)
            want = np.linalg.solve(c, (u[:, part] * s[part]) @ vt[part])
            np.testing.assert_allclose(delta, want, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(node.merged(), w, atol=1e-5)
        assert node.adapters[""].shifted


# -- LoRA-GA ---------------------------------------------------------------------------


def loss(p, x):
    return jnp.mean(jnp.tanh(both(p, x)) ** 2)


def gradient(tree, x):
    plain = jax.tree.map(lambda w: w.base, tree, is_leaf=jlora.is_node)
    return jax.grad(loss)(plain, x)


def test_lora_ga_takes_the_gradients_singular_vectors():
    tree, size = small(), 5**0.25 / 2
    out = jlora.init.lora_ga(loss, tree, [X[0], X[1]], gamma=4.0)
    grads = [gradient(tree, x) for x in X]
    for name, node in out.items():
        g = np.asarray((grads[0][name] + grads[1][name]) / 2, np.float64)
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        t = node.adapters[""]
        np.testing.assert_allclose(span(t.a), span(u[:, :2]), **CLOSE)
        np.testing.assert_allclose(span(t.b.T), span(vt[2:4].T), **CLOSE)
        np.testing.assert_allclose(t.a.T @ t.a, size**2 * np.eye(2), **CLOSE)
        np.testing.assert_allclose(t.b @ t.b.T, size**2 * np.eye(2), **CLOSE)
        np.testing.assert_allclose(node.merged(), tree[name].base, atol=1e-5)
        assert t.shifted


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_first_step_is_full_fine_tunings_best_of_twice_the_rank(direction):
    out = jlora.init.lora_ga(loss, small(), [X[0]], scale="unit", direction=direction)
    half, frozen = jlora.split(out)
    f = lambda t: jlora.lora(loss)(jlora.combine(t, frozen), X[0])
    grads = jax.jit(jax.grad(f))(half)
    g = gradient(small(), X[0])
    for name, node in out.items():
        t, d = node.adapters[""], grads[name].adapters[""]
        step = 2.5 * (d.a @ t.b + t.a @ d.b)  # s (dA B + A dB)
        u, s, vt = np.linalg.svd(np.asarray(g[name], np.float64), full_matrices=False)
        want = 2.5**2 * (u[:, :4] * s[:4]) @ vt[:4]
        np.testing.assert_allclose(step, want, rtol=1e-3, atol=1e-5)


def test_slices_of_a_fused_kernel_start_from_their_own_gradients():
    params = {"c_attn": {"kernel": normal(7, 5, 12)}}
    f = lambda p, x: jnp.mean(jnp.tanh(x @ p["c_attn"]["kernel"]) ** 2)
    tree = jlora.lorafy(params, 1, ["query", "value"])
    x = normal(8, 9, 5)
    node = jlora.init.lora_ga(f, tree, [x])["c_attn"]["kernel"]
    g = np.asarray(jax.grad(f)(params, x)["c_attn"]["kernel"])
    for name, at in (("query", 0), ("value", 8)):
        u = np.linalg.svd(g[:, at : at + 4], full_matrices=False)[0]
        np.testing.assert_allclose(span(node.adapters[name].a), span(u[:, :1]), **CLOSE)
    np.testing.assert_allclose(node.merged(), params["c_attn"]["kernel"], atol=1e-5)


# -- LoftQ -----------------------------------------------------------------------------


def best(x, rank):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_loftq_starts_with_what_quantising_loses():
    w = normal(11, 64, 7)
    make = lambda: jlora.lorafy({"w": w}, 2, ["w"], alpha=5.0)
    node = jlora.init.loftq(make(), "nf4", double=False)["w"]
    codes = jlora.quantize({"w": w}, "nf4", double=False, targets=["w"])
    q = jlora.dequantize(codes)["w"]
    np.testing.assert_array_equal(node.base.codes, codes["w"].codes)
    np.testing.assert_allclose(node.delta(), best(w - q, 2), **CLOSE)
    twice = jlora.init.loftq(make(), "nf4", double=False, steps=5)["w"]
    off = [float(jnp.linalg.norm(x - w)) for x in (q, node.value(), twice.value())]
    assert off[2] < off[1] < off[0]
    assert node.adapters[""].shifted
    f = lambda p, x: x @ p
    x = normal(12, 3, 64)
    got = jlora.lora(f)(node, x)
    np.testing.assert_allclose(got, x @ node.value(), rtol=1e-3, atol=1e-3)


def test_loftq_refuses():
    for steps in (0, 1.5, True):
        with pytest.raises(OptionError, match="steps="):
            jlora.init.loftq(small(), "int8", steps=steps)
    with pytest.raises(OptionError, match="form='nf3'"):
        jlora.init.loftq(small(), "nf3")
    with pytest.raises(StructureError, match="DoRA"):
        jlora.init.loftq(small(dora=True), "int8")
    done = jlora.init.loftq(small(), "int8")
    with pytest.raises(StructureError, match="int8, cannot hold the rest"):
        jlora.init.loftq(done, "int8")


# -- all of them -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_kernels_stay_sharded(kind):
    axis_type = getattr(jax.sharding.AxisType, kind.title())
    mesh = jax.make_mesh((4,), ("y",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec(None, "y"))
        params = {"w": jax.device_put(normal(4, 7, 8), where)}
        f = lambda p, x: x @ p["w"]
        mean = lambda p, x: jnp.mean(f(p, x) ** 2)
        tree = jlora.lorafy(params, 2, ["w"])
        trees = [jlora.lorafy(params, 2, ["w"], init="pissa"),
                 jlora.init.corda(f, tree, [X])]  # fmt: skip
        if kind == "explicit":
            trees.append(jlora.init.lora_ga(mean, tree, [X]))
        else:
            trees.append(jlora.init.eva(f, tree, [X]))
        for node in (t["w"] for t in trees):
            assert node.base.sharding == where
            assert node.adapters[""].b.sharding.spec == PartitionSpec(None, "y")
            np.testing.assert_allclose(node.merged(), params["w"], atol=1e-5)


def call(name, f=both, tree=None, batches=(X,), **options):
    fn = (lambda p, x: jnp.sum(f(p, x))) if name == "lora_ga" and f is both else f
    return getattr(jlora.init, name)(fn, tree or small(), batches, **options)


EACH = pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])


@EACH
def test_what_cannot_be_refused_by_each(name):
    for batches, says in (
        ([], "there are no batches"),
        (iter(()), "there are no batches"),
        ({"x": X}, r"batches is a dict.*\n.*\[batch\]"),
        (X, r"batches is a .*Array.*\n.*\[batch\]"),
        (3, "batches=3: expected an iterable"),
    ):
        with pytest.raises(OptionError, match=says):
            call(name, batches=batches)
    with pytest.raises(StructureError, match="takes a lorafied tree"):
        call(name, tree={"w": normal(0, 3, 3)})
    with pytest.raises(StructureError, match=r"have begun already:\n  v"):
        call(name, tree=small(init="pissa"))
    shapes = jax.eval_shape(small)
    with pytest.raises(StructureError, match=r"'v'.*has no values"):
        call(name, tree=shapes)
    with pytest.raises(NonFiniteError, match=r"2 kernels.*:\n  v|:\n  v"):
        call(name, batches=[X, X.at[0, 0, 0].set(jnp.nan)])


def test_kernels_whose_inputs_cannot_be_seen():
    tree = jlora.lorafy(
        {"emb": {"embedding": normal(0, 9, 4)}, "w": normal(1, 4, 3)}, 2, ["emb", "w"]
    )
    f = lambda p, i: p["emb"]["embedding"][i] @ p["w"]
    with pytest.raises(TargetError, match=r"saw no inputs of 1 of 2.*\n  emb/emb"):
        jlora.init.eva(f, tree, [jnp.arange(3)])
    stopped = lambda p, x: lax.stop_gradient(x @ p["w"]) + x @ p["v"]
    with pytest.raises(TargetError, match=r"\n  w \(7, 5\).*\n.*stop_gradient"):
        call("corda", stopped)
    with pytest.raises(OptionError, match="returns no array of floats"):
        call("eva", lambda p, x: jnp.argmax(both(p, x), -1))


def test_quantised_kernels():
    """Their inputs are seen like others; what would change them is refused."""
    params = {"w": normal(4, 7, 5), "v": normal(5, 7, 5)}
    codes = jlora.quantize(params, "int8", targets=["w"])
    tree = jlora.lorafy(codes, 2, ["w", "v"])
    out = jlora.init.eva(both, tree, [X], rho=1.0, centered=False)
    vt = np.linalg.svd(np.reshape(X, (-1, 7)), full_matrices=False)[2]
    np.testing.assert_allclose(span(out["w"].adapters[""].a), span(vt[:2].T), **CLOSE)
    assert out["w"].base is tree["w"].base
    for name in ("corda", "lora_ga"):
        with pytest.raises(StructureError, match=r"codes of 'w'.*int8.*\n.*quantize"):
            call(name, tree=tree)
    with pytest.raises(StructureError, match=r"'v'.*another form than LoRA"):
        call("eva", tree=jlora.lorafy(params, 2, ["v"], variant="loha"))


def test_settings_that_cannot_be():
    for options, says in (({"rho": 0.5}, "rho=0.5"), ({"tau": 2}, "tau=2")):
        with pytest.raises(OptionError, match=says):
            call("eva", **options)
    for options, says in (({"mode": "i"}, "mode='i'"), ({"damp": 0}, "damp=0")):
        with pytest.raises(OptionError, match=says):
            call("corda", **options)
    for options, says in (
        ({"direction": "A"}, "direction='A'"), ({"scale": 1}, "scale=1"),
        ({"gamma": -1}, "gamma=-1"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=says):
            call("lora_ga", **options)
    with pytest.raises(ShapeError, match=r"rank=3 for the kernel 'v'.*\n.*of 2 or"):
        call("lora_ga", tree=small(3))
    with pytest.raises(OptionError, match=r"returns float32\[2,11,5\]"):
        jlora.init.lora_ga(both, small(), [X])
    still = lambda p, x: jnp.sum(lax.stop_gradient(p["w"])) + jnp.sum(x @ p["v"])
    with pytest.raises(StructureError, match=r"no gradient for 1 kernels:\n  w"):
        call("lora_ga", still)
