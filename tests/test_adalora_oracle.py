"""AdaLoRA beside PEFT's: importance, ranks and logits over a run, and the export."""

import dataclasses
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
from jlora.optim import adalora, prune

torch, peft = peft_live.torch, peft_live.peft
pytestmark = pytest.mark.oracle

STEPS, INIT, ALPHA = 18, 5, 4
TARGETS = ["q", "v", "c_attn"]
SETTINGS = dict(target_r=2, tinit=3, tfinal=5, deltaT=2, beta1=0.8, beta2=0.9)


def models():
    """PEFT's model with its values at random, and the same tree."""
    model = peft_live.net()
    config = peft.AdaLoraConfig(
        init_r=INIT, lora_alpha=ALPHA, target_modules=TARGETS, total_step=STEPS,
        **SETTINGS,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config).train()
    torch.manual_seed(3)
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.4)
    tree = jlora.lorafy(
        peft_live.tree_of(peft_live.net()), INIT, {f"{m}/kernel": jlora.Target() for m in TARGETS},
        alpha=ALPHA, variant="adalora",
    )  # fmt: skip
    for m in TARGETS:
        node = tree[m]["kernel"]

        def given(t, m=m):
            layer = theirs.get_submodule(f"base_model.model.{m}")
            host = lambda x: jnp.asarray(x["default"].detach().numpy())
            values = {
                "a": host(layer.lora_A).T,
                "e": host(layer.lora_E)[:, 0],
                "b": host(layer.lora_B).T,
            }
            return dataclasses.replace(
                t, parts=values, scale=jnp.float32(ALPHA / (INIT + 1e-5))
            )

        tree[m]["kernel"] = node.map(node.base, given)
    return theirs, tree


def test_a_run_is_pefts(tmp_path, record_property):
    theirs, tree = models()
    ids = torch.tensor(peft_nets.IDS)
    apply = jlora.lora(peft_nets.apply)
    half, frozen = jlora.split(tree)
    tx = adalora(
        optax.adam(2e-2), target_rank=2, total_steps=STEPS, warmup=3, final=5, every=2,
        beta1=0.8, beta2=0.9,
    )  # fmt: skip

    @jax.jit
    def step(half, state):
        loss = lambda t: jnp.mean(apply(jlora.combine(t, frozen), peft_nets.IDS) ** 2)
        updates, state = tx.update(jax.grad(loss)(half), state, half)
        return optax.apply_updates(half, updates), state

    lora = [(n, p) for n, p in theirs.named_parameters() if "lora_" in n]
    their_tx = torch.optim.Adam([p for _, p in lora], lr=2e-2)
    state, allocator = tx.init(half), theirs.base_model.rankallocator
    off = 0.0
    for n in range(STEPS):
        pull = 0
        for name, p in lora:
            if "lora_E" not in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                pull = pull + torch.norm(gram - torch.eye(INIT), p="fro")
        loss = (theirs(ids) ** 2).mean() + 0.5 * pull / (2 * len(TARGETS))
        their_tx.zero_grad()
        loss.backward()
        their_tx.step()
        theirs.base_model.update_and_allocate(n)
        half, state = step(half, state)
        for m in TARGETS:
            t = half[m]["kernel"].adapters[""]
            layer = theirs.get_submodule(f"base_model.model.{m}")
            value = layer.lora_E["default"].detach().numpy()[:, 0]
            assert np.array_equal(t.parts["e"] != 0, value != 0), (n, m)
            off = max(off, float(np.max(np.abs(np.asarray(t.parts["e"]) - value))))
            if allocator.exp_avg_ipt:
                for part, x in (("a", "A"), ("b", "B")):
                    want = allocator.exp_avg_ipt[f"{m}.lora_{x}.default"].numpy()
                    got = state.importance[f"{m}/kernel"][part]
                    np.testing.assert_allclose(got.T, want, rtol=2e-3, atol=1e-5)
    record_property("values", off)
    assert off < 2e-5
    kept = {m: int(np.sum(state.kept[f"{m}/kernel"])) for m in TARGETS}
    assert sum(kept.values()) == 2 * len(TARGETS)
    assert len({*kept.values()}) > 1, "every kernel has the same rank: shows little"

    want = peft_live.logits_of(theirs.eval(), peft_nets.IDS)
    tree = jlora.combine(half, frozen)
    peft_live.note(record_property, "masked", apply(tree, peft_nets.IDS), want)
    small = prune(tree)
    peft_live.note(record_property, "pruned", apply(small, peft_nets.IDS), want)
    peft_live.note(
        record_property,
        "merged",
        peft_nets.apply(jlora.merge(small), peft_nets.IDS),
        want,
    )
    jlora.peft.save(tmp_path / "out", small, fan_in_fan_out=True)
    config = jlora.peft.read_config(tmp_path / "out")
    assert config["peft_type"] == "LORA"
    again = peft_live.peft_load(peft_live.net(), tmp_path / "out")
    peft_live.note(
        record_property, "export", peft_live.logits_of(again, peft_nets.IDS), want
    )
