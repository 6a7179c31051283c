"""Adapters of shifted bases: as those of the original, and in PEFT's files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tools import randomise

import jlora
import jlora.peft
from jlora import CheckpointError, StructureError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLOSE = dict(rtol=2e-5, atol=2e-5)
RNG = np.random.default_rng(0)
PARAMS = {
    "q": {"kernel": jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)},
    "v": {"kernel": jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)},
}


def lorafy(init="pissa", **options):
    targets = {"q": jlora.Target(init=init), "v": jlora.Target(rank=3)}
    return jlora.lorafy(PARAMS, 2, targets, alpha=5.0, **options)


def trained(tree):
    """The tree with other factors on the same bases."""
    return randomise(tree, jax.random.key(1))


def initial_of(tree):
    return jax.device_get(jlora.split(tree)[0])


def dense(tree):
    return {name: np.asarray(x["kernel"]) for name, x in jlora.merge(tree).items()}


def assert_same(one, other):
    for name, x in dense(one).items():
        np.testing.assert_allclose(x, dense(other)[name], **CLOSE)


@pytest.mark.parametrize("rslora", [False, True])
def test_twice_the_rank_does_the_same_on_the_original(rslora, tmp_path):
    tree = lorafy(rslora=rslora)
    after = trained(tree)
    plain = jlora.init.unshift(after, initial_of(tree), PARAMS)
    assert_same(plain, after)
    q, v = (plain[n]["kernel"] for n in "qv")
    assert q.base is PARAMS["q"]["kernel"]
    assert [w.adapters[""].rank for w in (q, v)] == [4, 3]
    assert not q.adapters[""].shifted
    assert v.adapters[""].a is after["v"]["kernel"].adapters[""].a

    jlora.peft.save(tmp_path, after, initial=tree)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["init_lora_weights"] is True
    root = 2**0.5 if rslora else 2
    alphas = {"q": config["lora_alpha"], **config["alpha_pattern"]}
    assert alphas["q"] == pytest.approx(5 * root)
    stored = load_file(tmp_path / WEIGHTS)
    a0 = tree["q"]["kernel"].adapters[""].a.T
    np.testing.assert_array_equal(stored["base_model.model.q.lora_A.weight"][2:], a0)
    assert_same(jlora.peft.load(tmp_path, PARAMS), after)


def test_doras_lengths_are_kept():
    tree = lorafy(dora=True)
    after = trained(tree)
    assert_same(jlora.init.unshift(after, tree, PARAMS), after)


def test_an_adapter_of_a_changed_base_is_not_written_unasked(tmp_path):
    after = trained(lorafy())
    with pytest.raises(StructureError, match=r"(?s)q/kernel.*initial=tree0"):
        jlora.peft.save(tmp_path, after)
    with pytest.raises(StructureError, match="shifted_base=True keeps them"):
        jlora.peft.save(tmp_path, after, initial=lorafy(), shifted_base=True)
    with pytest.raises(StructureError, match="here are none"):
        jlora.peft.save(tmp_path, lorafy("default"), initial=lorafy("default"))
    assert not (tmp_path / CONFIG).exists()
    with pytest.raises(StructureError, match="PEFT would shift the base"):
        jlora.peft.save(
            tmp_path, after, shifted_base=True, config={"init_lora_weights": "pissa"}
        )
    jlora.peft.save(tmp_path, after, shifted_base=True)
    base = jax.tree.map(lambda w: w.base, after, is_leaf=jlora.is_node)
    again = jlora.peft.load(tmp_path, base, shifted_base=True)
    assert_same(again, after)
    assert again["q"]["kernel"].adapters[""].shifted


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_peft_makes_again_is_made_again(init, tmp_path):
    tree = jlora.lorafy(PARAMS, 2, ["q"], alpha=5.0, init=init)
    after = trained(tree)
    jlora.peft.save(tmp_path, after, shifted_base=True)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**written, "init_lora_weights": init}))
    again = jlora.peft.load(tmp_path, PARAMS)
    assert_same(again, after)
    np.testing.assert_allclose(again["q"]["kernel"].base, tree["q"]["kernel"].base,
                               **CLOSE)  # fmt: skip
    with pytest.raises(StructureError, match="initial=tree0"):
        jlora.peft.save(tmp_path / "again", again)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    assert jlora.peft.load(tmp_path, shapes)["q"]["kernel"].adapters[""].shifted


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq", "new"])
def test_a_base_that_nobody_can_tell_is_refused(init, tmp_path):
    jlora.peft.save(tmp_path, trained(lorafy()), shifted_base=True)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**written, "init_lora_weights": init}))
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{init}'.*\n.*sh"):
        jlora.peft.load(tmp_path, PARAMS)
    assert jlora.peft.load(tmp_path, PARAMS, shifted_base=True)


def test_trees_that_do_not_belong_together():
    tree = lorafy()
    after = trained(tree)
    other = jax.tree.map(lambda x: x + 1, tree)
    with pytest.raises(StructureError, match="base of 'q/kernel'"):
        jlora.init.unshift(after, other, PARAMS)
    with pytest.raises(StructureError, match="no such adapter in the initial"):
        jlora.init.unshift(after, PARAMS, PARAMS)
    small = jlora.lorafy(PARAMS, 1, ["q"], init="pissa")
    with pytest.raises(StructureError, match=r"was another at first.*\(7, 1\)"):
        jlora.init.unshift(after, initial_of(small), PARAMS)
    with pytest.raises(StructureError, match=r"'q/kernel'.*is not in params"):
        jlora.init.unshift(after, tree, {"q": PARAMS["q"]["kernel"]})
    gone = jax.tree.map(jnp.copy, jlora.split(tree)[0])
    jax.tree.map(lambda x: x.delete(), gone)
    with pytest.raises(StructureError, match=r"are gone.*\n.*device_get"):
        jlora.init.unshift(after, gone, PARAMS)


def test_a_checkpoint_keeps_what_the_adapter_belongs_to(tmp_path):
    tree = lorafy()
    jlora.checkpoint.save_adapter(tmp_path / "a", tree)
    base = jax.tree.map(lambda w: w.base, tree, is_leaf=jlora.is_node)
    again = jlora.checkpoint.load_adapter(tmp_path / "a", base)
    assert again["q"]["kernel"].adapters[""].shifted
    with pytest.raises(CheckpointError, match="q/kernel"):
        jlora.checkpoint.load_adapter(tmp_path / "a", PARAMS)
