"""Sums of adapters: exact for all variants, compressed, thinned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import adapter_of, assert_close, result_shapes

import jlora

CLOSE = dict(rtol=2e-5, atol=2e-5)
MANY = {"plain": 0.7, "dora": -0.4, "rslora": 2.0, "other": 0.25}


def make_params():
    keys = jax.random.split(jax.random.key(0), 7)
    normal = jax.random.normal
    return {
        "query": {"kernel": normal(keys[0], (7, 5)), "bias": normal(keys[1], (5,))},
        "c_attn": {"kernel": normal(keys[2], (7, 15)), "bias": normal(keys[3], (15,))},
        "experts": normal(keys[4], (3, 7, 11)),
        "table": {"embedding": normal(keys[5], (13, 7))},
        "norm": normal(keys[6], (7,)),
    }


@pytest.fixture(scope="module")
def adapters():
    params = make_params()
    expert = jlora.Target(in_axes=(1,), out_axes=(2,), batch_axes=(0,))
    both = {"query": jlora.Target(), "experts": expert}

    out = params
    for name, tree in {
        "plain": adapter_of(params, 1, 2, both),
        "dora": adapter_of(params, 2, 3, both, dora=True),
        "rslora": adapter_of(params, 3, 2, ["query"], rslora=True, lora_bias=True),
        "slices": adapter_of(params, 4, 2, {"c_attn": jlora.Target(rank=1)}),
        "value": adapter_of(params, 5, 2, ["value"], dora=True),
        "other": adapter_of(params, 6, 1, ["query", "value"]),
        "rows": adapter_of(
            params, 7, 1, ["query"], trainable_tokens={"table": [3, 1]}, train=["norm"]
        ),
        "row": adapter_of(
            params, 8, 1, ["query"], trainable_tokens={"table": [9, 3]}, train=["norm"]
        ),
    }.items():
        out = jlora.add(out, name, tree)
    return out


@functools.cache
def merge_all():
    return jax.jit(lambda s: {name: jlora.merge(s[name]) for name in s.names})


def sum_of(adapters, weights):
    """The base with the weighted sum of what each adapter changes, in NumPy."""
    each = jax.device_get(merge_all()(adapters))
    base = jax.device_get(adapters.base)
    return jax.tree.map(
        lambda b, *xs: (
            b + sum(w * (x - b) for w, x in zip(weights.values(), xs, strict=True))
        ),
        base,
        *[each[name] for name in weights],
    )


def dense(tree):
    return jax.device_get(jax.jit(jlora.merge)(tree))


# -- exact -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        MANY,
        {"value": 1.5, "slices": 0.3, "other": -1.0},
        {"rows": 0.7, "row": -2.0, "plain": 0.5},
    ],
    ids=lambda w: "+".join(w),
)
def test_the_sum_is_exact(adapters, weights):
    tree, report = jlora.weighted(adapters, weights, report=True)
    want = sum_of(adapters, weights)
    assert any(
        np.any(x != y)
        for x, y in zip(*map(jax.tree.leaves, (want, adapters.base)), strict=True)
    )
    assert_close(
        jax.tree.map(jnp.asarray, dense(tree)), jax.tree.map(jnp.asarray, want), **CLOSE
    )
    assert all(k.lost == 0 and k.rank == k.joined for k in report)
    assert "lost to compression" in str(report)
    assert tree["query"]["kernel"].base is adapters.base["query"]["kernel"]


def test_an_adapter_and_its_negation_cancel(adapters):
    s = jlora.add(adapters, "minus", jlora.weighted(adapters, {"plain": -1.0}))
    both = jlora.activate(s, ["plain", "minus"]).params
    for tree in (both, jlora.weighted(s, {"plain": 1.0, "minus": 1.0})):
        assert_close(jax.jit(jlora.merge)(tree), s.base, rtol=1e-6, atol=1e-6)


def test_weights_may_be_traced_and_have_gradients(adapters):
    """The derivative by a weight is the inner product with that adapter's update."""
    names = ("plain", "dora", "rslora")

    @jax.jit
    def check(s, w):
        def loss(w):
            tree = jlora.weighted(s, dict(zip(names, w, strict=True)))
            return jnp.sum(jnp.sin(jlora.merge(tree)["query"]["kernel"]))

        base = s.base["query"]["kernel"]
        each = [jlora.merge(s[n])["query"]["kernel"] - base for n in names]
        at = base + sum(x * d for x, d in zip(w, each, strict=True))
        want = jnp.stack([jnp.sum(jnp.cos(at) * d) for d in each])
        return jax.grad(loss)(w), want

    got, want = check(adapters, jnp.asarray([0.7, 0.2, -0.3]))
    assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_a_sum_keeps_the_factors_dtype_and_forms_no_update(adapters):
    base = {"query": {"kernel": jnp.ones((67, 59), jnp.bfloat16)}}
    s = base
    for n, dtype in enumerate((jnp.bfloat16, jnp.float32, jnp.bfloat16)):
        s = jlora.add(s, str(n), adapter_of(base, n, 2, ["query"], dtype=dtype))
    for names, want in (("02", jnp.bfloat16), ("01", jnp.float32)):
        tree = jlora.weighted(s, dict.fromkeys(names, 0.5))
        assert tree["query"]["kernel"].adapters[""].b.dtype == want
    for how in ({}, {"combination": "svd", "rank": 1}):
        f = lambda s: jlora.split(jlora.weighted(s, {"0": 0.5, "2": 1.0}, **how))[0]
        assert (67, 59) not in result_shapes(f, s)


