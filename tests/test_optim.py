"""LoRA+, LoRA-FA, Riemannian gradients and decay, on every kind of kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_close, equations, randomise

import jlora
import jlora.train as jt
from jlora.optim import decay_mask, lora_fa, lora_plus, riemannian

R = 3


@pytest.fixture(scope="module")
def tree():
    """A linear kernel with DoRA, heads, a fused slice, layers, a table; whole leaves."""
    rng = np.random.default_rng(0)
    shapes = {
        "q": {"kernel": (7, 5), "bias": (5,)},
        "heads": {"kernel": (7, 2, 5)},
        "c_attn": {"kernel": (7, 15), "bias": (15,)},
        "layers": {"kernel": (2, 7, 5)},
        "embed": {"embedding": (11, 7)},
        "tokens": {"embedding": (11, 7)},
        "head": {"kernel": (7, 5)},
        "norm": {"scale": (7,)},
    }
    make = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    one = jlora.Target(rank=R, alpha=6.0)
    axes = {
        "heads": jlora.Target(rank=R, in_axes=(0,), out_axes=(1, 2)),
        "layers": jlora.Target(rank=R, alpha=2, in_axes=(1,), out_axes=(2,), batch_axes=(0,)),
    }  # fmt: skip
    out = jlora.lorafy(
        params, targets={"q": one, "value": one, **axes, "embed": one}, dora=True,
        train=["head", "norm"], bias="lora_only", trainable_tokens={"tokens": [2, 5]},
    )  # fmt: skip
    return randomise(out, jax.random.key(1))


def gradients(tree, seed=2):
    half = jlora.split(tree)[0]
    rng = np.random.default_rng(seed)
    return half, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), half
    )


def factors(tree):
    """Every adapter of the half as float64 [batch, in, r] and [batch, r, out]."""
    for path, w in jlora._paths.leaves_by_path(tree, jlora.is_node).items():
        for name, t in getattr(w, "adapters", {}).items():
            batch = len(t.batch_axes)
            a, b = (np.asarray(x, np.float64) for x in (t.a, t.b))
            lead = a.shape[:batch]
            a = a.reshape(*lead, -1, R)
            yield (path, name), a, b.reshape(*lead, R, -1)


def test_riemannian_is_the_formula_on_every_kernel(tree):
    half, grads = gradients(tree)
    tx, delta = riemannian(1e-3), 1e-3 * np.eye(R)
    got, state = jax.jit(tx.update)(grads, tx.init(half), half)
    assert not jax.tree.leaves(state)
    t = lambda x: x.swapaxes(-1, -2)
    seen = 0
    for (n, a, b), (_, da, db), (_, ga, gb) in zip(
        factors(half), factors(grads), factors(got), strict=True
    ):
        want_a = da @ np.linalg.inv(b @ t(b) + delta)
        want_b = np.linalg.inv(t(a) @ a + delta) @ db
        np.testing.assert_allclose(ga, want_a, rtol=2e-4, atol=2e-4, err_msg=n)
        np.testing.assert_allclose(gb, want_b, rtol=2e-4, atol=2e-4, err_msg=n)
        seen += 1
    assert seen == 5
    others = lambda tree: [
        x for x, n in zip(jax.tree.leaves(tree), jax.tree.leaves(jlora.labels(tree)), strict=True)
        if n not in ("a", "b")
    ]  # fmt: skip
    assert len(others(got)) == 10  # five magnitudes, two biases, two whole, rows
    assert_close(others(got), others(grads))


def test_riemannian_at_the_start_and_of_factors_of_lower_rank():
    """B zero; A of rank one, whose null directions hold rounding errors alone."""
    tree = jlora.lorafy({"q": jnp.ones((7, 5))}, R, ["q"])
    half, grads = gradients(tree)
    a = jnp.outer(jnp.arange(1.0, 8), jnp.array([1.0, 0.3, -0.7]))
    half = jax.tree.map(lambda x: a if x.shape == (7, R) else x, half)
    along = jnp.array([1.0, 0.3, -0.7])[:, None] * jnp.ones((1, 5))
    grads = jax.tree.map(lambda x: along if x.shape == (R, 5) else 0 * x, grads)
    tx = riemannian(1e-8)
    got, _ = tx.update(grads, tx.init(half), half)
    a64 = np.asarray(a, np.float64)
    want = a64 @ np.linalg.pinv(a64.T @ a64) @ along  # of the product; b is not unique
    got_b = np.asarray(got["q"].adapters[""].b)
    np.testing.assert_allclose(a64 @ got_b, want, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(got_b)) < 1
    assert not np.any(got["q"].adapters[""].a)


def test_all_gram_matrices_are_inverted_in_two_loops(tree):
    """And without LAPACK, with which a step once stood still on two CPU threads."""
    half, grads = gradients(tree)
    tx = riemannian()
    program = jax.make_jaxpr(tx.update)(grads, tx.init(half), half)
    names = [e.primitive.name for e in equations(program)]
    assert names.count("while") + names.count("scan") == 2
    assert not {"eigh", "svd", "lu", "cholesky"} & {*names}


def test_lora_fa_keeps_a_and_its_state_away(tree):
    half, grads = gradients(tree)
    tx = lora_fa(optax.adamw(1e-2, weight_decay=0.1), tree)
    state = tx.init(half)
    labels = jax.tree.leaves(jlora.labels(half))
    sizes = dict.fromkeys(labels, 0)
    for n, x in zip(labels, jax.tree.leaves(half), strict=True):
        sizes[n] += x.size
    kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert kept == 2 * (sum(sizes.values()) - sizes["a"])
    updates, _ = jax.jit(tx.update)(grads, state, half)
    for n, x in zip(labels, jax.tree.leaves(updates), strict=True):
        assert bool(jnp.any(x)) == (n != "a")


def test_lora_fa_is_the_formula_on_every_kernel(tree):
    half, grads = gradients(tree)
    tx = lora_fa(optax.sgd(1.0), tree)
    updates, _ = tx.update(grads, tx.init(half), half)
    scales = {"q/kernel": 2.0, "c_attn/kernel": 2.0, "embed/embedding": 2.0,
              "heads/kernel": 1.0, "layers/kernel": 2 / 3}  # fmt: skip
    for ((path, _), a, _), (_, _, db), (_, _, ub) in zip(
        factors(half), factors(grads), factors(updates), strict=True
    ):
        want = np.linalg.inv(a.swapaxes(-1, -2) @ a + 1e-8 * np.eye(R)) @ db
        want /= scales[path] ** 2
        np.testing.assert_allclose(-ub, want, rtol=2e-4, atol=2e-4, err_msg=path)


def test_lora_fa_drops_the_gradient_of_a():
    """Of the compiled step: its operations and the activations that it keeps."""
    params = {str(i): {"kernel": jnp.eye(64) * 0.9} for i in range(6)}
    tree = randomise(jlora.lorafy(params, 2, "all-linear"), jax.random.key(0))
    half, frozen = jlora.split(tree)
    x = jnp.ones((256, 64))

    @jlora.lora
    def apply(p, x):
        for i in range(6):
            x = x @ p[str(i)]["kernel"]  # nothing but A's gradient wants x
        return jnp.mean(x**2)

    def cost(tx):
        def step(half, state, x):
            grads = jax.grad(lambda t: apply(jlora.combine(t, frozen), x))(half)
            return tx.update(grads, state, half)

        done = jax.jit(step).lower(half, tx.init(half), x).compile()
        return done.cost_analysis()["flops"], done.memory_analysis().temp_size_in_bytes

    both, fixed = cost(optax.sgd(0.1)), cost(lora_fa(optax.sgd(0.1), tree))
    one_gradient = 2 * 256 * 64 * 2
    assert both[0] - fixed[0] > 5 * one_gradient
    assert fixed[1] < both[1]


def test_lora_fa_refuses_what_trains_nothing(tree):
    params = {"q": jnp.ones((7, 5)), "embed": {"embedding": jnp.ones((11, 7))}}
    table = jlora.lorafy(params, R, ["q", "embed"])
    with pytest.raises(jlora.StructureError, match="'embed/embedding' is zero"):
        lora_fa(optax.sgd(1.0), table)
    with pytest.raises(jlora.StructureError, match="no adapters"):
        lora_fa(optax.sgd(1.0), params)
    for part in (jlora.split(tree)[0], jax.eval_shape(lambda: tree)):
        with pytest.raises(jlora.StructureError, match="no scale with a number"):
            lora_fa(optax.sgd(1.0), part)
    half, grads = gradients(tree)
    tx = lora_fa(optax.sgd(1.0), jlora.lorafy({"x": jnp.ones((7, 5))}, R, ["x"]))
    with pytest.raises(jlora.StructureError, match="without the adapter 'c_attn"):
        tx.update(grads, tx.init(half), half)
    tx = riemannian()
    with pytest.raises(jlora.OptionError, match="trainable"):
        tx.update(grads, tx.init(half))
    for make in (riemannian, lora_plus):
        for bad in (0, -1.0, True, "1", float("nan")):
            with pytest.raises(jlora.OptionError, match="above 0"):
                make(bad)


@pytest.mark.parametrize("form", ["vera", "loha", "lokr", "adalora"])
def test_forms_without_two_factors_are_named(form):
    params = {"x": jnp.ones((8, 6)), "y": jnp.ones((8, 6))}
    other = jlora.lorafy(params, 1, ["x"], variant=form)
    told = f"the adapter of 'x' is of the form '{form}' and has no factor"
    with pytest.raises(jlora.StructureError, match=rf"lora_fa: {told} A to fix"):
        lora_fa(optax.sgd(1.0), other)
    tx = riemannian()
    half = jlora.split(other)[0]
    with pytest.raises(jlora.StructureError, match=f"riemannian: {told}s A and B"):
        tx.update(half, tx.init(half), half)
    # Beside LoRA, and left to another optimiser: only then it is passed by.
    both = {"x": jlora.Target(rank=1, variant=form), "y": jlora.Target(rank=1)}
    half = jlora.split(jlora.lorafy(params, targets=both))[0]
    mask = {n: jax.tree.map(lambda _, n=n: n == "y", half[n]) for n in ("x", "y")}
    ones = jax.tree.map(jnp.ones_like, half)
    got, _ = optax.masked(tx, mask).update(
        ones, optax.masked(tx, mask).init(half), half
    )
    assert_close(got["x"], ones["x"])
    assert float(jnp.max(jnp.abs(got["y"].adapters[""].b - 1))) > 0.1


def test_lora_plus_gives_rates_by_label(tree):
    half, grads = gradients(tree)
    tx = optax.chain(optax.sgd(1.0), lora_plus(16, embedding_ratio=0.25))
    updates, _ = jax.jit(tx.update)(grads, tx.init(half), half)
    got = jax.tree.map(lambda u, g: round(float(jnp.mean(-u / g)), 4), updates, grads)
    t = got["q"]["kernel"].adapters[""]
    assert (t.a, t.b, t.magnitude) == (1, 16, 16)
    t = got["embed"]["embedding"].adapters[""]
    assert (t.a, t.b, t.magnitude) == (0.25, 0.25, 16)
    assert got["layers"]["kernel"].adapters[""].b == 16
    assert got["q"]["bias"].value == got["norm"]["scale"].value == 16
    assert got["head"]["kernel"].value == got["tokens"]["embedding"].rows == 1


def test_lora_plus_takes_a_traced_ratio(tree):
    half, grads = gradients(tree)

    def b_of(ratio):
        updates, _ = lora_plus(ratio).update(grads, optax.EmptyState(), half)
        return updates["q"]["kernel"].adapters[""].b

    got = jax.vmap(b_of)(jnp.array([1.0, 4.0]))
    assert_close(got[1], 4 * got[0])
    assert_close(got[0], b_of(1))


def test_decay_is_for_factors_and_matrices(tree):
    half, _ = gradients(tree)
    mask = decay_mask(half)
    t = mask["q"]["kernel"].adapters[""]
    assert (t.a, t.b, t.magnitude) == (True, True, False)
    assert mask["head"]["kernel"].value
    assert not any(
        (
            mask["q"]["bias"].value,
            mask["norm"]["scale"].value,
            mask["tokens"]["embedding"].rows,
        )
    )
    zeros = jax.tree.map(jnp.zeros_like, half)
    tx = optax.adamw(1.0, weight_decay=0.5, mask=decay_mask)
    updates, _ = tx.update(zeros, tx.init(half), half)
    assert_close(
        updates, jax.tree.map(lambda x, m: -0.5 * x if m else 0 * x, half, mask)
    )
    tx = optax.masked(optax.add_decayed_weights(1.0), lambda t: decay_mask(t, ["rows"]))
    updates, _ = tx.update(zeros, tx.init(half), half)
    changed = {
        n
        for n, x in zip(
            jax.tree.leaves(jlora.labels(half)), jax.tree.leaves(updates), strict=True
        )
        if jnp.any(x)
    }
    assert changed == {"rows"}
    with pytest.raises(jlora.OptionError, match="magnitude"):
        decay_mask(half, ["bases"])


def test_labels_of_a_half_are_the_half_of_the_labels(tree):
    labels = jlora.labels(tree)
    for half, want in zip(jlora.split(tree), jlora.split(labels), strict=True):
        got = jlora.labels(half)
        assert jax.tree.structure(got) == jax.tree.structure(half)
        assert jax.tree.leaves(got) == jax.tree.leaves(want)


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_inside_of_optax_wrappers(tree, wrap):
    """Of the whole tree under a mask, and of the factors' group alone."""
    half, grads = gradients(tree)
    tx = optax.chain(riemannian(), optax.sgd(1.0))
    want, _ = tx.update(grads, tx.init(half), half)
    if wrap == "masked":
        whole = jax.tree.map(jnp.zeros_like, jlora.split(tree)[1])
        whole = jlora.combine(grads, whole)
        masked = optax.masked(tx, jlora.trainable_mask(tree))
        got, _ = masked.update(whole, masked.init(tree), tree)
        got = jlora.split(got)[0]
    else:
        group = lambda t: jax.tree.map(
            lambda n: "low" if n in "ab" else "rest", jlora.labels(t)
        )
        both = optax.partition({"low": tx, "rest": optax.sgd(1.0)}, group)
        got, _ = both.update(grads, both.init(half), half)
    assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_factors_keep_their_places(kind):
    """Gram matrices are summed over the mesh; no factor is gathered."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    specs = {"up": P(None, "x"), "down": P("x"), "layers": P("x")}
    shapes = {"up": (8, 16), "down": (16, 8), "layers": (4, 7, 5)}
    with jax.set_mesh(mesh):
        params = {
            n: jax.device_put(jnp.ones(s), NamedSharding(mesh, specs[n]))
            for n, s in shapes.items()
        }
        layers = jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
        targets = {"up": jlora.Target(), "down": jlora.Target(), "layers": layers}
        tree = jlora.lorafy(params, R, targets)
        place = lambda x, y: jax.device_put(x, y.sharding)
        half, grads = gradients(randomise(tree, jax.random.key(0)))
        half, grads = (
            jax.tree.map(place, t, jlora.split(tree)[0]) for t in (half, grads)
        )
        fixed = lora_fa(optax.adamw(1e-2), jlora.combine(half, jlora.split(tree)[1]))
        both = fixed, optax.chain(riemannian(), optax.adamw(1e-2), lora_plus())

        @jax.jit
        def step(grads, half):
            updates = [tx.update(grads, tx.init(half), half)[0] for tx in both]
            return [optax.apply_updates(half, u) for u in updates]

        compiled = step.lower(grads, half).compile()
        for got in (found := compiled(grads, half)):
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(half), strict=True):
                assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        gathered = re.findall(r"= f32\[(.*?)\].* all-gather", compiled.as_text())
        assert all(shape.endswith(f"{R},{R}") for shape in gathered)  # Gram matrices
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (grads, half))
    assert_close(found, step(*alone), rtol=1e-4, atol=1e-5)


def test_under_vmap_each_member_is_its_own(tree):
    half, grads = gradients(tree)
    tx = optax.chain(riemannian(), optax.adam(1e-2), lora_plus(4))
    state = tx.init(half)
    two = lambda t: jax.tree.map(lambda x: jnp.stack([x, 2 * x + 0.5]), t)
    update = lambda g, t: tx.update(g, state, t)[0]
    got = jax.jit(jax.vmap(update))(two(grads), two(half))
    for i in range(2):
        pick = lambda t: jax.tree.map(lambda x: x[i], t)
        want = update(pick(two(grads)), pick(two(half)))
        assert_close(pick(got), want, rtol=1e-3, atol=1e-5)


def test_a_train_step_takes_them():
    params = {"q": {"kernel": jnp.eye(7)[:, :5]}, "norm": {"scale": jnp.ones(5)}}
    tree = jlora.lorafy(params, 2, ["q"], train=["norm"])
    batch = {"x": jax.random.normal(jax.random.key(1), (8, 7))}
    batch["y"] = jnp.sum(batch["x"], -1, keepdims=True) * jnp.ones((1, 5))

    def loss(p, batch, key):
        out = batch["x"] @ p["q"]["kernel"] * p["norm"]["scale"]
        return jnp.mean((out - batch["y"]) ** 2)

    tx = optax.chain(lora_fa(optax.adamw(0.02, mask=decay_mask), tree), lora_plus(4))
    state = jt.TrainState.create(tree, tx)
    first = jax.tree.map(np.asarray, state.trainable)
    step = jt.make_train_step(loss, tx)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    t, u = (x["q"]["kernel"].adapters[""] for x in (first, state.trainable))
    assert np.array_equal(t.a, u.a)
    assert np.any(u.b)
