"""Encoder checkpoints: their spellings, heads that are chosen, what is written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_hf import assert_same, change_config, change_tensors

import jlora
from jlora import models
from jlora._errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "encoders"
EVERY = [
    (f, h) for f in ("bert", "roberta") for h in ("base", "classification", "masked_lm")
]
every = pytest.mark.parametrize(("family", "head"), EVERY)


def copied(tmp_path, family, head):
    return Path(shutil.copytree(GOLDEN / f"{family}_{head}", tmp_path / "copy"))


def respell(change):
    """Rename every tensor by a function of its name."""

    def changed(tensors):
        renamed = {change(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return changed


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves}


@every
def test_round_trip(family, head, tmp_path):
    model, params = models.load(GOLDEN / f"{family}_{head}")
    models.save(model, params, tmp_path / "saved")
    again, others = models.load(tmp_path / "saved")
    assert again.config == model.config
    assert_same(others, params)
    theirs = load_file(GOLDEN / f"{family}_{head}" / "model.safetensors")
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    given = json.loads((GOLDEN / f"{family}_{head}" / "config.json").read_text())
    assert {k: v for k, v in given.items() if v is not None}.items() <= said.items()


def test_tensors_land_under_their_names():
    _, params = models.load(GOLDEN / "roberta_classification")
    tensors = load_file(GOLDEN / "roberta_classification" / "model.safetensors")
    layer = params["roberta"]["encoder"]["layer"]["1"]
    name = "roberta.encoder.layer.1.attention.self.query.weight"
    np.testing.assert_array_equal(
        layer["attention"]["self"]["query"]["kernel"], tensors[name].T
    )
    assert layer["output"]["LayerNorm"]["weight"].shape == (12,)
    assert {p for p in paths(params) if not p.startswith("roberta")} == {
        f"classifier/{layer}/{leaf}"
        for layer in ("dense", "out_proj")
        for leaf in ("kernel", "bias")
    }
    assert len(paths(params)) == len(tensors)


@every
def test_old_spellings(family, head, tmp_path):
    folder = copied(tmp_path, family, head)
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )

    def add(tensors):
        prefix = "" if head == "base" else f"{family}."
        tensors[f"{prefix}embeddings.position_ids"] = np.arange(11)[None]

    change_tensors(folder, respell(old))
    change_tensors(folder, add)
    assert_same(
        models.load(folder)[1], models.load(GOLDEN / folder_name(family, head))[1]
    )


def folder_name(family, head):
    return f"{family}_{head}"


@every
def test_prefix_or_none(family, head, tmp_path):
    folder = copied(tmp_path, family, head)
    encoder = ("embeddings.", "encoder.", "pooler.")
    strip = lambda name: name.removeprefix(f"{family}.")
    put = lambda name: f"{family}.{name}" if name.startswith(encoder) else name
    change_tensors(folder, respell(put if head == "base" else strip))
    assert_same(
        models.load(folder)[1], models.load(GOLDEN / folder_name(family, head))[1]
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_repeated_decoder_is_verified(family, tmp_path):
    folder = copied(tmp_path, family, "masked_lm")
    head = "lm_head" if family == "roberta" else "cls.predictions"
    table = f"{family}.embeddings.word_embeddings.weight"

    def add(tensors):
        tensors[f"{head}.decoder.weight"] = tensors[table].copy()
        tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"].copy()
        tensors[f"{family}.pooler.dense.bias"] = np.ones(12, np.float32)

    plain = models.load(folder)[1]
    change_tensors(folder, add)
    assert_same(models.load(folder)[1], plain)
    change_tensors(folder, lambda t: t.pop(f"{head}.bias") is None)
    assert_same(models.load(folder)[1], plain)
    change_tensors(folder, lambda t: t[f"{head}.decoder.weight"].fill(0.5))
    with pytest.raises(CheckpointError, match=r"decoder\.weight must equal"):
        models.load(folder)


def test_pretrainings_leftovers_are_not_read(tmp_path):
    # As the published bert-base-uncased.
    folder = copied(tmp_path, "bert", "masked_lm")
    plain = models.load(folder)[1]

    def add(tensors):
        tensors["bert.pooler.dense.weight"] = np.ones((12, 12), np.float32)
        tensors["cls.seq_relationship.weight"] = np.ones((2, 12), np.float32)

    change_tensors(folder, add)
    assert_same(models.load(folder)[1], plain)


def test_unknown_missing_and_doubled_tensors_are_refused(tmp_path):
    folder = copied(tmp_path, "bert", "base")
    change_tensors(folder, lambda t: t.update({"bert.what": np.ones(2, np.float32)}))
    with pytest.raises(CheckpointError, match=r"bert\.what"):
        models.load(folder)
    name = "embeddings.LayerNorm.weight"
    twice = lambda t: t.update({f"bert.{name}": t[name].copy()})
    change_tensors(folder, lambda t: t.pop("bert.what") is None)
    change_tensors(folder, twice)
    with pytest.raises(CheckpointError, match="two spellings"):
        models.load(folder)
    change_tensors(folder, lambda t: [t.pop(name), t.pop(f"bert.{name}")])
    with pytest.raises(CheckpointError, match=r"missing(.|\n)*LayerNorm\.weight"):
        models.load(folder)


def test_a_classifier_is_not_dropped_unasked(tmp_path):
    folder = copied(tmp_path, "bert", "classification")
    change_config(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        models.load(folder)


def test_a_base_without_pooler():
    with_pooler = models.load(GOLDEN / "bert_base")[1]
    model, params = models.load(GOLDEN / "bert_masked_lm", head="base")
    assert model.config.pooler is False
    assert paths(params) == {p for p in paths(with_pooler) if "pooler" not in p}
    hidden = model.apply({"params": params}, jnp.ones((1, 3), jnp.int32))
    with pytest.raises(jlora.LoraError, match="mean_pool"):
        model.apply({"params": params}, hidden, method="pool")


# -- heads -----------------------------------------------------------------------------

FRESH = {
    "bert": {"classifier/kernel", "classifier/bias"},
    "roberta": {
        f"classifier/{p}/{x}" for p in ("dense", "out_proj") for x in ("kernel", "bias")
    },
}


@pytest.mark.parametrize("source", ["base", "masked_lm"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_new_classifier_is_reported(family, source, tmp_path):
    load = lambda **kw: models.load(
        GOLDEN / folder_name(family, source), head="classification", num_labels=5, **kw
    )
    fresh = set(FRESH[family])
    if (family, source) == ("bert", "masked_lm"):
        fresh |= {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}
    with pytest.warns(jlora.JloraWarning, match=f"{len(fresh)} leaves") as caught:
        model, params = load()
    for path in fresh:
        assert path in str(caught[0].message)
    assert type(model).__name__ == "BertClassifier"
    assert model.config.num_labels == 5
    encoder = models.load(GOLDEN / folder_name(family, source), head="base")[1]
    assert_same({k: params[family][k] for k in ("embeddings", "encoder")},
                {k: encoder[k] for k in ("embeddings", "encoder")})  # fmt: skip
    with pytest.warns(jlora.JloraWarning):
        other = load(key=jax.random.key(7))[1]["classifier"]
    kernels = [x for x in jax.tree.leaves(params["classifier"]) if x.ndim == 2]
    others = [x for x in jax.tree.leaves(other) if x.ndim == 2]
    assert all(float(jnp.std(x)) > 0 for x in kernels)
    assert all(bool(jnp.any(x != y)) for x, y in zip(kernels, others, strict=True))
    models.save(model, params, tmp_path / "saved")
    again, same = models.load(tmp_path / "saved")
    assert again.config == model.config
    assert_same(same, params)


def test_new_leaves_are_of_the_encoders_dtype():
    with pytest.warns(jlora.JloraWarning):
        _, params = models.load(
            GOLDEN / "roberta_base", jnp.bfloat16, head="classification"
        )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_another_number_of_labels_makes_the_last_layer_anew():
    folder = GOLDEN / "roberta_classification"
    given = models.load(folder)[1]["classifier"]
    same = models.load(folder, num_labels=3)[1]["classifier"]  # without a warning
    assert_same(same, given)
    with pytest.warns(jlora.JloraWarning, match="2 leaves") as caught:
        model, params = models.load(folder, num_labels=1)
    assert "classifier/out_proj/kernel [12, 1]" in str(caught[0].message)
    assert_same(params["classifier"]["dense"], given["dense"])
    assert "LABEL_1" not in json.dumps(model.config.to_dict())


def test_another_head_leaves_the_classifier(tmp_path):
    folder = copied(tmp_path, "bert", "classification")
    change_config(folder, architectures=["BertForQuestionAnswering"])
    answers = {"qa_outputs.weight": np.ones((2, 12), np.float32)}
    change_tensors(folder, lambda t: t.update(answers))
    with pytest.raises(CheckpointError, match="BertForQuestionAnswering"):
        models.load(folder)
    model, params = models.load(folder, head="base")
    assert "classifier" not in params
    assert model.config.to_dict()["architectures"] == ["BertModel"]


def test_a_missing_encoder_is_never_made_anew(tmp_path):
    folder = copied(tmp_path, "bert", "base")
    change_tensors(folder, lambda t: t.pop("embeddings.LayerNorm.weight"))
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        models.load(folder, head="classification")


@pytest.mark.parametrize(
    ("folder", "how", "words"),
    [
        ("encoders/bert_base", {"head": "answers"}, "base, classification, masked_lm"),
        ("encoders/bert_base", {"num_labels": 3}, "classification head"),
        (
            "encoders/bert_base",
            {"head": "classification", "num_labels": 0},
            "num_labels",
        ),
        ("t5/v11", {"head": "classification"}, "one form"),
    ],
)
def test_heads_that_cannot_be(folder, how, words):
    with pytest.raises(jlora.LoraError, match=words):
        models.load(GOLDEN.parent / folder, **how)