def test_dora_whose_gains_cancel_has_no_sum():
    base = {"query": jnp.eye(5)}
    s = jlora.add(base, "a", adapter_of(base, 1, 2, ["query"], dora=True))
    gain = jax.jit(lambda s: s["a"]["query"].with_gains().adapters[""].gain)(s)
    weight = float(1 / (1 - gain[0]))  # 1 + w(g - 1) = 0
    with pytest.raises(jlora.StructureError, match="cancel a column of 'query'"):
        jlora.weighted(s, {"a": weight})


# -- compressed ------------------------------------------------------------------------


def test_compression_is_the_best_of_its_rank_and_says_what_it_lost(adapters):
    weights = {"plain": 0.7, "other": -0.3}
    tree, report = jlora.weighted(adapters, weights, "svd", rank=2, report=True)
    want = sum_of(adapters, weights)
    told = {k.path: k for k in report}
    for path, get in (
        ("query/kernel", lambda p: p["query"]["kernel"][None]),
        ("experts", lambda p: p["experts"]),
    ):
        exact = get(want) - get(adapters.base)
        got = get(dense(tree)) - get(adapters.base)
        u, s, vt = np.linalg.svd(exact, full_matrices=False)
        best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        np.testing.assert_allclose(got, best, **CLOSE)
        lost = np.linalg.norm(exact - best) / np.linalg.norm(exact)
        assert told[path].lost == pytest.approx(lost, rel=1e-3, abs=1e-6)
        assert told[path].norm == pytest.approx(np.linalg.norm(exact), rel=1e-4)
    assert (told["query/kernel"].joined, told["query/kernel"].rank) == (3, 2)
    assert told["query/kernel"].lost > 1e-3


def test_compressed_dora_keeps_its_gains(adapters):
    """At full rank nothing is lost, magnitudes included; `rank` alone compresses too."""
    weights = {"dora": 0.6, "plain": 0.8}
    whole = jlora.weighted(adapters, weights, "svd", rank=5)
    low, report = jlora.weighted(adapters, weights, rank=4, report=True)
    want = sum_of(adapters, weights)
    assert_close(dense(whole)["query"], want["query"], **CLOSE)
    assert low["query"]["kernel"].adapters[""].rank == 4
    assert low["query"]["kernel"].adapters[""].magnitude is not None
    off = np.linalg.norm(dense(low)["query"]["kernel"] - want["query"]["kernel"])
    (kernel,) = (k for k in report if k.path == "query/kernel")
    assert off == pytest.approx(kernel.lost * kernel.norm, rel=1e-3)


# -- thinned ---------------------------------------------------------------------------


def largest(x, density):
    count = int(density * x.size)
    least = np.sort(np.abs(x), axis=None)[::-1][count - 1]
    return np.where(np.abs(x) >= least, x, 0)


def elected(updates, weights, by="total"):
    """TIES as its paper writes it, with weights in the mean."""
    signed = [np.sign(w) * x for w, x in zip(weights, updates, strict=True)]
    votes = signed if by == "total" else [np.sign(x) for x in signed]
    sign = np.where(sum(votes) >= 0, 1, -1)
    total = sum(
        abs(w) * np.where(np.sign(x) == sign, x, 0)
        for w, x in zip(weights, signed, strict=True)
    )
    return total / np.maximum(sum((np.sign(x) == sign).astype(int) for x in signed), 1)


@pytest.mark.parametrize(
    ("weights", "by"), [((0.7, 0.6, 0.5), "total"), ((1.0, -1.0, 0.5), "frequency")]
)
def test_ties_and_pruning_are_those_of_the_updates(adapters, weights, by):
    names = ("plain", "other", "dora")
    given = dict(zip(names, weights, strict=True))
    base = adapters.base["query"]["kernel"]
    each = jax.device_get(merge_all()(adapters))
    updates = [largest(each[n]["query"]["kernel"] - base, 0.4) for n in names]
    for how, want in (
        (("ties", {"majority_sign": by}), elected(updates, weights, by)),
        (
            ("magnitude_prune_svd", {}),
            sum(w * x for w, x in zip(weights, updates, strict=True)),
        ),
    ):
        tree = jlora.weighted(adapters, given, how[0], rank=5, density=0.4, **how[1])
        got = dense(tree)["query"]["kernel"] - base
        np.testing.assert_allclose(got, want, **CLOSE)
        assert tree["query"]["kernel"].adapters[""].rank == 5


