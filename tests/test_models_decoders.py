"""GPT-2 and the Llama family against PyTorch's numbers, recorded and live."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import models
from jlora._errors import ShapeError
from jlora.models import GPT2, GPT2Config, Llama, LlamaConfig

GOLDEN = Path(__file__).parent / "golden" / "decoders"
FORMS = [
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
]
MORE = [
    "gpt2 untied",
    "gpt2 scaled",
    "llama plain",
    "llama one key head",
    "llama linear",
    "llama biases",
    "mistral without window",
    "qwen2 half sliding",
    "qwen3 biases, sliding",
    "gemma",
    "gemma2 untied, uncapped",
    "gemma3 by its period",
    "mixtral sliding, all experts",
    "qwen2_moe half sliding",
    "qwen3_moe sliding",
]
EOS = 1


@lru_cache
def golden(form):
    model, params = models.load(GOLDEN / form)
    return model, params, load_file(GOLDEN / form / "io.safetensors")


@lru_cache
def compiled(model, **how):
    """One program for a model and what is done with it; tests share it."""
    return jax.jit(partial(model.apply, **how))


def forward(model, params, *args, **how):
    return compiled(model, **how)({"params": params}, *args)


def assert_logits(got, want, mask=None, scale=None):
    """Equal to 2e-5 of the largest logit, padding aside."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if mask is not None:
        got, want = got * mask[..., None], want * mask[..., None]
    atol = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def until_end(rows):
    rows = np.asarray(rows).tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_pytorchs(form):
    model, params, io = golden(form)
    ids, mask = io["input_ids"], io["attention_mask"]
    got = forward(model, params, ids, mask)
    assert got.dtype == jnp.float32
    assert_logits(got, io["logits"], mask)


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    model, params, io = golden(form)
    ids = io["input_ids"][0, :5]
    want = forward(model, params, ids[None])
    padded = np.random.default_rng(0).integers(2, 37, (4, 9))  # whatever stands there
    mask = np.zeros((4, 9), np.int32)
    begins = (0, 4, 2)  # padded on the right, on the left, on both sides; all padding
    for row, at in enumerate(begins):
        padded[row, at : at + 5], mask[row, at : at + 5] = ids, 1
    got = forward(model, params, padded, mask)
    for row, at in enumerate(begins):
        assert_logits(got[row, at : at + 5], want[0])
    assert np.isfinite(got).all()


@pytest.mark.parametrize("form", ["gpt2", "qwen3"])
def test_positions_may_be_given(form):
    model, params, io = golden(form)
    ids = io["input_ids"][:1]
    got = forward(model, params, ids, None, jnp.arange(9)[None])
    np.testing.assert_array_equal(got, forward(model, params, ids))
    # Turning is by distance, a table of positions is not.
    later = forward(model, params, ids, None, jnp.arange(9)[None] + 5)
    moved = np.abs(later - got).max() > 1e-3
    assert moved == (form == "gpt2")


@pytest.mark.parametrize("form", FORMS)
def test_steps_with_a_cache_are_one_pass(form):
    model, params, io = golden(form)
    ids = io["input_ids"]
    mask = np.ones_like(ids)
    mask[2, :3], mask[3, :4] = 0, 0  # of the prompt; what follows is all new
    want = forward(model, params, ids, mask)
    how = {"length": 6, "beams": 1, "method": "prefill"}
    last, cache = forward(model, params, ids[:, :5], mask[:, :5], **how)
    np.testing.assert_array_equal(last, ids[:, 4])
    got, at = [], 4
    for size in (1, 1, 3):
        fed = ids[:, at : at + size]
        logits, cache = forward(model, params, fed, cache, method="decode_step")
        got, at = [*got, logits], at + size
    assert_logits(np.concatenate(got, axis=1), want[:, 4:])
    assert int(cache["shared"]["index"]) == 9


def test_the_cache_holds_keys_for_every_beam_and_no_more_heads():
    model, params, io = golden("llama")
    how = {"length": 3, "beams": 2, "method": "prefill"}
    ids = io["input_ids"]
    last, cache = forward(model, params, ids, io["attention_mask"], **how)
    assert last.shape == (8,)
    assert cache["beams"][0][0].shape == (8, 2, 9 - 1 + 3, 8)
    assert len(cache["beams"]) == 2


@pytest.mark.parametrize("number", range(len(FORMS)), ids=FORMS)
def test_tokens_are_pytorchs(number):
    """Greedy and beams; every setting with some families, to compile less."""
    form = FORMS[number]
    model, params, io = golden(form)
    prompts = io["input_ids"], io["attention_mask"]
    *greedy, first, second, third = json.loads(
        (GOLDEN / form / "generated.json").read_text()
    )
    for cases in (greedy, (first, second, third)):
        case = cases[number % len(cases)]
        got = models.generate(model, params, *prompts, **case["settings"])
        assert until_end(got) == case["tokens"], case["settings"]


