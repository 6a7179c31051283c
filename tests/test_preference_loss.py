"""DPO, IPO and SLiC against their definitions, and log-probabilities a label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import assert_close

import jlora
from jlora import train
from jlora.train import AnswerScores, dpo_loss

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (
    AnswerScores(*(jnp.asarray(RNG.normal(-9, 5, 5), jnp.float32) for _ in range(2)))
    for _ in range(2)
)
KINDS = [{}, {"label_smoothing": 0.2}, {"kind": "ipo"}, {"kind": "hinge"}]


def by_hand(policy, reference, beta=0.1, label_smoothing=0.0, kind="sigmoid"):
    """Pair by pair, in float64, as the papers have it."""
    losses = []
    for a, b, c, d in zip(*policy, *reference, strict=True):
        a, b, c, d = map(float, (a, b, c, d))
        h = (a - c) - (b - d)
        if kind == "sigmoid":
            p = 1 / (1 + np.exp(-beta * h))
            own = (1 - label_smoothing) * np.log(p)
            losses.append(-own - label_smoothing * np.log(1 - p))
        elif kind == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        else:
            losses.append(max(0.0, 1 - beta * h))
    return np.array(losses)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_loss_is_the_papers(settings, beta):
    mask = jnp.array([1, 0, 1, 1, 0])
    (total, count), metrics = jax.jit(
        lambda *args: dpo_loss(*args, mask, beta=beta, **settings)
    )(POLICY, REFERENCE)
    losses = by_hand(POLICY, REFERENCE, beta, **settings)
    np.testing.assert_allclose(total, losses @ np.asarray(mask), rtol=1e-5)
    assert count == 3
    chosen = beta * (POLICY.chosen - REFERENCE.chosen)
    np.testing.assert_allclose(metrics["reward_chosen"][0], chosen @ mask, rtol=1e-5)
    rejected = beta * (POLICY.rejected - REFERENCE.rejected)
    right = np.asarray(chosen > rejected) @ np.asarray(mask)
    assert metrics["accuracy"] == (right, 3)
    np.testing.assert_allclose(
        metrics["margin"][0], (chosen - rejected) @ mask, rtol=1e-5
    )


def test_the_reference_has_no_gradient():
    loss = lambda policy, reference: dpo_loss(policy, reference)[0][0]
    own, others = jax.grad(loss, (0, 1))(POLICY, REFERENCE)
    assert min(np.abs(x).min() for x in own) > 1e-4
    assert not np.any(others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "beta=0"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"kind": "kto"}, "kto"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "is of kind='sigmoid'"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(jlora.OptionError, match=message):
        dpo_loss(POLICY, REFERENCE, **settings)


def test_scores_of_other_shapes():
    with pytest.raises(jlora.ShapeError, match="scores of pairs"):
        dpo_loss(POLICY, AnswerScores(*(x[:3] for x in REFERENCE)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_log_probabilities_without_logits(axis, chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 5, 7))
    kernel = jax.random.normal(keys[1], (7, 23) if axis else (23, 7))
    labels = jax.random.randint(keys[2], (2, 5), 0, 23).at[0, 1].set(-100)
    weights = jnp.arange(10.0).reshape(2, 5)  # each its own cotangent

    def ours(h, w):
        log_p = train.linear_log_probs(h, w, labels, chunk=chunk)
        return jnp.sum(weights * log_p), log_p

    def plainly(h, w):
        log_p = jax.nn.log_softmax(h @ (w if axis else w.T))
        picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], -1)
        log_p = jnp.where(labels >= 0, picked[..., 0], 0)
        return jnp.sum(weights * log_p), log_p

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(hidden, kernel)
        for f in (ours, plainly)
    )
    assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert got[0][1][0, 1] == 0
