"""AdaLoRA: the form, the budget, the masks, what remains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import assert_close, check, randomise

import jlora
import jlora.train as jt
from jlora.optim import adalora, orthogonality, prune

R = 4


def tree_of(seed=1):
    """A linear kernel, a fused slice and two layers of a stack: 16 ranks."""
    rng = np.random.default_rng(0)
    shapes = {"q": (7, 5), "c_attn": {"kernel": (7, 15)}, "layers": (2, 7, 5)}
    make = lambda s: jnp.asarray(rng.normal(size=s), jnp.float32)
    params = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    layers = jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    targets = {"q": jlora.Target(), "value": jlora.Target(), "layers": layers}
    tree = jlora.lorafy(params, R, targets, alpha=2, variant="adalora")
    return randomise(tree, jax.random.key(seed))


def parts(tree, *path):
    for name in path:
        tree = tree[name]
    (t,) = tree.adapters.values()
    return t.parts


def all_parts(tree):
    places = ("q",), ("c_attn", "kernel"), ("layers",)
    return {"/".join(p): parts(tree, *p) for p in places}


def test_the_form_is_a_sum_of_triplets_and_starts_at_zero():
    params = {"w": jnp.ones((7, 5))}
    fresh = jlora.lorafy(params, R, ["w"], variant=jlora.AdaLoRA())
    t = fresh["w"].adapters[""]
    assert not jnp.any(t.parts["e"])
    assert 0.01 < float(jnp.std(t.parts["a"])) < 0.03
    assert jlora.labels(fresh)["w"].adapters[""].parts == {"a": "a", "e": "e", "b": "b"}
    w = randomise(fresh, jax.random.key(0))["w"]
    p = w.adapters[""].parts
    want = w.base + p["a"] @ jnp.diag(p["e"]) @ p["b"]
    assert_close(jlora.merge({"w": w})["w"], want, rtol=1e-5, atol=1e-5)
    check(lambda w, x: jnp.tanh(x @ w), w, jax.random.normal(jax.random.key(1), (3, 7)))
    with pytest.raises(jlora.ShapeError, match="from 1 to 5"):
        jlora.lorafy(params, 6, ["w"], variant="adalora")


SCHEDULE = dict(target_rank=1.5, total_steps=12, warmup=2, final=3, every=2)


@pytest.fixture(scope="module")
def run():
    """Twelve steps on random gradients, and the trees and states after each."""
    half, frozen = jlora.split(tree_of())
    tx = adalora(optax.adam(0.05), **SCHEDULE)
    update = jax.jit(tx.update)
    state, steps = tx.init(half), []
    rng = np.random.default_rng(3)
    for _ in range(SCHEDULE["total_steps"]):
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), half
        )
        updates, state = update(grads, state, half)
        half = optax.apply_updates(half, updates)
        steps.append((grads, half, state))
    assert update._cache_size() == 1
    return steps, frozen


def left(half):
    return sum(int(jnp.sum(p["e"] != 0)) for p in all_parts(half).values())


def test_the_budget_falls_as_a_cube_and_ends_at_the_target(run):
    steps, _ = run
    total, target, end = 16, 6, 9
    budget = lambda n: int((total - target) * (1 - (n - 2) / (end - 2)) ** 3 + target)
    for n, (_, half, _) in enumerate(steps):
        # Values that were masked grow again until the next allocation.
        if 2 < n < end and n % 2 == 0:
            assert left(half) == budget(n)
        elif n >= end:
            assert left(half) == target
        elif n <= 2:
            assert left(half) == total


def test_the_ranks_are_those_of_the_papers_scores(run):
    """Equations 7 to 10, in NumPy, over a run; one score for each layer of the stack."""
    steps, _ = run
    mean, spread, before = {}, {}, jlora.split(tree_of())[0]
    state = steps[2][2]  # nothing is masked yet
    for grads, half, _ in steps[:3]:
        pull, before = jax.grad(orthogonality)(before), half
        for name, values in all_parts(half).items():
            for part, x in values.items():
                g = all_parts(grads)[name][part] + 0.5 * all_parts(pull)[name][part]
                now, key = np.abs(np.asarray(x * g)), (name, part)
                mean[key] = 0.85 * mean.get(key, 0) + 0.15 * now
                spread[key] = 0.85 * spread.get(key, 0) + 0.15 * np.abs(now - mean[key])
    for own, want in ((state.importance, mean), (state.uncertainty, spread)):
        for name, values in own.items():
            for part, got in values.items():
                key = name.removesuffix("/value"), part
                np.testing.assert_allclose(got, want[key], rtol=1e-4, atol=1e-6)
    # The masks of the last allocation before the end, from the averages then.
    _, half, state = steps[8]
    scores = {}
    for name in state.importance:
        s = {
            p: np.asarray(state.importance[name][p] * state.uncertainty[name][p])
            for p in "aeb"
        }
        scores[name] = s["e"] + s["a"].mean(-2) + s["b"].mean(-1)
    flat = np.sort(np.concatenate([s.ravel() for s in scores.values()]))
    budget = int(10 * (1 - 6 / 7) ** 3 + 6)
    for name, s in scores.items():
        assert np.array_equal(state.kept[name], s > flat[16 - budget - 1])


def test_what_remains_is_lora_of_fewer_ranks(run):
    steps, frozen = run
    tree = jlora.combine(steps[-1][1], frozen)
    small = prune(tree)
    merged = jlora.merge(tree)
    assert_close(jlora.merge(small), merged, rtol=1e-5, atol=1e-5)
    ranks = {}
    for name, e in ((n, p["e"]) for n, p in all_parts(tree).items()):
        ranks[name] = int(jnp.max(jnp.sum(e != 0, -1)))
    assert len({*ranks.values()}) > 1  # the test shows something
    for name, place in (
        ("q", small["q"]),
        ("c_attn/kernel", small["c_attn"]["kernel"]),
        ("layers", small["layers"]),
    ):
        if not ranks[name]:
            assert not jlora.is_node(place)
            continue
        (t,) = place.adapters.values()
        assert (t.form, t.parts, t.rank) == (None, None, ranks[name])
    gone = jax.tree.map(lambda x: x, tree)
    gone["q"] = jax.tree.map(jnp.zeros_like, gone["q"])
    assert not jlora.is_node(prune(gone)["q"])
    with pytest.raises(jlora.StructureError, match="outside of jit"):
        jax.jit(prune)(tree)


def test_orthonormal_factors_are_far_by_nothing_and_have_a_gradient():
    tree = jlora.lorafy({"w": jnp.ones((7, 5))}, R, ["w"], variant="adalora")
    place = {"a": jnp.eye(7)[:, :R], "b": jnp.eye(5)[:R], "e": jnp.ones(R)}
    t = tree["w"].adapters[""]
    at = lambda p: {
        "w": tree["w"].map(
            tree["w"].base,
            lambda t: type(t)(
                **{**{f: getattr(t, f) for f in t.__dataclass_fields__}, "parts": p}
            ),
        )
    }
    assert t.rank == R
    value, grads = jax.value_and_grad(lambda p: orthogonality(at(p)))(place)
    assert value == 0
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads))
    place = {**place, "a": 2 * place["a"]}
    assert float(orthogonality(at(place))) == pytest.approx(3 * np.sqrt(R) / 2)


def test_a_train_step_takes_it_and_the_loss_falls():
    rng = np.random.default_rng(0)
    low = lambda i, o: jnp.asarray(
        rng.normal(size=(i, 1)) @ rng.normal(size=(1, o)), jnp.float32
    )
    params = {"q": jnp.eye(7), "v": jnp.eye(7)}
    tree = jlora.lorafy(params, R, ["q", "v"], variant="adalora")
    x = jnp.asarray(rng.normal(size=(64, 7)), jnp.float32)
    batch = {"x": x, "y": x @ (jnp.eye(7) + low(7, 7))}

    def loss(p, batch, key):
        return jnp.mean((batch["x"] @ p["q"] @ p["v"] - batch["y"]) ** 2)

    tx = adalora(
        optax.adam(0.02), target_rank=1, total_steps=150, warmup=30, final=50, every=5
    )
    state, step = jt.TrainState.create(tree, tx), jt.make_train_step(loss, tx)
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    small = prune(state.params)
    ranks = [
        t.rank for w in small.values() if jlora.is_node(w) for t in w.adapters.values()
    ]
    assert sum(ranks) == 2


def test_numbers_that_cannot_be():
    half = jlora.split(tree_of())[0]
    ok = dict(target_rank=2, total_steps=10)
    for bad, words in (
        (dict(total_steps=0), "from 1 on"), (dict(every=0), "from 1 on"),
        (dict(warmup=5, final=5), "leave none"), (dict(beta1=1.0), "between 0 and 1"),
        (dict(target_rank=-1), "above 0"), (dict(warmup=1.5), "whole number"),
    ):  # fmt: skip
        with pytest.raises(jlora.OptionError, match=words):
            adalora(optax.sgd(1.0), **{**ok, **bad})
    with pytest.raises(jlora.StructureError, match="80 ranks of 16"):
        adalora(optax.sgd(1.0), **{**ok, "target_rank": 20}).init(half)
    plain = jlora.lorafy({"w": jnp.ones((7, 5))}, 2, ["w"])
    for f in (orthogonality, prune, adalora(optax.sgd(1.0), **ok).init):
        with pytest.raises(jlora.StructureError, match="variant='adalora'"):
            f(plain)