def test_golden_cases_end_early_and_late():
    files = [json.loads((GOLDEN / f / "generated.json").read_text()) for f in FORMS]
    lengths = {len(row) for cases in files for case in cases for row in case["tokens"]}
    assert len(lengths) > 6


def test_a_prompt_of_one_token():
    model, params, _ = golden("qwen3")
    ids = jnp.array([[5], [7]])
    got = models.generate(model, params, ids, max_new_tokens=3)
    for n in range(3):
        logits = forward(model, params, ids)
        ended = (np.asarray(got)[:, :n] == EOS).any(1)
        want = np.where(ended, 0, jnp.argmax(logits[:, -1], -1))
        np.testing.assert_array_equal(got[:, n], want)
        ids = jnp.concatenate([ids, got[:, n : n + 1]], axis=1)


def test_sampling_narrowed_to_one_token_is_greedy():
    model, params, io = golden("llama")
    prompts = io["input_ids"], io["attention_mask"]
    how = {"max_new_tokens": 6}
    want = models.generate(model, params, *prompts, **how)
    how |= {"do_sample": True, "top_k": 1, "key": jax.random.key(0)}
    np.testing.assert_array_equal(models.generate(model, params, *prompts, **how), want)


def test_without_a_padding_token_the_end_token_fills():
    model, params, io = golden("gpt2")
    prompts = io["input_ids"], io["attention_mask"]
    bare = GPT2(GPT2Config.from_dict({**model.config.to_dict(), "pad_token_id": None}))
    got = np.asarray(models.generate(bare, params, *prompts, max_new_tokens=9))
    want = np.asarray(models.generate(model, params, *prompts, max_new_tokens=9))
    assert (want == EOS).any()
    np.testing.assert_array_equal(got, np.where(want == 0, EOS, want))


def shapes_of(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}


def test_names_are_the_files_names():
    gpt2, llama = (shapes_of(golden(form)[1]) for form in ("gpt2", "llama"))
    assert {
        "transformer/wte/embedding": (37, 18),
        "transformer/wpe/embedding": (32, 18),
        "transformer/h/0/ln_1/weight": (18,),
        "transformer/h/0/attn/c_attn/kernel": (18, 54),
        "transformer/h/1/attn/c_attn/bias": (54,),
        "transformer/h/1/mlp/c_proj/kernel": (72, 18),
        "transformer/ln_f/bias": (18,),
    }.items() <= gpt2.items()
    assert len(gpt2) == 2 * 12 + 4
    assert {
        "model/embed_tokens/embedding": (37, 16),
        "model/layers/0/self_attn/q_proj/kernel": (16, 32),
        "model/layers/1/self_attn/v_proj/kernel": (16, 16),
        "model/layers/1/mlp/down_proj/kernel": (24, 16),
        "model/layers/1/input_layernorm/weight": (16,),
        "model/norm/weight": (16,),
        "lm_head/kernel": (16, 37),
    }.items() <= llama.items()
    assert len(llama) == 2 * 9 + 3


def test_families_differ_in_biases_norms_and_heads():
    qwen2, qwen3 = (shapes_of(golden(form)[1]) for form in ("qwen2", "qwen3"))
    assert qwen2["model/layers/0/self_attn/k_proj/bias"] == (8,)
    assert "model/layers/0/self_attn/o_proj/bias" not in qwen2
    assert "lm_head/kernel" not in qwen2  # tied
    assert qwen3["model/layers/0/self_attn/q_norm/weight"] == (6,)
    assert "model/layers/0/self_attn/k_proj/bias" not in qwen3


def test_names_of_experts_are_those_that_adapters_are_saved_by():
    mixtral, qwen = (shapes_of(golden(form)[1]) for form in ("mixtral", "qwen2_moe"))
    assert {
        "model/layers/1/mlp/gate/kernel": (16, 3),
        "model/layers/0/mlp/experts/gate_up_proj": (3, 16, 2 * 24),
        "model/layers/0/mlp/experts/down_proj": (3, 24, 16),
    }.items() <= mixtral.items()
    assert {
        "model/layers/0/mlp/up_proj/kernel": (16, 24),  # a dense layer
        "model/layers/1/mlp/experts/gate_up_proj": (5, 16, 2 * 12),
        "model/layers/1/mlp/shared_expert/down_proj/kernel": (14, 16),
        "model/layers/1/mlp/shared_expert_gate/kernel": (16, 1),
    }.items() <= qwen.items()


