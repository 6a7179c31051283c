"""Attention by `jax.nn.dot_product_attention`: the same numbers, and cuDNN's kernel.

Values are checked by its XLA implementation. cuDNN's own needs a GPU: here programs are
lowered for one, with the one check that looks for a cuDNN library answered by hand.
"""

from __future__ import annotations

import re
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_scan_layers import assert_close
from tools import randomise

import jlora
from jlora import StructureError, models
from jlora.models import GPT2, T5, Bert, Llama

GOLDEN = Path(__file__).parent / "golden"
# Longer than the windows of 4, and odd; padding on the right, on the left, nowhere.
IDS = jnp.asarray(np.random.default_rng(0).integers(2, 30, (3, 7)))
MASK = jnp.array([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7])
FORMS = {
    "t5/v11": {"scan_layers": True},
    "decoders/gpt2": {},
    "decoders/mistral": {},  # every layer has a window
    "decoders/qwen3": {"scan_layers": True, "remat": True},
    "decoders/gemma3": {},  # two kinds of layers, each a program of its own
    "decoders/gemma3 scanned": {"scan_layers": True},  # the kind an input of one
    "encoders/bert_base": {"scan_layers": True},
}
PADDED = [(form, MASK) for form in FORMS]
WHOLE = [(form, None) for form in ("t5/v11", "decoders/mistral")]


@lru_cache
def loaded(form, **settings):
    return models.load(GOLDEN / form.split()[0], **settings)


def inputs(form, ids, mask):
    return (ids, mask, ids[:, 4::-1]) if form.startswith("t5") else (ids, mask)


def values_and_gradients(form, mask, **settings):
    """Return the parameters' gradient of the outputs at tokens, and these."""
    model, params = loaded(form, **FORMS[form], **settings)

    def loss(params):
        y = model.apply({"params": params}, *inputs(form, IDS, mask))
        if mask is not None and not form.startswith("t5"):
            y = jnp.where(mask[..., None] == 1, y, 0)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, has_aux=True))(params)


by_jax = jax.nn.dot_product_attention


def as_cudnn(q, k, v, *, bias, mask, implementation, **how):
    """XLA's numbers for what cuDNN gets, after the checks that JAX makes for it."""
    assert implementation == "cudnn"
    T, S = q.shape[1], k.shape[1]
    for each in (bias, mask):
        assert each is None or (each.shape[2:] == (T, S) and T % 2 == S % 2 == 0)
    assert bias is None or bias.dtype == q.dtype
    assert how["local_window_size"] is None or (bias is None and mask is None)
    return by_jax(q, k, v, bias=bias, mask=mask, implementation="xla", **how)


@pytest.mark.parametrize(("form", "mask"), PADDED + WHOLE)
def test_every_form_gives_the_same(form, mask, monkeypatch):
    want = values_and_gradients(form, mask)
    got = values_and_gradients(form, mask, attn_implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    for other in (got, values_and_gradients(form, mask, attn_implementation="cudnn")):
        for x, y in zip(other, want, strict=True):
            assert_close(x, y, 1e-5)


def test_a_scanned_layers_scale_is_an_input():
    config = models.GPT2Config(31, 8, 6, 2, 2, scale_attn_by_inverse_layer_idx=True)
    model, by_xla = (
        GPT2(config, scan_layers=True, attn_implementation=name)
        for name in ("einsum", "xla")
    )
    params = model.init(jax.random.key(0), IDS)
    params = jax.tree.map(lambda x: 20 * x if x.ndim == 3 else x, params)
    assert_close(by_xla.apply(params, IDS), model.apply(params, IDS), 1e-5)


@pytest.mark.parametrize("form", ["t5/v11", "decoders/mistral"])
def test_generation_attends_by_einsum(form, monkeypatch):
    model, params = loaded(form)
    fused, _ = loaded(form, attn_implementation="xla")
    settings = {"max_new_tokens": 3, "eos_token_id": ()}
    want = models.generate(model, params, IDS, MASK, **settings)
    calls = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, *args, **how: calls.append(q.shape[1]) or by_jax(q, *args, **how),
    )
    got = models.generate(fused, params, IDS, MASK, **settings)
    np.testing.assert_array_equal(got, want)
    # Only T5's encoder reads a whole sequence without a cache.
    assert set(calls) == ({7} if form.startswith("t5") else set())


T, S = 38, 26  # both even; what is [T, S] or [T, T] is found by these
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
BERT = {"vocab_size": 29, "num_attention_heads": 4, **SIZES}
LLAMA = {"num_key_value_heads": 2, **BERT}
TWO_KINDS = {
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 5,
}
CUDA = {
    "t5": (T5, models.T5Config(29, 32, 8, 24, num_layers=2, num_heads=4)),
    "gpt2": (GPT2, models.GPT2Config(29, 64, 32, 2, 4)),
    "llama": (Llama, models.LlamaConfig(**LLAMA)),
    "mistral": (Llama, models.LlamaConfig("mistral", sliding_window=5, **LLAMA)),
    "gemma3": (Llama, models.GemmaConfig("gemma3_text", **TWO_KINDS, **LLAMA)),
    "bert": (Bert, models.bert.BertConfig(**BERT)),
}
# How often two blocks attend, or the four of T5's stacks.
CALLS = dict.fromkeys(CUDA, 2) | {"t5": 6}
# Of a mask they are a part.
WINDOWS = {"mistral": {"5"}, "gemma3": {"0", "5"}}


@pytest.fixture
def cudnn(monkeypatch):
    found = lambda: 91000
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", found)


