"""LoRA+ and LoRA-FA beside PEFT's own, step by step on the same gradients."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft_live
import peft_nets
import pytest

import jlora
import jlora.peft
from jlora.optim import decay_mask, lora_fa, lora_plus

torch = peft_live.torch
pytestmark = pytest.mark.oracle

STEPS = 6
# Experts and convolutions go through PEFT's optimisers as these do.
SETTINGS = dict(
    r=3, lora_alpha=5, target_modules=["q", "c_attn", "emb"], modules_to_save=["head"],
    bias="lora_only", alpha_pattern={"c_attn": 4},
)  # fmt: skip


def start(tmp_path, **settings):
    """PEFT's model with random factors, and the same tree."""
    theirs = peft_live.peft_model(peft_live.net(), **settings).train()
    peft_live.peft_save(theirs, tmp_path)
    tree = jlora.peft.load(tmp_path, peft_live.tree_of(peft_live.net()))
    return theirs, tree


def train(theirs, their_tx, tree, tx, tmp_path, record_property, name):
    """Both sides train on the same batch; the largest difference is recorded."""
    ids = torch.tensor(peft_nets.IDS)
    apply = jlora.lora(peft_nets.apply)
    half, frozen = jlora.split(tree)

    @jax.jit
    def step(half, state):
        loss = lambda t: jnp.mean(apply(jlora.combine(t, frozen), peft_nets.IDS) ** 2)
        value, grads = jax.value_and_grad(loss)(half)
        updates, state = tx.update(grads, state, half)
        return optax.apply_updates(half, updates), state, value

    state, first = tx.init(half), None
    for _ in range(STEPS):
        loss = (theirs(ids) ** 2).mean()
        loss.backward()
        their_tx.step()
        their_tx.zero_grad()
        half, state, value = step(half, state)
        first = first or float(value)
        np.testing.assert_allclose(float(value), float(loss.detach()), rtol=1e-4)
    assert float(value) < 0.95 * first
    peft_live.peft_save(theirs.eval(), tmp_path / "trained")
    want = jlora.peft.load(tmp_path / "trained", peft_live.tree_of(peft_live.net()))
    off = 0.0
    for x, y in zip(
        jax.tree.leaves(half), jax.tree.leaves(jlora.split(want)[0]), strict=True
    ):
        off = max(off, float(jnp.max(jnp.abs(x - y))))
    record_property(name, off)
    print(name, off)
    assert off < 1e-5
    return half


def test_lora_plus_is_pefts(tmp_path, record_property):
    from peft.optimizers import create_loraplus_optimizer

    theirs, tree = start(tmp_path, **SETTINGS, use_dora=True)
    their_tx = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8,
        loraplus_lr_embedding=5e-4, loraplus_weight_decay=0.1, eps=1e-8,
    )  # fmt: skip
    decayed = lambda t: decay_mask(t, ["a", "b", "full", "magnitude"])
    adamw = optax.adamw(2e-3, weight_decay=0.1, mask=decayed)
    tx = optax.chain(adamw, lora_plus(8, embedding_ratio=0.25))
    train(theirs, their_tx, tree, tx, tmp_path, record_property, "loraplus")


def test_lora_fa_is_pefts(tmp_path, record_property, monkeypatch):
    from peft.optimizers import create_lorafa_optimizer

    # It would project in bfloat16 where the processor can.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    settings = {**SETTINGS, "target_modules": ["q", "c_attn"], "use_rslora": True}
    theirs, tree = start(tmp_path, **settings)
    before = jlora.split(tree)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_tx = create_lorafa_optimizer(
            theirs, r=3, lora_alpha=5, lr=2e-3, weight_decay=0.1
        )
    their_tx.param_groups[0]["eps"] = 1e-12  # it is added before bias correction there
    adamw = optax.adamw(2e-3, weight_decay=0.1, eps=1e-12)
    tx = lora_fa(adamw, tree)
    after = train(theirs, their_tx, tree, tx, tmp_path, record_property, "lorafa")
    t, u = (x["q"]["kernel"].adapters[""] for x in (before, after))
    assert np.array_equal(t.a, u.a)
    assert not np.allclose(t.b, u.b)