GEMMA3_ROPE = {"sliding_attention": {"rope_theta": 50.0}, "full_attention": {}}


@pytest.mark.parametrize(
    ("form", "other"),
    [
        ("gemma2", {"query_pre_attn_scalar": 6}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * 2}),
        ("gemma3", {"rope_local_base_freq": None, "rope_parameters": GEMMA3_ROPE,
                    "rope_scaling": None, "rope_theta": None}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
    ],
)  # fmt: skip
def test_each_choice_of_a_configuration_counts(form, other):
    """Or equality with PyTorch's numbers would say nothing of it."""
    model, params, io = golden(form)
    config = type(model.config).from_dict({**model.config.to_dict(), **other})
    got = forward(Llama(config), params, io["input_ids"])
    moved = np.abs(got - forward(model, params, io["input_ids"])).max()
    assert moved > 1e-3 * np.abs(got).max()


@pytest.mark.parametrize(
    ("kind", "form"), [(GPT2, "gpt2"), (Llama, "qwen3"), (Llama, "gemma2")]
)
def test_compute_in_bfloat16_with_float32_parameters(kind, form):
    model, params, io = golden(form)
    low = kind(model.config, dtype=jnp.bfloat16)
    made = jax.eval_shape(low.init, jax.random.key(0), io["input_ids"])
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    got = forward(low, params, io["input_ids"][:1])
    assert got.dtype == jnp.bfloat16
    want = io["logits"][:1]
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1 * want.max())


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_dropout_only_where_asked(form):
    model, params, io = golden(form)
    if form == "llama":
        changed = {**model.config.to_dict(), "attention_dropout": 0.3}
        model = Llama(LlamaConfig.from_dict(changed))
    ids = io["input_ids"]
    drop = jax.jit(
        lambda key: model.apply(
            {"params": params}, ids, deterministic=False, rngs={"dropout": key}
        )
    )
    dropped = drop(jax.random.key(1))
    np.testing.assert_array_equal(dropped, drop(jax.random.key(1)))
    assert np.abs(forward(model, params, ids) - dropped).max() > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        GPT2(GPT2Config(vocab_size=29, n_positions=8, n_embd=16, n_layer=2, n_head=2)),
        Llama(
            LlamaConfig(
                vocab_size=29,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        ),
    ],
)
def test_initial_parameters_train(model):
    ids = jnp.arange(12).reshape(2, 6)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]

    def loss(params):
        logits = model.apply({"params": params}, ids)[:, :-1]
        logp = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1))

    first, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(first, np.log(29), atol=0.1)
    still = [k for k, g in shapes_with(grads) if not np.any(np.asarray(g))]
    assert still == []


def shapes_with(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(k.key for k in path), leaf) for path, leaf in flat]


def test_too_many_tokens_for_the_positions_are_refused():
    model, params, io = golden("gpt2")
    with pytest.raises(ShapeError, match="n_positions=32"):
        model.apply({"params": params}, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ShapeError, match="max_new_tokens"):
        models.generate(model, params, io["input_ids"], max_new_tokens=25)
    models.generate(model, params, io["input_ids"], max_new_tokens=24)


def test_masks_of_another_shape_are_refused():
    model, params, io = golden("llama")
    mask = np.ones((4, 9, 9))
    with pytest.raises(ShapeError, match="before it"):
        model.apply({"params": params}, io["input_ids"], mask)


@pytest.mark.oracle
@pytest.mark.parametrize("form", FORMS + MORE)
def test_everything_is_pytorchs_live(form, tmp_path):
    """Logits, tokens, and what PyTorch makes of the checkpoint that is written here."""
    pytest.importorskip("torch")
    import transformers
    from golden import make_decoders

    theirs, batch = make_decoders.random_decoder(form, 30), make_decoders.inputs(30)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = models.load(tmp_path / "theirs")
    prompts = batch["input_ids"], batch["attention_mask"]
    want = make_decoders.logits(theirs, batch)
    assert_logits(forward(model, params, *prompts), want, batch["attention_mask"])
    settings = make_decoders.settings(new_tokens=9)
    number = (FORMS + MORE).index(form)
    for how in (settings[number % 2], settings[2 + number % 3]):
        got = models.generate(model, params, *prompts, **how)
        assert until_end(got) == make_decoders.generated(theirs, batch, **how), how
    models.save(model, params, tmp_path / "ours")
    load = transformers.AutoModelForCausalLM.from_pretrained
    again, info = load(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    np.testing.assert_array_equal(make_decoders.logits(again.eval(), batch), want)