def lowered(family, masked, *, train, **settings):
    """Return the program for CUDA: the logits, or the gradients of adapters."""
    make, config = CUDA[family]
    bf16 = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = make(config, attn_implementation="cudnn", **bf16, **settings)
    ids = jnp.ones((2, T), jnp.int32)
    args = (ids, ids if masked else None)
    if family == "t5":
        args = (ids[:, :S], ids[:, :S] if masked else None, ids)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    f = lambda params: model.apply({"params": params}, *args)
    if not train:
        traced = jax.jit(f).trace(shapes)
    else:
        targets = ["c_attn"] if family == "gpt2" else ["query", "value"]
        half, frozen = jlora.split(jlora.lorafy(shapes, rank=2, targets=targets))

        def loss(half, frozen):
            y = jlora.lora(f)(jlora.combine(half, frozen))
            return jnp.mean(y.astype(jnp.float32))

        traced = jax.jit(jax.grad(loss)).trace(half, frozen)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.replace(r"\22", '"')


def calls_in(text, *, backward):
    names = re.findall(r"@__cudnn\$fmha(\w+)", text)
    return sum(name.endswith("Backward") == backward for name in names)


def scores_in(text):
    """Return the types of scores: what products make, and all heads' in float32."""
    lengths = rf"(?:{T}|{S})x(?:{T}|{S})"
    made = re.findall(rf"stablehlo\.dot_general.*-> (tensor<\S*{lengths}x\w+>)", text)
    return made + re.findall(rf"tensor<2x4x{lengths}xf32>", text)


@pytest.mark.parametrize("masked", [True, False], ids=["padding", "none"])
@pytest.mark.parametrize("family", CUDA)
def test_programs_for_cuda_hold_the_kernel_and_no_scores(family, masked, cudnn):
    forward = lowered(family, masked, train=False)
    train = lowered(family, masked, train=True)
    assert calls_in(forward, backward=False) == CALLS[family]
    assert calls_in(train, backward=True) == CALLS[family]
    assert not scores_in(forward)
    assert not scores_in(train)
    kinds = re.findall(r'"mask_type": "(\w+)"', forward)
    assert kinds.count("CAUSAL") == (0 if family == "bert" else 2)
    windows = set(re.findall(r'"sliding_window_length": (\d+)', forward))
    assert windows == ({"0"} if masked else WINDOWS.get(family, {"0"}))
    if not masked and family not in ("t5", "bert"):
        # Causality and windows are names: no mask is formed.
        assert f"{T}x{T}" not in train


def test_what_looks_for_scores_finds_them(cudnn, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_cudnn)
    assert scores_in(lowered("gpt2", True, train=True))


@pytest.mark.parametrize("family", ["t5", "gpt2", "gemma3", "bert"])
def test_the_kernel_in_scanned_and_recomputed_blocks(family, cudnn):
    text = lowered(family, True, train=True, scan_layers=True, remat=True)
    assert calls_in(text, backward=True) == CALLS[family] // 2
    assert not scores_in(text)


def shape_of(family, *mask, deterministic=True, **settings):
    """Trace a model on two texts."""
    make, config = CUDA[family]
    model = make(config, **settings)
    ids, rngs = jnp.ones((2, T), jnp.int32), {"dropout": jax.random.key(0)}
    params = jax.eval_shape(model.init, rngs["dropout"], ids)
    f = partial(model.apply, deterministic=deterministic, rngs=rngs)
    return jax.eval_shape(f, params, ids, *mask)


def test_what_no_kernel_does_is_an_error(cudnn, monkeypatch):
    with pytest.raises(StructureError, match=r"'flash' is not known.*\n.*einsum, xla"):
        GPT2(None, attn_implementation="flash")
    model, params = loaded("decoders/gemma2", attn_implementation="xla")
    with pytest.raises(StructureError, match=r"caps its scores at 2\.0.*\n.*einsum"):
        model.apply({"params": params}, IDS)
    with pytest.raises(StructureError, match=r"dropout of.*0\.1[\s\S]*einsum"):
        shape_of("gpt2", deterministic=False, attn_implementation="xla")
    narrow = GPT2, models.GPT2Config(29, 64, 12, 2, 4)
    monkeypatch.setitem(CUDA, "narrow", narrow)
    refusals = {"float32": "got float32", "bfloat16": "multiple of 8, but got 3"}
    for dtype, why in refusals.items():
        match = rf"queries \(2, 38, 4, 3\)[\s\S]*{why}[\s\S]*einsum"
        with pytest.raises(StructureError, match=match):
            shape_of("narrow", attn_implementation="cudnn", dtype=jnp.dtype(dtype))
    with pytest.raises(StructureError, match=r"in float32[\s\S]*einsum"):
        shape_of("narrow", jnp.ones((2, T)), attn_implementation="cudnn")


def test_no_cudnn_is_an_error_that_says_what_to_install():
    if fused_attention_stablehlo.cuda_versions is not None:
        pytest.skip("this machine has cuDNN")
    with pytest.raises(StructureError, match=r"not detected[\s\S]*jax\[cuda\]"):
        shape_of("gpt2", attn_implementation="cudnn", dtype=jnp.bfloat16)


def test_adapters_train_alike():
    def gradients(**settings):
        model, params = loaded("decoders/llama", scan_layers=True, **settings)
        tree = jlora.lorafy(params, rank=2, targets=["query", "value"])
        half, frozen = jlora.split(randomise(tree, jax.random.key(3)))
        f = jlora.lora(lambda params: model.apply({"params": params}, IDS, MASK))

        def loss(half):
            y = jnp.sin(f(jlora.combine(half, frozen)))
            return jnp.mean(jnp.where(MASK[..., None] == 1, y, 0))

        return jax.jit(jax.grad(loss))(half)

    assert_close(gradients(attn_implementation="xla"), gradients(), 1e-5)
