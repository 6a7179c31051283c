"""Packed rows: every example once, none cut, and the loss of the examples apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora import data, models, train

LENGTHS = [5, 3, 2, 4, 1, 6]


def examples(lengths=LENGTHS, vocab=24):
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, vocab, n).astype(np.int32) for n in lengths]
    labels = [np.where(rng.random(len(x)) < 0.7, x, data.IGNORED) for x in ids]
    return {"input_ids": ids, "labels": labels}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(9, 13))
def test_every_example_once_in_its_row(lengths, length):
    columns = examples(lengths)
    packed = data.pack(columns, length)
    assert sorted(i for row in packed.members for i in row) == list(range(len(lengths)))
    found = zip(
        *(packed.columns[k] for k in ("input_ids", "labels", "segment_ids")),
        packed.members,
        strict=True,
    )
    for ids, labels, segments, members in found:
        assert len(ids) == len(labels) == len(segments) <= length
        for number, i in enumerate(members, 1):
            own = segments == number
            np.testing.assert_array_equal(ids[own], columns["input_ids"][i])
            np.testing.assert_array_equal(labels[own][1:], columns["labels"][i][1:])
            assert labels[own][0] == data.IGNORED
        assert (np.diff(segments) >= 0).all()
    # Best fit: no two rows would go into one.
    sizes = sorted(map(len, packed.columns["input_ids"]))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > length


@pytest.mark.parametrize(
    ("columns", "length", "message"),
    [
        (examples(), 5, "example 5 has 6 tokens"),
        ({"input_ids": [np.ones(0, int)]}, 5, "example 0 has 0 tokens"),
        ({"input_ids": [np.ones(2)], "labels": [np.ones(3)]}, 5, "differ in length"),
        ({"labels": np.ones(3)}, 5, "columns of sequences"),
    ],
)
def test_what_cannot_be_packed(columns, length, message):
    with pytest.raises(jlora.DataError, match=message):
        data.pack(columns, length)


def loss_and_gradient(model, params, batches):
    """The mean loss over batches, and its gradient."""

    def totals(params, batch):
        hidden, kernel = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            segment_ids=batch.get("segment_ids"),
            method="features",
        )
        labels = jnp.pad(
            batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=data.IGNORED
        )
        return train.linear_cross_entropy(hidden, kernel, labels)

    def loss(params):
        each = [totals(params, batch) for batch in batches]
        return sum(x for x, _ in each) / sum(n for _, n in each)

    return jax.jit(jax.value_and_grad(loss))(params)


FORMS = [
    ("gpt2", {"scan_layers": True}),
    ("sliding", {"scan_layers": True, "remat": True}),
    ("sliding", {"scan_layers": True, "attn_implementation": "xla"}),
]


def small(kind, form):
    if kind != "sliding":
        return small_models.make(kind, **form)
    config = models.LlamaConfig(
        **small_models.LLAMA, model_type="mistral", sliding_window=3, vocab_size=24
    )
    model = models.Llama(config=config, **form)
    params = model.init(jax.random.key(0), small_models.IDS)["params"]
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return model, jax.tree.map(noise, params)


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_the_loss_of_packed_rows_is_that_of_the_examples(kind, form):
    model, params = small(kind, form)
    columns = examples()
    apart = data.Batches(columns, [(6, 6)], size=6, pad=0)
    packed = data.pack(columns, 11)
    together = data.Batches(packed.columns, [packed.shape], size=2, pad=0)
    assert packed.fraction > 0.9
    assert len(together) == 1
    want = loss_and_gradient(model, params, list(apart))
    got = loss_and_gradient(model, params, list(together))
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    for x, y in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


def test_without_their_numbers_the_texts_of_a_row_see_one_another():
    model, params = small_models.make("gpt2")
    packed = data.pack(examples(), 11)
    (batch,) = data.Batches(packed.columns, [packed.shape], size=2, pad=0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    apply = lambda n: model.apply({"params": params}, ids, mask, segment_ids=n)
    change = np.abs(apply(batch["segment_ids"]) - apply(None)).max(-1)
    first = batch["segment_ids"] == 1
    assert change[first].max() < 1e-5
    assert change[~first & (mask == 1)].min() > 1e-3


def test_numbers_of_another_shape():
    model, params = small_models.make("gpt2")
    with pytest.raises(jlora.ShapeError, match="segment_ids"):
        model.apply({"params": params}, small_models.IDS, segment_ids=jnp.ones((2, 3)))
