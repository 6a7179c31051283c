"""GPT-2 and the Llama family with adapters: equal to merged, cache and beams included."""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_decoders import assert_logits, golden
from tools import randomise, result_shapes

import jlora
from jlora import models

TARGETS = {
    "roles": ["query", "value"],
    "all-linear": "all-linear",
    "every role": ["query", "key", "value", "out", "up", "down"],
    "embeddings": ["wte", "embed_tokens", "down"],
    "experts": ["experts"],
}
DENSE = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
CASES = [
    *((form, name) for form in DENSE for name in TARGETS if name != "experts"),
    ("gemma2", "roles"),
    ("gemma2", "all-linear"),
    ("gemma3", "embeddings"),
    ("mixtral", "roles"),
    ("mixtral", "experts"),
    ("qwen2_moe", "all-linear"),
    ("qwen3_moe", "all-linear"),
]


def targets_of(form, name):
    other = "embed_tokens" if form == "gpt2" else "wte"
    targets = TARGETS[name]
    return targets if isinstance(targets, str) else [t for t in targets if t != other]


@lru_cache
def case(form, name):
    """Adapters on a golden model; what experts' names do not tell, a survey does."""
    model, params, io = golden(form)
    ids, mask = io["input_ids"], io["attention_mask"]
    survey = None
    if name == "experts" or (name == "all-linear" and form.endswith("moe")):
        apply = lambda p, ids: model.apply({"params": p}, ids, mask)
        survey = jlora.survey(apply, params, ids)
    # A gate with a single output has no rank 2.
    exclude = ["shared_expert_gate"] if form == "qwen2_moe" else []
    targets = targets_of(form, name)
    tree = jlora.lorafy(params, 2, targets, survey=survey, exclude=exclude)
    tree = randomise(tree, jax.random.key(1))
    return model, params, ids, mask, tree


@pytest.mark.parametrize(("form", "name"), CASES)
def test_adapted_equals_merged(form, name):
    """Tied tables and the slices of a fused kernel included."""
    model, params, ids, mask, tree = case(form, name)
    apply = jax.jit(lambda p: model.apply({"params": p}, ids, mask))
    adapted = jax.jit(jlora.lora(lambda p: model.apply({"params": p}, ids, mask)))
    got, want = adapted(tree), apply(jlora.merge(tree))
    assert_logits(got, want, mask)
    assert float(jnp.max(jnp.abs(apply(params) - want))) > 0.01


@pytest.mark.parametrize(
    ("form", "beams"),
    [("gpt2", 1), ("gpt2", 3), ("mistral", 1), ("qwen2", 3), ("gemma2", 1),
     ("mixtral", 3)],
)  # fmt: skip
def test_adapted_generation_equals_the_merged_one(form, beams):
    name = "experts" if form == "mixtral" else "all-linear"
    model, params, ids, mask, tree = case(form, name)
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


def test_every_expert_has_an_adapter_and_no_update_is_formed():
    model, params, ids, mask, tree = case("mixtral", "experts")
    rows = {row.path: row for row in jlora.summary(tree).rows}
    assert len(rows) == 2 * 2
    for path, kernel in rows.items():
        assert kernel.shape[0] == 3, path
    adapted = jlora.lora(lambda p: model.apply({"params": p}, ids, mask))
    formed = [
        s for s in result_shapes(adapted, tree) if s in ((3, 16, 48), (3, 24, 16))
    ]
    assert formed == []


def test_adapters_of_experts_train():
    """The loss falls, and every expert's adapter has its part in it."""
    model, params, ids, mask, _ = case("mixtral", "experts")
    apply = lambda p: model.apply({"params": p}, ids, mask)
    survey = jlora.survey(lambda p, _: apply(p), params, ids)
    tree = jlora.lorafy(params, 2, ["experts"], survey=survey)
    half, frozen = jlora.split(tree)
    adapted = jlora.lora(apply)

    @jax.jit
    def step(half):
        def loss(half):
            logp = jax.nn.log_softmax(adapted(jlora.combine(half, frozen))[:, :-1])
            picked = jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(picked * mask[:, 1:]) / jnp.sum(mask[:, 1:])

        value, grads = jax.value_and_grad(loss)(half)
        return value, grads, jax.tree.map(lambda x, g: x - 0.3 * g, half, grads)

    losses = []
    for _ in range(30):
        value, grads, half = step(half)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).reshape(3, -1).max(axis=1).min() > 0


@pytest.mark.parametrize("form", ["gpt2", "qwen3", "gemma3", "mixtral"])
def test_gradients_are_those_of_the_merged_model(form):
    name = "experts" if form == "mixtral" else "roles"
    model, _, ids, mask, tree = case(form, name)
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
