"""Packed rows of encoders and of pairs: the loss, value and gradient, of examples apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import CALLS, CUDA, as_cudnn, calls_in, cudnn, scores_in  # noqa: F401

import jlora
from jlora import data, models, train
from jlora.tasks import seq2seq_loss

SOURCES, TARGETS = [5, 3, 2, 4, 1, 6], [2, 4, 3, 1, 5, 2]
ROOM = (11, 9)


def rows(lengths, seed=0, vocab=24):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).astype(np.int32) for n in lengths]


def pairs(sources=SOURCES, targets=TARGETS):
    return {"input_ids": rows(sources), "labels": rows(targets, 1)}


def masked(lengths=SOURCES):
    ids = rows(lengths)
    rng = np.random.default_rng(2)
    labels = [np.where(rng.random(len(x)) < 0.6, x, data.IGNORED) for x in ids]
    labels[3][0] = ids[3][0]  # a label of an example's first token counts here
    return {"input_ids": ids, "labels": labels}


lengths = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(9, 13), st.integers(7, 9))
def test_every_pair_once_with_both_its_sides(both, source, target):
    columns = pairs(*zip(*both, strict=True))
    packed = data.pack(columns, (source, target))
    assert sorted(i for row in packed.members for i in row) == list(range(len(both)))
    assert packed.shape == (source, target, source, target)
    for row, members in enumerate(packed.members):
        own = {name: column[row] for name, column in packed.columns.items()}
        assert len(own["input_ids"]) == len(own["segment_ids"]) <= source
        assert len(own["labels"]) == len(own["decoder_segment_ids"]) <= target
        for number, i in enumerate(members, 1):
            for name, segments in (
                ("input_ids", "segment_ids"),
                ("labels", "decoder_segment_ids"),
            ):
                part = own[name][own[segments] == number]
                np.testing.assert_array_equal(part, columns[name][i])


def test_more_rows_than_are_looked_through(monkeypatch):
    monkeypatch.setattr("jlora.data._packing.OPEN", 2)
    rng = np.random.default_rng(0)
    both = rng.integers(1, 6, (60, 2)).tolist()
    packed = data.pack(pairs(*zip(*both, strict=True)), (10, 10))
    assert sorted(i for row in packed.members for i in row) == list(range(60))
    assert packed.fraction > 0.7


def test_pairs_in_rows_of_one_length():
    with pytest.raises(jlora.DataError, match=r"both lengths: pack\(columns"):
        data.pack(pairs(), 11)
    with pytest.raises(jlora.DataError, match="example 4 has 5 tokens in labels"):
        data.pack(pairs(), (11, 4))


def check_equal(loss_fn, params, apart, packed, size):
    """The mean loss of packed rows, and its gradient, are those of examples apart."""
    together = data.Batches(packed.columns, [packed.shape], size=size, pad=0)

    def mean(params, batches):
        each = [loss_fn(params, batch, None) for batch in batches]
        return sum(x for x, _ in each) / sum(n for _, n in each)

    both = jax.jit(jax.value_and_grad(mean))
    want, got = both(params, list(apart)), both(params, list(together))
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    for x, y in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-4, atol=3e-6)


@pytest.fixture(params=["einsum", "cudnn"])
def form(request, monkeypatch):
    if request.param == "einsum":
        return {"scan_layers": True}
    # The arguments that cuDNN would get are checked; the numbers are XLA's.
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    return {"attn_implementation": "cudnn"}


def test_t5(form):
    model, params = small_models.make("t5", **form)
    columns = pairs()
    apart = data.Batches(columns, [(6, 5)], size=6, pad=0)
    packed = data.pack(columns, ROOM)
    assert len(packed.members) == 2
    check_equal(seq2seq_loss(model), params, apart, packed, size=2)


def masked_loss(model):
    def loss_fn(params, batch, key):
        segments = batch.get("segment_ids")
        logits = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            segment_ids=segments,
        )
        return train.cross_entropy(logits, batch["labels"])

    return loss_fn


def small_bert(**form):
    config = models.BertConfig(**small_models.BERT, vocab_size=24)
    model = models.BertMaskedLM(config=config, **form)
    start = jax.jit(lambda: model.init(jax.random.key(0), small_models.IDS)["params"])
    noise = lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape)
    return model, jax.tree.map(lambda x: np.float32(noise(x)), start())


def test_masked_lm(form):
    """RoBERTa's by einsum; BERT's, whose positions begin at 0, by the kernel."""
    roberta = "scan_layers" in form
    model, params = (
        small_models.make("roberta", **form) if roberta else small_bert(**form)
    )
    columns = masked()
    apart = data.Batches(columns, [(6, 6)], size=6, pad=1 if roberta else 0)
    packed = data.pack(columns, 11, causal=False)
    check_equal(masked_loss(model), params, apart, packed, size=2)


def test_what_is_seen_across_without_numbers():
    """The tests above would see it: without segments the outputs are others."""
    model, params = small_models.make("t5")
    packed = data.pack(pairs(), ROOM)
    (batch,) = data.Batches(packed.columns, [packed.shape], size=2, pad=0)
    loss = jax.jit(seq2seq_loss(model))
    bare = {k: v for k, v in batch.items() if "segment" not in k}
    assert abs(loss(params, bare, None)[0] - loss(params, batch, None)[0]) > 1e-2


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert"])
def test_programs_of_packed_rows_for_cuda_hold_the_kernel(family, cudnn):  # noqa: F811
    make, config = CUDA[family]
    bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = make(config, attn_implementation="cudnn", **bf16)
    ids = jnp.ones((2, 7), jnp.int32)
    args, more = (ids, ids), {"segment_ids": ids}
    if family == "t5":
        args, more = (ids[:, :6], ids[:, :6], ids), {"segment_ids": ids[:, :6]}
        more["decoder_segment_ids"] = ids
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]

    def loss(params):
        y = model.apply({"params": params}, *args, **more)
        return jnp.mean(y.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace(r"\22", '"')
    assert calls_in(text, backward=True) == CALLS[family]
    assert not scores_in(text)


def test_one_side_without_numbers():
    model, params = small_models.make("t5")
    ids = small_models.IDS
    apply = lambda **more: model.apply({"params": params}, ids, None, ids, **more)
    with pytest.raises(jlora.ShapeError, match="one is missing"):
        apply(segment_ids=jnp.ones_like(ids))
    with pytest.raises(jlora.ShapeError, match=r"decoder_segment_ids \(2, 3\)"):
        apply(segment_ids=ids, decoder_segment_ids=jnp.ones((2, 3)))


def test_a_head_of_one_answer_takes_no_packed_rows():
    shape = {**small_models.BERT, "head": "classification", "vocab_size": 24}
    model = models.BertClassifier(config=models.BertConfig(**shape))
    with pytest.raises(jlora.StructureError, match="a row holds one text"):
        model.init(jax.random.key(0), small_models.IDS, segment_ids=small_models.IDS)


def test_targets_begin_with_the_start_token():
    config = models.T5Config()
    labels, segments = (
        jnp.array([[5, 6, 1, 7, 1, -100]]),
        jnp.array([[1, 1, 1, 2, 2, 0]]),
    )
    got = models.shift_right(labels, config, segments)
    assert got.tolist() == [[0, 5, 6, 0, 7, 0]]
