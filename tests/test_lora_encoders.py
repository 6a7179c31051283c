"""Adapted BERTs and RoBERTas: PEFT's logits, and those of the merged parameters."""

from __future__ import annotations

import json
import warnings
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_peft_parity import with_tensors
from tools import randomise

import jlora
from jlora import models

GOLDEN = Path(__file__).parent / "golden"
CASE = GOLDEN / "peft" / "roberta_cls"
FAMILIES = ["bert", "roberta"]
HEADS = ["base", "classification", "masked_lm"]


@lru_cache
def case(family, head):
    """Parameters and a function of them."""
    folder = GOLDEN / "encoders" / f"{family}_{head}"
    model, params = models.load(folder)
    io = load_file(folder / "io.safetensors")
    batch = [io[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    return params, lambda params: model.apply({"params": params}, *batch)


def with_trained(tree, tensors):
    """The tree with PEFT's tensors at its trained leaves, which are stored as they are."""
    unused = dict(tensors)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.endswith(".full"):
            return leaf
        name = name.removesuffix(".full")
        stored = name.replace(".kernel", ".weight")
        value = unused.pop(f"base_model.model.{stored}")
        value = value.T if name.endswith(".kernel") else value
        assert value.shape == leaf.shape
        return jax.numpy.asarray(value)

    tree = jax.tree_util.tree_map_with_path(one, tree)
    assert not unused
    return tree


def loaded(folder):
    """The model, its parameters, and those with the adapter that PEFT made."""
    model, params = models.load(folder / "base")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tree = jlora.lorafy(
        params,
        config["r"],
        sorted(config["target_modules"]),
        alpha=config["lora_alpha"],
        train=["classifier"],
    )
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    factors = {k: v for k, v in tensors.items() if ".lora_" in k}
    tree = with_tensors(tree, factors)
    trained = {k: v for k, v in tensors.items() if k not in factors}
    return model, params, with_trained(tree, trained)


def test_roberta_with_pefts_adapter():
    model, params, tree = loaded(CASE)
    io = load_file(CASE / "io.safetensors")
    apply = lambda params: model.apply({"params": params}, io["input_ids"])
    # The logits are small, and the adapter changes them by a few in ten thousand.
    close = dict(rtol=1e-5, atol=2e-7)
    np.testing.assert_allclose(apply(params), io["base_logits"], **close)
    adapted = jlora.lora(apply)(tree)
    np.testing.assert_allclose(adapted, io["adapter_logits"], **close)
    np.testing.assert_allclose(apply(jlora.merge(tree)), io["merged_logits"], **close)
    assert np.max(np.abs(io["adapter_logits"] - io["base_logits"])) > 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_adapter_live(family, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from golden import make_encoders

    theirs = make_encoders.random_model(family, "classification", 20)
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["query", "value", "intermediate.dense"],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    theirs.save_pretrained(tmp_path / "adapter")
    batch = make_encoders.inputs(family, 21)
    want = make_encoders.outputs(theirs, batch)["output"]

    model, params, tree = loaded(tmp_path)
    apply = lambda params: model.apply({"params": params}, *batch.values())
    np.testing.assert_allclose(jlora.lora(apply)(tree), want, atol=1e-5)
    assert np.max(np.abs(apply(params) - want)) > 0.1


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_equals_merged(family, head, targets):
    params, apply = case(family, head)
    tree = randomise(jlora.lorafy(params, 2, targets), jax.random.key(1))
    adapted, plain = jax.jit(jlora.lora(apply)), jax.jit(apply)
    got, want = adapted(tree), plain(jlora.merge(tree))
    size = float(np.max(np.abs(want)))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * size)
    assert float(np.max(np.abs(plain(params) - want))) > 0.01 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_classifier_beside_adapters(family):
    params, apply = case(family, "classification")
    tree = jlora.lorafy(params, 2, ["query", "value"], train=["classifier"])
    half, frozen = jlora.split(randomise(tree, jax.random.key(1)))
    names = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(half)
    ]
    layers = 2 if family == "bert" else 4
    assert sum("classifier" in name for name in names) == layers
    assert len(names) == layers + 2 * 2 * 2
    whole = jlora.combine(half, frozen)
    got, want = jlora.lora(apply)(whole), apply(jlora.merge(whole))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())
    loss = lambda half: (jlora.lora(apply)(jlora.combine(half, frozen)) ** 2).sum()
    for name, grad in zip(names, jax.tree.leaves(jax.grad(loss)(half)), strict=True):
        assert np.any(grad), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_survey_and_names_agree(family, head):
    params, apply = case(family, head)
    by_name = jlora.lorafy(params, 2, "all-linear", exclude=unread(head))
    survey = jlora.survey(apply, params)
    by_survey = jlora.lorafy(params, 2, "all-linear", survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)


def unread(head):
    """A base model's own output does not read its pooler."""
    return ["pooler"] if head == "base" else []


def test_every_table_can_be_adapted():
    params, apply = case("roberta", "masked_lm")
    tables = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = randomise(jlora.lorafy(params, 2, tables), jax.random.key(1))
    got, want = jlora.lora(apply)(tree), apply(jlora.merge(tree))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())
