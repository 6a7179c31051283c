"""Scanned layers: the same model as the numbered one, traced once for all blocks."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tools import equations, randomise

import jlora
from jlora import StructureError, models
from jlora.models._parts import decoder as _decoder
from jlora.models._parts.blocks import Configured

GOLDEN = Path(__file__).parent / "golden"
# Where the blocks are, by form: for unstacking.
FORMS = {
    "t5/v10": "block",
    "t5/v11": "block",
    "decoders/gpt2": "h",
    "decoders/llama": "layers",
    "decoders/qwen2": "layers",
    "decoders/gemma2": "layers",  # of two kinds
    "decoders/qwen3_moe": "layers",
    "encoders/bert_base": "encoder/layer",
    "encoders/bert_classification": "encoder/layer",
    "encoders/roberta_masked_lm": "encoder/layer",
}
IDS = jnp.array([[3, 5, 7, 11, 13], [2, 4, 6, 8, 10]])
MASK = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@lru_cache
def loaded(form, **settings):
    return models.load(GOLDEN / form, **settings)


def inputs(form):
    return (IDS, MASK, IDS[:, ::-1]) if form.startswith("t5") else (IDS, MASK)


def logits_of(model, form):
    return lambda params: model.apply({"params": params}, *inputs(form))


def assert_close(got, want, tol=1e-6):
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    assert scale > 0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * scale)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("form", FORMS)
def test_one_checkpoint_two_forms(form, tmp_path):
    model, params = loaded(form)
    scanned, stacked = loaded(form, scan_layers=True)
    assert_same(stacked, jlora.stack_layers(params))
    assert_same(jlora.unstack_layers(stacked, [FORMS[form]]), params)
    assert_close(
        jax.jit(logits_of(scanned, form))(stacked),
        jax.jit(logits_of(model, form))(params),
    )
    for most in (None, 20_000):
        for name, each in {"a": (model, params), "b": (scanned, stacked)}.items():
            models.save(*each, tmp_path / name, max_shard_bytes=most, overwrite=True)
        files = sorted(f.name for f in (tmp_path / "a").iterdir())
        assert files == sorted(f.name for f in (tmp_path / "b").iterdir())
        for file in files:
            assert (tmp_path / "a" / file).read_bytes() == (
                tmp_path / "b" / file
            ).read_bytes()


def test_what_one_block_has_alone_keeps_its_path():
    params = loaded("t5/v11", scan_layers=True)[1]
    block = params["encoder"]["block"]
    own = block["0"]["layer"]["0"]["SelfAttention"]
    assert jax.tree.map(jnp.shape, own) == {
        "relative_attention_bias": {"embedding": (32, 3)}
    }
    assert block["layer"]["0"]["SelfAttention"]["q"]["kernel"].shape == (2, 16, 12)


@pytest.mark.parametrize("form", ["t5/v11", "decoders/gpt2", "decoders/gemma2"])
def test_caches(form):
    settings = {"max_new_tokens": 5, "num_beams": 2, "eos_token_id": ()}
    want, got = (
        models.generate(*loaded(form, **kind), IDS, MASK, **settings)
        for kind in ({}, {"scan_layers": True})
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_targets_need_no_axes(form, targets):
    """A stack is adapted by name as its layers are."""
    shapes = [
        jax.eval_shape(lambda p: p, loaded(form, **kind)[1])
        for kind in ({}, {"scan_layers": True})
    ]
    numbered, stacked = (jlora.lorafy(x, rank=1, targets=targets) for x in shapes)
    assert jax.tree.structure(jlora.stack_layers(numbered)) == (
        jax.tree.structure(stacked)
    )


TRAINED = ["t5/v11", "decoders/gemma2"]


@pytest.mark.parametrize("form", TRAINED)
def test_adapters_train_alike(form, tmp_path):
    model, params = loaded(form)
    scanned, _ = loaded(form, scan_layers=True)
    tree = jlora.lorafy(params, rank=2, targets=["query", "value", "out"])
    tree = randomise(tree, jax.random.key(3))

    def loss_and_grads(model, tree):
        half, frozen = jlora.split(tree)
        apply = jlora.lora(logits_of(model, form))

        def loss(half):
            return jnp.mean(jnp.sin(apply(jlora.combine(half, frozen))))

        return jax.jit(jax.value_and_grad(loss))(half)

    stacked = jlora.stack_layers(tree)
    loss, grads = loss_and_grads(model, tree)
    got, stacked_grads = loss_and_grads(scanned, stacked)
    assert_close(got, loss)
    assert_close(jlora.unstack_layers(stacked_grads, [FORMS[form]]), grads, 1e-5)
    models.save(model, jlora.merge(tree), tmp_path / "a")
    models.save(scanned, jlora.merge(stacked), tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def deep(form, layers, **settings):
    """A model of that form with so many blocks, and its shapes."""
    model = loaded(form)[0]
    fields = {f.name for f in dataclasses.fields(model.config)}
    names = fields & {"num_layers", "num_decoder_layers", "n_layer"}
    names |= fields & {"num_hidden_layers"}
    depth = dict.fromkeys(names, layers)
    if "layer_types" in fields:
        depth["layer_types"] = (model.config.layer_types * layers)[:layers]
    config = dataclasses.replace(model.config, **depth)
    model = type(model)(config, **settings)
    init = partial(model.init, jax.random.key(0), *inputs(form))
    return model, jax.eval_shape(init)["params"]


@pytest.mark.parametrize("form", ["t5/v11", "decoders/gemma2", "encoders/bert_base"])
def test_depth_costs_no_equations(form):
    def size(layers, **settings):
        model, shapes = deep(form, layers, **settings)
        tree = jlora.lorafy(shapes, rank=1, targets=["query", "value"])
        half, frozen = jlora.split(tree)
        apply = jlora.lora(logits_of(model, form))
        loss = lambda half, frozen: jnp.sum(apply(jlora.combine(half, frozen)))
        return sum(1 for _ in equations(jax.make_jaxpr(jax.grad(loss))(half, frozen)))

    assert size(2, scan_layers=True) == size(5, scan_layers=True)
    assert size(5) > 2 * size(2)


def test_a_block_is_traced_once_for_all(monkeypatch):
    calls = []
    attend = _decoder.attend
    monkeypatch.setattr(
        models.llama._model, "attend", lambda *args: calls.append(1) or attend(*args)
    )

    def traces(layers, **settings):
        model, shapes = deep("decoders/llama", layers, **settings)
        calls.clear()
        jax.eval_shape(logits_of(model, "decoders/llama"), shapes)
        return len(calls)

    assert traces(3) == 3
    assert traces(3, scan_layers=True) == traces(7, scan_layers=True) < 3


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_no_gradient(scan):
    form = "decoders/qwen2"
    settings = {"scan_layers": scan}
    plain, params = loaded(form, **settings)
    remat, _ = loaded(form, remat=True, **settings)
    grad = lambda model: jax.grad(lambda p: jnp.mean(logits_of(model, form)(p) ** 2))
    if scan:  # the blocks are the same ones without
        assert_close(jax.jit(grad(remat))(params), jax.jit(grad(plain))(params))
    names = lambda model: {
        e.primitive.name for e in equations(jax.make_jaxpr(grad(model))(params))
    }
    assert len(names(remat) - names(plain)) == 1  # JAX calls it checkpoint or remat2


class Noisy(Configured):
    """Adds to x a mask of its own."""

    def setup(self):
        self.drop = nn.Dropout(0.5)

    def __call__(self, x):
        return x + self.drop(jnp.ones_like(x), deterministic=False)


class Stack(Configured):
    def setup(self):
        self.layers = self.blocks([self.part(Noisy)] * 2)

    def __call__(self, x):
        step = lambda block, x, past, own: (block(x), None)
        return self.run_blocks(self.layers, step, x, length=2)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_layers_drop_different_inputs(remat):
    model = Stack(None, scan_layers=True, remat=remat)
    rngs = {"dropout": jax.random.key(0)}
    got = model.apply({}, jnp.zeros(100), rngs=rngs)
    assert set(got.tolist()) == {0.0, 2.0, 4.0}  # of one mask for both, no 2
    np.testing.assert_array_equal(got, model.apply({}, jnp.zeros(100), rngs=rngs))


def test_layers_that_are_not_alike_make_no_scan():
    with pytest.raises(StructureError, match=r"of 2 layers 1 choose among experts"):
        models.load(GOLDEN / "decoders/qwen2_moe", scan_layers=True)


def test_a_stack_lies_over_the_mesh():
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    spec = lambda shape: PartitionSpec(*(None,) * (len(shape) - 1), "x")

    def sharding(path, shape):
        even = path.startswith("model/layers") and shape[-1] % 2 == 0
        return NamedSharding(mesh, spec(shape) if even else PartitionSpec())

    params = models.load(
        GOLDEN / "decoders/llama", scan_layers=True, sharding=sharding
    )[1]
    kernel = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "x")
    assert_same(params, loaded("decoders/llama", scan_layers=True)[1])
