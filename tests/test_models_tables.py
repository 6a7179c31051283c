"""Another number of tokens, and a head of its own."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import inputs, logits, make

import jlora
from jlora import models
from jlora._errors import ShapeError, StructureError

CASES = [
    (kind, tied)
    for kind in ("t5", "gpt2", "llama", "gemma2", "roberta")
    for tied in ((True,) if kind == "roberta" else (True, False))
]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_new_tokens_get_the_mean_and_the_others_their_logits(kind, tied):
    model, params = make(kind, tied=tied)
    bigger, more = models.resize_vocabulary(model, params, 27)
    assert bigger.config.vocab_size == 27
    assert model.config.vocab_size == 24
    want, got = logits(model, params, kind), logits(bigger, more, kind)
    assert got.shape == (2, 4, 27)
    np.testing.assert_allclose(got[..., :24], want, rtol=1e-5, atol=1e-5)
    if kind != "gemma2":  # whose logits are capped
        mean = np.broadcast_to(want.mean(-1, keepdims=True), (2, 4, 3))
        np.testing.assert_allclose(got[..., 24:], mean, rtol=1e-4, atol=1e-4)
    again, same = models.resize_vocabulary(bigger, more, 24)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_sizes_are_rounded_up_and_stacks_stay_stacked():
    model, params = make("llama", scan_layers=True, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    bigger, more = models.resize_vocabulary(
        model, params, np.int64(25), pad_to_multiple_of=8
    )
    assert bigger.config.vocab_size == 32
    assert (bigger.scan_layers, bigger.dtype) == (True, jnp.bfloat16)
    table = more["model"]["embed_tokens"]["embedding"]
    assert table.dtype == jnp.bfloat16
    assert table.shape == (32, 16)
    assert jax.tree.structure(more) == jax.tree.structure(params)


@pytest.mark.parametrize("size", [0, -3, 2.5, "30", None])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ShapeError, match="size is"):
        models.resize_vocabulary(*make("gpt2"), size)


@pytest.mark.parametrize(
    "change", [models.untie, lambda m, p: models.resize_vocabulary(m, p, 30)]
)
def test_trees_with_adapters_and_of_other_models_are_refused(change):
    model, params = make("gpt2")
    tree = jlora.lorafy(params, 2, ["query"])
    with pytest.raises(StructureError, match="comes later"):
        change(model, tree)
    with pytest.raises(StructureError, match=r"wte/embedding: \(26, 12\), wanted"):
        change(model, make("gpt2", 26)[1])


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "gemma2"])
def test_an_untied_head_begins_as_the_embedding(kind, tmp_path):
    model, params = make(kind)
    apart, tree = models.untie(model, params)
    assert not apart.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    want = logits(model, params, kind)
    np.testing.assert_allclose(logits(apart, tree, kind), want, rtol=1e-5, atol=1e-5)
    assert "lm_head" not in params
    same_model, same = models.untie(apart, tree)
    assert same_model is apart
    assert same is tree
    # On loading, in the file's dtype and the sharding of its path.
    models.save(model, params, tmp_path / "tied")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    place = lambda path, shape: rows if path == "lm_head/kernel" else None
    loaded, read = models.load(tmp_path / "tied", untie=True, sharding=place)
    assert loaded.config == apart.config
    assert read["lm_head"]["kernel"].sharding == rows
    jax.tree.map(np.testing.assert_array_equal, read, tree)
    # And written as it is.
    models.save(loaded, read, tmp_path / "apart")
    said = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False
    again, back = models.load(tmp_path / "apart", untie=True)
    assert again.config == apart.config
    np.testing.assert_allclose(logits(again, back, kind), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_an_adapter_on_the_untied_head_leaves_the_embedding(kind):
    model, params = models.untie(*make(kind))
    tree = jlora.lorafy(params, 2, ["lm_head"], key=jax.random.key(0))
    trained = jax.tree.map(
        lambda x, on: x + 0.2 if on else x, tree, jlora.trainable_mask(tree)
    )
    apply = jlora.lora(lambda p: model.apply({"params": p}, *inputs(kind)))
    got = np.asarray(apply(trained))
    merged = jlora.merge(trained)
    np.testing.assert_allclose(got, logits(model, merged, kind), rtol=1e-5, atol=1e-5)
    delta = merged["lm_head"]["kernel"] - params["lm_head"]["kernel"]
    assert float(jnp.abs(delta).max()) > 0.01
    merged["lm_head"] = params["lm_head"]
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_encoders_cannot_be_untied(tmp_path):
    model, params = make("roberta")
    with pytest.raises(StructureError, match="BertMaskedLM cannot be untied"):
        models.untie(model, params)
    models.save(model, params, tmp_path / "model")
    with pytest.raises(StructureError, match="cannot be untied"):
        models.load(tmp_path / "model", untie=True)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama", "gemma2"])
def test_untied_models_compute_the_same_in_pytorch_live(kind, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model, params = models.untie(*make(kind))
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head + 0.2 * jax.random.normal(
        jax.random.key(9), head.shape
    )
    models.save(model, params, tmp_path / "model")
    make_theirs = (
        transformers.AutoModelForSeq2SeqLM
        if kind == "t5"
        else transformers.AutoModelForCausalLM
    )
    theirs = make_theirs.from_pretrained(tmp_path / "model").eval()
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    given = dict(zip(names, inputs(kind), strict=False))
    tensors = {k: torch.tensor(v) for k, v in given.items() if v is not None}
    with torch.no_grad():
        want = theirs(**tensors).logits.numpy()
    got = logits(model, params, kind)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", False)])
def test_resized_tables_are_pytorchs_live(kind, tied, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model, params = make(kind, tied=tied)
    models.save(model, params, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.eval().resize_token_embeddings(29)
    bigger, more = models.resize_vocabulary(model, params, 29)
    models.save(bigger, more, tmp_path / "ours")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[3, 25, 28, 6]])
    with torch.no_grad():
        want, got = theirs(ids).logits, ours.eval()(ids).logits
    np.testing.assert_allclose(got, want, atol=1e-3)