def test_every_expert_and_every_part_is_thinned_by_itself(adapters):
    weights = {"plain": 1.0, "dora": 0.5}
    tree = jlora.weighted(adapters, weights, "ties_svd", rank=7, density=0.3)
    each = jax.device_get(merge_all()(adapters))
    got = dense(tree)["experts"] - adapters.base["experts"]
    for n in range(3):
        one = [
            largest(each[k]["experts"][n] - adapters.base["experts"][n], 0.3)
            for k in weights
        ]
        np.testing.assert_allclose(got[n], elected(one, (1.0, 0.5)), **CLOSE)
    # Biases, whole leaves and rows are thinned as updates too.
    weights = {"rows": 1.0, "row": -0.5, "rslora": 1.0}
    tree = dense(jlora.weighted(adapters, weights, "ties", density=0.5))
    for get in (
        lambda p: p["norm"],
        lambda p: p["table"]["embedding"][np.array([3, 1, 9])],
    ):
        one = [
            largest(np.asarray(get(each[k]) - get(adapters.base)), 0.5)
            for k in ("rows", "row")
        ]
        got = get(tree) - get(adapters.base)
        np.testing.assert_allclose(got, elected(one, (1.0, -0.5)), **CLOSE)
    bias = lambda p: np.asarray(p["query"]["bias"])
    want = largest(bias(each["rslora"]) - bias(adapters.base), 0.5)
    np.testing.assert_allclose(bias(tree) - bias(adapters.base), want, **CLOSE)


def test_dare_is_the_sum_on_average_and_at_density_one(adapters):
    weights = {"plain": 0.7, "rslora": 0.5}
    base = adapters.base["query"]["kernel"]
    want = sum_of(adapters, weights)["query"]["kernel"] - base

    @jax.jit
    def update(s, key):
        tree = jlora.weighted(s, weights, "dare_linear", density=0.5, rank=5, key=key)
        return jlora.merge(tree)["query"]["kernel"] - base

    keys = jax.random.split(jax.random.key(1), 400)
    draws = jax.lax.map(lambda key: update(adapters, key), keys)
    assert_close(update(adapters, keys[3]), draws[3], **CLOSE)
    assert jnp.any(draws[0] != draws[1])
    spread = jnp.std(draws, axis=0) / 20
    assert jnp.max(jnp.abs(jnp.mean(draws, axis=0) - want) / (spread + 1e-6)) < 5
    tree = jlora.weighted(
        adapters, weights, "dare_ties", density=1.0, rank=5, key=keys[0]
    )
    each = jax.device_get(merge_all()(adapters))
    one = [each[n]["query"]["kernel"] - base for n in weights]
    got = dense(tree)["query"]["kernel"] - base
    np.testing.assert_allclose(got, elected(one, (0.7, 0.5)), **CLOSE)


# -- bad input -------------------------------------------------------------------------

TWO = {"plain": 0.7, "other": 0.3}
BAD = {
    "lists": (
        lambda s: jlora.weighted(s, ["plain", "other"], [1, 2]),
        "weight for each",
    ),
    "no weights": (lambda s: jlora.weighted(s, {}), "weight for each"),
    "two for one": (
        lambda s: jlora.weighted(s, {"plain": [1.0, 2.0]}),
        "finite number",
    ),
    "not finite": (
        lambda s: jlora.weighted(s, {"plain": float("nan")}),
        "finite number",
    ),
    "a flag": (lambda s: jlora.weighted(s, {"plain": True}), "finite number"),
    "unknown": (lambda s: jlora.weighted(s, {"plane": 1.0}), "Did you mean 'plain'"),
    "no set": (lambda s: jlora.weighted(s["plain"], TWO), "takes a set"),
    "how": (lambda s: jlora.weighted(s, TWO, "mean"), "combination='mean'"),
    "rank": (lambda s: jlora.weighted(s, TWO, "svd", rank=0), "1 or more"),
    "no density": (lambda s: jlora.weighted(s, TWO, "ties"), "density=None"),
    "density": (lambda s: jlora.weighted(s, TWO, "ties", density=1.5), "density=1.5"),
    "no key": (lambda s: jlora.weighted(s, TWO, "dare_ties", density=0.5), "pass key="),
    "a density": (lambda s: jlora.weighted(s, TWO, density=0.5), "takes none"),
    "sign": (
        lambda s: jlora.weighted(s, TWO, "ties", density=0.5, majority_sign="most"),
        "majority_sign='most'",
    ),
    "unlike": (
        lambda s: jlora.weighted(s, {"plain": 1.0, "norms": 1.0}),
        "no sum is an adapter",
    ),
    "shape": (lambda s: jlora.weighted(s, {"grown": 1.0}), r"\(7,\).*shape \(9,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(adapters, case):
    call, told = BAD[case]
    s = jlora.add(
        adapters, "norms", jlora.lorafy(adapters.base, targets=[], train=["query"])
    )
    tree = jlora.lorafy(adapters.base, targets=[], train=["norm"])
    s = jlora.add(s, "grown", {**tree, "norm": jlora.Full(jnp.ones(9))})
    with pytest.raises(jlora.LoraError, match=f"(?i){told}"):
        call(s)
