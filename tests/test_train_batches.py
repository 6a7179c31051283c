"""What a step is fed: leaves that are no arrays, and ids beyond what they count."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from tools import randomise

import jlora
import jlora.train as jt

D, H, V = 5, 7, 11


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["q"]["kernel"]) ** 2)


@pytest.fixture(scope="module")
def state():
    params = {"q": {"kernel": jnp.ones((D, H))}}
    return jt.TrainState.create(jlora.lorafy(params, 2, ["q"]), optax.sgd(0.1))


@pytest.fixture(scope="module")
def step():
    return jt.make_train_step(loss_fn, optax.sgd(0.1), donate=False)


X = np.ones((4, D), np.float32)


class Picture:
    def __array__(self, dtype=None, copy=None):
        return X


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"text": ["a", "b"]}, r"'text': text \(str\)"),
        ({"text": "a"}, r"'text': text \(str\)"),
        ({"raw": b"a"}, r"'raw': text \(bytes\)"),
        ({"meta": {"ids": {1, 2}}}, "'meta/ids': set"),
        ({"text": np.array(["a", "b"])}, r"'text': a NumPy array \[2\] of dtype <U1"),
        ({"rows": np.array([[1], [2, 3]], object)}, "'rows'.*of objects, the first a list"),
        ({"when": np.array("2020-01-01", "M8[D]")}, r"'when'.*datetime64\[D\]"),
        ({"image": Picture()}, r"'image': .*Picture; make it a NumPy array"),
        ({"ids": [[1, 2], [3, 4]]}, "'ids': a list of numbers; make it an array"),
        ({"ids": [1.0, 2.0]}, "'ids': a list of numbers"),
        ({"f": len}, "'f': builtin_function"),
        ({"n": 2**40}, f"'n': int64 with the number {2**40}, which int32"),
        ({"n": np.array([1, -(2**40)])}, f"'n': int64 with the number -{2**40}"),
    ],
)  # fmt: skip
def test_what_is_no_array_is_named(state, step, more, words):
    batch = {"x": X, **more}
    evaluation = jt.make_eval_step(lambda p, b: {"loss": loss_fn(p, b, None)})
    for run in (
        lambda: step(state, batch),
        lambda: step.lower(state, batch),
        lambda: evaluation(state, batch),
        lambda: jt.evaluate(evaluation, state.params, [batch]),
        lambda: jt.check_gradients(loss_fn, state, batch),
    ):
        with pytest.raises(jlora.DataError, match=words) as error:
            run()
        assert len(str(error.value)) < 500
        assert "return_tensors" in str(error.value)


def test_under_pmap_too(state):
    step = jt.make_train_step(loss_fn, optax.sgd(0.1), parallel="pmap")
    with pytest.raises(jlora.DataError, match="'text'"):
        step(jt.replicate(state), {"x": X[None], "text": ["a"]})


def test_a_batch_that_is_one_leaf_is_called_so(state, step):
    with pytest.raises(jlora.DataError, match=r"'the batch': text \(str\)"):
        step(state, "x")
    with pytest.raises(jlora.DataError, match=r"'the batch': text \(str\)"):
        jt.evaluate(jt.make_eval_step(lambda p, b: {}), state, {"x": X})


def test_all_that_jax_takes_is_taken(state, step):
    want = step(state, {"x": X})[1]["loss"]
    for more in (
        {"n": 3}, {"t": 0.5}, {"yes": True}, {"n": np.int64(3)}, {"none": None},
        {"ids": np.arange(3)}, {"empty": np.zeros((0, 2), np.int64)}, {"list": []},
        {"b": np.ones(2, jnp.bfloat16)}, {"key": jax.random.key(0)}, {"pair": (X, X)},
        {"xs": [X, X]}, {"int4": jnp.ones(2, jnp.int4)}, {"big": np.array([2**31 - 1])},
    ):  # fmt: skip
        assert step(state, {"x": X, **more})[1]["loss"] == want


def test_mappings_are_dicts(state, step):
    plain = {"x": X, "more": {"y": X}}
    batch = collections.UserDict(x=X, more=collections.UserDict(y=X))
    loss = lambda p, b, k: loss_fn(p, b, k) + jnp.mean(b["more"]["y"])
    both = jt.make_train_step(loss, optax.sgd(0.1), donate=False)
    assert both(state, batch)[1]["loss"] == both(state, plain)[1]["loss"]
    assert both.cache_size() == 1
    assert step(state, [collections.UserDict(x=X)][0])[1]["loss"] > 0


# -- labels that are no class ----------------------------------------------------------


@pytest.fixture(params=["cross_entropy", "linear_cross_entropy"])
def loss(request):
    if request.param == "cross_entropy":
        return lambda labels, mask=None: jt.cross_entropy(
            jnp.zeros((*labels.shape, V)), labels, mask
        )
    return lambda labels, mask=None: jt.linear_cross_entropy(
        jnp.ones((*labels.shape, D)), jnp.ones((D, V)), labels, mask
    )


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_a_label_beyond_the_classes_is_named_with_its_place(loss, as_array):
    labels = np.zeros((3, 4), np.int32)
    labels[1, 2], labels[2, 0] = V, 90
    with pytest.raises(
        jlora.DataError,
        match=rf"{V} at \[1, 2\] is beyond the {V} classes, 0..10 \(and 1",
    ):
        loss(as_array(labels))
    mask = np.ones((3, 4))
    mask[1, 2] = 0
    with pytest.raises(jlora.DataError, match=r"90 at \[2, 0\] is beyond"):
        loss(as_array(labels), as_array(mask))
    mask[2, 0] = 0
    assert np.isfinite(loss(as_array(labels), as_array(mask))[0])
    assert loss(as_array(np.full((2,), V - 1)))[1] == 2
    assert loss(as_array(np.full((2,), -100)))[1] == 0
    assert loss(as_array(np.zeros((0,), int)))[1] == 0


def test_without_values_a_label_beyond_the_classes_is_nan(loss):
    assert np.isnan(jax.jit(loss)(jnp.array([0, V]))[0])


def test_labels_are_integers(loss):
    with pytest.raises(jlora.DtypeError, match=r"labels are float32\[3\][\s\S]*argmax"):
        loss(jnp.zeros(3))


# -- ids in a step ---------------------------------------------------------------------


def language_params(rows=V):
    keys = jax.random.split(jax.random.key(0))
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (rows, D))},
        "head": {"kernel": jax.random.normal(keys[1], (D, V))},
    }
    return randomise(jlora.lorafy(params, 2, ["embed", "head"]), jax.random.key(1))


def lookups(name):
    module = linen.Embed(V, D)
    return {
        "index": lambda p, ids: p["embed"]["embedding"][ids],
        "take": lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=0),
        "linen": lambda p, ids: module.apply({"params": p["embed"]}, ids),
        "cast": lambda p, ids: p["embed"]["embedding"].astype(jnp.bfloat16)[ids],
    }[name]


def language_loss(lookup, *, head="cross_entropy", mask=True, shifted=False):
    def loss(params, batch, key=None):
        hidden = lookup(params, batch["ids"]).astype(jnp.float32)
        labels, weights = batch["labels"], batch["mask"] if mask else None
        if shifted:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
            weights = weights[:, 1:] if mask else None
        if head == "linear_cross_entropy":
            w = params["head"]["kernel"]
            return jt.linear_cross_entropy(hidden, w, labels, weights)
        return jt.cross_entropy(hidden @ params["head"]["kernel"], labels, weights)

    return loss


def language_batch(**changes):
    rng = np.random.default_rng(3)
    batch = {
        "ids": rng.integers(0, V, (4, 5)),
        "labels": rng.integers(0, V, (4, 5)),
        "mask": np.ones((4, 5), np.float32),
    }
    for name, (place, value) in changes.items():
        batch[name][place] = value
    return batch


def step_of(loss, **options):
    tx = optax.sgd(0.1)
    state = jt.TrainState.create(language_params(), tx)
    step = jt.make_train_step(loss, tx, donate=False, **options)
    return lambda batch: step(state, batch)[1], step


@pytest.mark.parametrize("name", ["index", "take", "linen", "cast"])
def test_an_id_beyond_the_table_is_named_before_the_step(name):
    run, step = step_of(language_loss(lookups(name)))
    words = rf"'ids': {V} at \[3, 1\] is beyond the {V} rows, 0..10"
    for _ in range(2):
        with pytest.raises(jlora.DataError, match=words):
            run(language_batch(ids=((3, 1), V)))
    assert np.isfinite(run(language_batch())["loss"])
    with pytest.raises(jlora.DataError, match=words):
        run(language_batch(ids=((3, 1), V)))
    with pytest.raises(jlora.DataError, match=r"'ids': -100 at \[0, 0\]"):
        run(language_batch(ids=((0, 0), -100)))
    assert np.isfinite(run(language_batch(ids=((0, 0), -1)))["loss"])
    assert step.cache_size() == 1


@pytest.mark.parametrize("head", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_label_beyond_the_classes_is_named_before_the_step(head, accumulate, shifted):
    loss = language_loss(lookups("take"), head=head, shifted=shifted)
    run, step = step_of(loss, accumulate=accumulate)
    with pytest.raises(
        jlora.DataError, match=rf"'labels': 90 at \[2, 3\] is beyond the {V} classes"
    ):
        run(language_batch(labels=((2, 3), 90)))
    masked = language_batch(labels=((2, 3), 90), mask=((2, 3), 0))
    assert np.isfinite(run(masked)["loss"])
    assert np.isfinite(run(language_batch(labels=((2, 3), -100)))["loss"])
    if shifted:  # the first labels are cut off
        assert np.isfinite(run(language_batch(labels=((2, 0), 90)))["loss"])
    assert step.cache_size() == 1


def test_ids_in_evaluation_and_without_a_mask():
    loss = language_loss(lookups("take"), mask=False)
    step = jt.make_eval_step(lambda p, b: {"loss": loss(p, b)})
    params = language_params()
    with pytest.raises(jlora.DataError, match=r"'labels': 11 at \[0, 4\]"):
        jt.evaluate(step, params, [language_batch(labels=((0, 4), V))])
    with pytest.raises(jlora.DataError, match=r"'ids': 11 at \[0, 4\]"):
        jt.evaluate(step, params, [language_batch(), language_batch(ids=((0, 4), V))])
    assert jt.evaluate(step, params, [language_batch()])["loss"] > 0


def test_ids_on_a_device_are_looked_at_once():
    run, _ = step_of(language_loss(lookups("take")))
    on_device = lambda **changes: jax.tree.map(jnp.asarray, language_batch(**changes))
    with pytest.raises(jlora.DataError, match=r"'ids': 11 at"):
        run(on_device(ids=((0, 4), V)))
    run(on_device())
    assert run(on_device(ids=((0, 4), V)))["nonfinite"]


@pytest.mark.parametrize(
    "within",
    [
        lambda ids: jnp.where(ids >= V, 0, ids),
        lambda ids: jnp.minimum(ids, V - 1),
        lambda ids: ids % V,
    ],
)
def test_ids_that_the_loss_brings_within_bounds_are_its_own_affair(within):
    inner = language_loss(lookups("take"))
    loss = lambda p, b, k: inner(p, {**b, "ids": within(b["ids"])})
    run, _ = step_of(loss)
    assert np.isfinite(run(language_batch(ids=((0, 4), V + 2)))["loss"])


def test_columns_that_are_no_ids_may_hold_anything():
    inner = language_loss(lookups("index"), mask=False)

    def loss(params, batch, key):
        return inner(params, {"ids": batch[..., 0], "labels": batch[..., 1]})

    run, _ = step_of(loss)
    columns = np.zeros((4, 5, 3), np.int64)
    columns[..., 2] = 1000
    assert np.isfinite(run(columns)["loss"])
    columns[1, 2, 1] = V
    with pytest.raises(jlora.DataError, match=r"'the batch': 11 at \[1, 2, 1\]"):
        run(columns)


def test_ids_under_vmap_and_checkpoint():
    inner = language_loss(lookups("take"), mask=False)

    @jax.checkpoint
    def one(params, ids, labels):
        return inner(params, {"ids": ids, "labels": labels})

    def loss(params, batch, key):
        totals = jax.vmap(one, (None, 0, 0))(params, batch["ids"], batch["labels"])
        return jax.tree.map(jnp.sum, totals)

    run, _ = step_of(loss)
    for name in ("ids", "labels"):
        with pytest.raises(jlora.DataError, match=rf"'{name}': 11 at \[2, 3\]"):
            run(language_batch(**{name: ((2, 3), V)}))
    assert np.isfinite(run(language_batch())["loss"])
