"""Metrics of classes and numbers: the formulas of the textbooks, and what is refused."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jlora import DataError, OptionError, metrics

RNG = np.random.default_rng(3)
SAID, TRUE = RNG.integers(0, 2, 97), RNG.integers(0, 2, 97)


def counts(said, true):
    tp = np.sum((said == 1) & (true == 1))
    fp = np.sum((said == 1) & (true == 0))
    fn = np.sum((said == 0) & (true == 1))
    tn = np.sum((said == 0) & (true == 0))
    return int(tp), int(fp), int(fn), int(tn)


def test_metrics_of_classes_are_their_formulas():
    tp, fp, fn, tn = counts(SAID, TRUE)
    assert min(tp, fp, fn, tn) > 0  # or the formulas say little
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.accuracy(SAID, TRUE) == pytest.approx((tp + tn) / 97)
    assert metrics.f1(SAID, TRUE) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert metrics.f1(SAID, TRUE, positive=0) == pytest.approx(
        2 * tn / (2 * tn + fp + fn)
    )
    assert metrics.matthews(SAID, TRUE) == pytest.approx((tp * tn - fp * fn) / root)


def test_f1_has_averages_over_classes():
    said, true = RNG.integers(0, 3, 89), RNG.integers(0, 3, 89)
    each = [metrics.f1(said == c, true == c, positive=True) for c in range(3)]
    assert metrics.f1(said, true, average="macro") == pytest.approx(np.mean(each))
    assert metrics.f1(said, true, average="micro") == pytest.approx(
        metrics.accuracy(said, true)
    )


def test_correlations_are_their_formulas():
    x = RNG.normal(size=83)
    y = x + RNG.normal(size=83)
    dx, dy = x - x.mean(), y - y.mean()
    want = (dx @ dy) / math.sqrt((dx @ dx) * (dy @ dy))
    assert metrics.pearson(x, y) == pytest.approx(want)
    ranks = np.argsort(np.argsort(x)), np.argsort(np.argsort(y))
    assert metrics.spearman(x, y) == pytest.approx(metrics.pearson(*ranks))
    assert metrics.spearman(np.exp(x), y) == pytest.approx(metrics.spearman(x, y))


def test_numbers_and_classes_may_be_arrays_of_jax():
    x, y = jnp.asarray([1.0, 2.0, 4.0], jnp.bfloat16), jnp.asarray([1.0, 3.0, 2.0])
    assert metrics.spearman(x, y) == pytest.approx(0.5)
    assert metrics.accuracy(jnp.asarray([1, 0]), [True, True]) == 0.5
    assert metrics.accuracy(["a", "b"], ["a", "c"]) == 0.5


def test_what_is_not_defined_is_nan_and_what_found_nothing_is_nought(recwarn):
    assert math.isnan(metrics.pearson([1.0, 1.0], [1.0, 2.0]))
    assert math.isnan(metrics.spearman([1.0, 2.0], [3.0, 3.0]))
    assert metrics.f1([0, 0], [1, 0]) == metrics.f1([0, 0], [0, 0]) == 0.0
    assert metrics.matthews([1, 1], [1, 0]) == 0.0
    assert not recwarn.list


@pytest.mark.parametrize(
    ("metric", "said", "true", "message"),
    [
        ("accuracy", [1, 0], [1], "2 predictions stand beside 1 references"),
        ("accuracy", [], [], "there is no prediction"),
        ("accuracy", [[0.1, 0.9]], [1], r"shape \(1, 2\).*\n.*argmax"),
        ("matthews", [0.0, 1.0], [0, 1], "predictions are float64 and no classes"),
        ("accuracy", ["0", "1"], [0, 1], "in the same way"),
        ("f1", [0, 1, 2], [0, 1, 2], 'here are 3: .0, 1, 2..\nPass average="macro"'),
        ("pearson", [1.0, np.nan], [1.0, 2.0], "predictions hold nan at 1"),
        ("spearman", [1.0], [2.0], "two examples at least"),
        ("spearman", ["a", "b"], [1.0, 2.0], "needs numbers"),
    ],
)
def test_what_cannot_be_scored_is_an_error(metric, said, true, message):
    with pytest.raises(DataError, match=message):
        getattr(metrics, metric)(said, true)


def test_glue_takes_the_metrics_of_its_leaderboard():
    assert metrics.glue("qqp", SAID, TRUE) == {
        "accuracy": metrics.accuracy(SAID, TRUE),
        "f1": metrics.f1(SAID, TRUE),
    }
    x, y = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    assert metrics.glue("stsb", x, y) == {
        "pearson": metrics.pearson(x, y),
        "spearman": metrics.spearman(x, y),
    }
    assert metrics.glue("cola", SAID, TRUE) == {
        "matthews": metrics.matthews(SAID, TRUE)
    }
    for task, names in metrics.GLUE_TASKS.items():
        assert tuple(metrics.glue(task, SAID, TRUE)) == names


@pytest.mark.parametrize(("task", "near"), [("SST-2", "sst2"), ("stbs", "stsb")])
def test_a_task_that_glue_lacks_has_a_near_name(task, near):
    with pytest.raises(OptionError, match=f"Do you mean '{near}'"):
        metrics.glue(task, [1], [1])
