"""PEFT's own adapters, put into our tree, give PEFT's logits."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tools import randomise

import jlora
from jlora import models

CASE = pathlib.Path(__file__).parent / "golden" / "peft" / "t5_qv"


def with_tensors(tree, tensors):
    """The lorafied tree with PEFT's factors, which are stored [r, in] and [out, r]."""
    used = set()

    def one(w):
        if not isinstance(w, jlora.LowRank):
            return w
        name = w.path.rpartition("/")[0].replace("/", ".")
        keys = [f"base_model.model.{name}.lora_{x}.weight" for x in "AB"]
        used.update(keys)
        a, b = (jnp.asarray(tensors[k].T) for k in keys)
        return w.map(w.base, lambda t: dataclasses.replace(t, a=a, b=b))

    tree = jax.tree.map(one, tree, is_leaf=jlora.is_node)
    assert used == set(tensors)
    return tree


def test_t5_with_pefts_adapter():
    model, params = models.load(CASE / "base")
    config = json.loads((CASE / "adapter" / "adapter_config.json").read_text())
    tree = jlora.lorafy(
        params, config["r"], config["target_modules"], alpha=config["lora_alpha"]
    )
    tree = with_tensors(tree, load_file(CASE / "adapter" / "adapter_model.safetensors"))
    io = load_file(CASE / "io.safetensors")

    def apply(params):
        ids, decoder_ids = io["input_ids"], io["decoder_input_ids"]
        return model.apply({"params": params}, ids, None, decoder_ids)

    close = dict(rtol=1e-5, atol=1e-5)
    adapted = jlora.lora(apply)(tree)
    np.testing.assert_allclose(adapted, io["adapter_logits"], **close)
    np.testing.assert_allclose(apply(jlora.merge(tree)), io["merged_logits"], **close)
    np.testing.assert_allclose(apply(params), io["base_logits"], **close)
    assert np.max(np.abs(io["adapter_logits"] - io["base_logits"])) > 1e-2


def tiny_t5(**changes):
    config = {"model_type": "t5", "d_model": 24, "d_ff": 40, "d_kv": 6, "num_heads": 4,
              "num_layers": 2, "num_decoder_layers": 2, "vocab_size": 43,
              "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
              "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
    model = models.T5(models.T5Config.from_dict({**config, **changes}))
    ids = jnp.array([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]])
    params = model.init(jax.random.key(0), ids, None, ids)["params"]
    return model, params, ids, (ids != 0).astype(jnp.int32)


@pytest.mark.parametrize(
    "targets", [["query", "value"], "all-linear", ["shared", "query"]]
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapted_t5_equals_the_merged_one(targets, tied):
    """Tied tables included: one leaf, one adapter, merged once."""
    model, params, ids, mask = tiny_t5(tie_word_embeddings=tied)
    tree = randomise(jlora.lorafy(params, 2, targets), jax.random.key(1))
    apply = lambda p: model.apply({"params": p}, ids, mask, ids)
    got, want = jax.jit(jlora.lora(apply))(tree), apply(jlora.merge(tree))
    size = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * size)
    assert float(jnp.max(jnp.abs(apply(params) - want))) > 0.01 * size


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "length_penalty": 0.6}])
def test_adapted_generation_equals_the_merged_one(settings):
    model, params, ids, mask = tiny_t5()
    tree = jlora.lorafy(params, 2, ["query", "value", "lm_head", "shared"])
    tree = randomise(tree, jax.random.key(1))
    run = lambda p, **kw: models.generate(
        model, p, ids, mask, max_new_tokens=9, **settings, **kw
    )
    got = run(tree, transform=jlora.lora)
    np.testing.assert_array_equal(got, run(jlora.merge(tree)))
    assert np.any(got != run(params))


def test_survey_and_names_agree_on_t5():
    model, params, ids, mask = tiny_t5()
    apply = lambda p, ids: model.apply({"params": p}, ids, mask, ids)
    survey = jlora.survey(apply, params, ids)
    by_name = jlora.lorafy(params, 2, "all-linear")
    by_survey = jlora.lorafy(params, 2, "all-linear", survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)
    assert len(jlora.summary(by_name).rows) == 2 * 7 + 2 * 11 + 1
