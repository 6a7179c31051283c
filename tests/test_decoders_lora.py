"""GPT-2 and the Llama family with adapters: equal to merged, cache and beams included."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_decoders import FORMS, assert_logits, golden
from tools import randomise

import jlora
from jlora import models

TARGETS = {
    "roles": ["query", "value"],
    "all-linear": "all-linear",
    "every role": ["query", "key", "value", "out", "up", "down"],
    "embeddings": ["wte", "embed_tokens", "down"],
}


def targets_of(form, name):
    other = "embed_tokens" if form == "gpt2" else "wte"
    targets = TARGETS[name]
    return targets if isinstance(targets, str) else [t for t in targets if t != other]


@lru_cache
def case(form, name):
    model, params, io = golden(form)
    tree = jlora.lorafy(params, 2, targets_of(form, name))
    tree = randomise(tree, jax.random.key(1))
    return model, params, io["input_ids"], io["attention_mask"], tree


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_adapted_equals_merged(form, name):
    """Tied tables and the slices of a fused kernel included."""
    model, params, ids, mask, tree = case(form, name)
    apply = jax.jit(lambda p: model.apply({"params": p}, ids, mask))
    adapted = jax.jit(jlora.lora(lambda p: model.apply({"params": p}, ids, mask)))
    got, want = adapted(tree), apply(jlora.merge(tree))
    assert_logits(got, want, mask)
    assert float(jnp.max(jnp.abs(apply(params) - want))) > 0.01


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("form", ["gpt2", "mistral", "qwen2"])
def test_adapted_generation_equals_the_merged_one(form, beams):
    model, params, ids, mask, tree = case(form, "all-linear")
    run = lambda p, **kw: np.asarray(
        models.generate(
            model,
            p,
            ids,
            mask,
            max_new_tokens=8,
            num_beams=beams,
            eos_token_id=36,
            **kw,
        )
    )
    got = run(tree, transform=jlora.lora)
    np.testing.assert_array_equal(got, run(jlora.merge(tree)))
    assert np.any(got != run(params))


def test_roles_of_gpt2_are_slices_of_the_fused_kernel():
    """The keys' third stays as it is, to the bit."""
    _, params, _, _, tree = case("gpt2", "roles")
    merged = jlora.merge(tree)
    for block in params["transformer"]["h"]:
        old, new = (
            np.split(
                np.asarray(t["transformer"]["h"][block]["attn"]["c_attn"]["kernel"]),
                3,
                1,
            )
            for t in (params, merged)
        )
        np.testing.assert_array_equal(new[1], old[1])
        assert all(np.abs(new[i] - old[i]).max() > 0.1 for i in (0, 2))


@pytest.mark.parametrize(("form", "linear"), [("gpt2", 2 * 4), ("llama", 2 * 7 + 1)])
def test_survey_and_names_agree(form, linear):
    model, params, ids, mask, by_name = case(form, "all-linear")
    apply = lambda p, ids: model.apply({"params": p}, ids, mask)
    survey = jlora.survey(apply, params, ids)
    by_survey = jlora.lorafy(params, 2, "all-linear", survey=survey)
    assert jax.tree.structure(by_name) == jax.tree.structure(by_survey)
    assert len(jlora.summary(by_name).rows) == linear


@pytest.mark.parametrize("form", ["gpt2", "qwen3"])
def test_gradients_are_those_of_the_merged_model(form):
    model, _, ids, mask, tree = case(form, "roles")
    half, frozen = jlora.split(tree)

    def loss(apply):
        def of(half):
            logits = apply(jlora.combine(half, frozen))[:, :-1]
            logp = jax.nn.log_softmax(logits)
            picked = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(picked * mask[:, 1:])

        return of

    apply = lambda p: model.apply({"params": p}, ids, mask)
    got = jax.jit(jax.grad(loss(jlora.lora(apply))))(half)
    want = jax.jit(jax.grad(loss(lambda t: apply(jlora.merge(t)))))(half)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()) + 1e-6)
