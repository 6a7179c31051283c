"""T5 against PyTorch's numbers: recorded ones, and live ones marked `oracle`."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from safetensors.numpy import load_file
from tools import equations

from jlora import LoraError, models, stack_layers
from jlora._errors import CheckpointError, ShapeError
from jlora.models import T5, T5Config
from jlora.models.t5._layers import position_buckets

GOLDEN = Path(__file__).parent / "golden"
FORMS = ["v10", "v11"]
TINY = {"vocab_size": 29, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 3}


@lru_cache
def golden(form):
    model, params = models.load(GOLDEN / "t5" / form)
    return model, params, load_file(GOLDEN / "t5" / form / "io.safetensors")


def batch_of(io):
    names = ["input_ids", "attention_mask"]
    names += ["decoder_input_ids", "decoder_attention_mask"]
    return [io[name] for name in names]


@lru_cache
def tiny(form="v11"):
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    sizes = {**TINY, "num_layers": 2, **(gated if form == "v11" else {})}
    model = T5(T5Config(**sizes))
    ids = jnp.arange(12).reshape(2, 6) + 2
    params = jax.jit(model.init)(jax.random.key(0), ids, None, ids)["params"]
    return model, params, ids


def forward(model, params, *args, **kwargs):
    return jax.jit(partial(model.apply, **kwargs))({"params": params}, *args)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_pytorchs(form):
    model, params, io = golden(form)
    got = forward(model, params, *batch_of(io))
    np.testing.assert_allclose(got, io["logits"], atol=1e-5)


def test_logits_of_the_adapters_base_are_pytorchs():
    model, params = models.load(GOLDEN / "peft" / "t5_qv" / "base")
    io = load_file(GOLDEN / "peft" / "t5_qv" / "io.safetensors")
    ids = io["input_ids"], None, io["decoder_input_ids"]
    got = forward(model, params, *ids)
    np.testing.assert_allclose(got, io["base_logits"], atol=1e-5)


def test_buckets_are_pytorchs():
    offsets = np.arange(-1500, 1501)
    for name, want in load_file(GOLDEN / "t5" / "buckets.safetensors").items():
        kind, number, distance = name.split("/")
        got = position_buckets(
            offsets,
            bidirectional=kind == "both",
            buckets=int(number),
            max_distance=int(distance),
        )
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    model, params, io = golden(form)
    ids, mask, target, _ = batch_of(io)
    padded = forward(model, params, ids[1:2], mask[1:2], target[1:2])
    alone = forward(model, params, ids[1:2, :6], None, target[1:2])
    np.testing.assert_allclose(padded, alone, atol=1e-5)


@pytest.mark.parametrize(("form", "steps"), [("v10", [4, 2]), ("v11", [1] * 6)])
def test_steps_with_a_cache_are_one_pass(form, steps):
    model, params, io = golden(form)
    ids, mask, target, _ = batch_of(io)
    want = forward(model, params, ids, mask, target[:, :6])
    encoded = forward(model, params, ids, mask, method="encode")
    room = {"length": 8, "method": "init_cache"}
    cache = forward(model, params, encoded, mask, **room)
    step = jax.jit(partial(model.apply, method="decode_step"))
    got, at = [], 0
    for size in steps:
        logits, cache = step({"params": params}, target[:, at : at + size], cache)
        got, at = [*got, logits], at + size
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-5)
    assert int(cache["shared"]["index"]) == 6


def test_beams_share_the_encoders_keys():
    model, params, io = golden("v11")
    ids, mask, target, _ = batch_of(io)
    encoded = forward(model, params, ids, mask, method="encode")
    room = {"length": 3, "beams": 2, "method": "init_cache"}
    cache = forward(model, params, encoded, mask, **room)
    assert cache["shared"]["cross"][0][0].shape[0] == len(ids)
    assert cache["beams"][0][0].shape[0] == 2 * len(ids)
    tokens = np.repeat(target[:, :3], 2, axis=0)
    logits, _ = forward(model, params, tokens, cache, method="decode_step")
    want = forward(model, params, ids, mask, target[:, :3])
    np.testing.assert_allclose(logits, np.repeat(want, 2, axis=0), atol=1e-5)


def test_cross_attention_waits_for_its_block():
    """Products with one operand XLA would make at once, and keep for all blocks."""
    model, params, ids = tiny()
    jaxpr = jax.make_jaxpr(forward, static_argnums=0)(model, params, ids, None, ids)
    inputs = [e.invars[0] for e in equations(jaxpr) if is_projection(e, ids.shape)]
    # Two blocks a stack: query, key, value; those and one for the encoder's output.
    uses = [inputs.count(x) for x in dict.fromkeys(inputs)]
    assert max(uses) == 3
    assert sum(uses) == 2 * 3 + 2 * (3 + 3)


def is_projection(eqn, shape):
    """Whether `[B, T, d]` meets a kernel of attention's queries, keys or values."""
    shapes = [v.aval.shape for v in eqn.invars]
    inner = TINY["num_heads"] * TINY["d_kv"]
    d = TINY["d_model"]
    return eqn.primitive.name == "dot_general" and shapes == [(*shape, d), (d, inner)]


@pytest.mark.parametrize("scan", [False, True])
def test_remat_keeps_no_keys_and_values(scan, capsys):
    model, params, ids = tiny()
    if scan:
        params = stack_layers(params)

    def kept(**fields):
        net = model.clone(scan_layers=scan, **fields)
        loss = lambda p: net.apply({"params": p}, ids, None, ids).sum()
        print_saved_residuals(loss, params)
        return capsys.readouterr().out

    B, S = ids.shape
    of_a_block = f"{B},{TINY['num_heads']},{S},{TINY['d_kv']}]"
    assert of_a_block in kept()
    assert of_a_block not in kept(remat=True)


def test_names_are_the_files_names():
    _, params, _ = tiny()
    flat = jax.tree_util.tree_leaves_with_path(params)
    shapes = {"/".join(k.key for k in path): leaf.shape for path, leaf in flat}
    some = {
        "shared/embedding": (29, 16),
        "encoder/block/0/layer/0/SelfAttention/q/kernel": (16, 12),
        "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (
            32,
            3,
        ),
        "encoder/block/1/layer/1/DenseReluDense/wi_0/kernel": (16, 24),
        "encoder/block/1/layer/1/layer_norm/weight": (16,),
        "encoder/final_layer_norm/weight": (16,),
        "decoder/block/0/layer/1/EncDecAttention/v/kernel": (16, 12),
        "decoder/block/1/layer/2/DenseReluDense/wo/kernel": (24, 16),
        "lm_head/kernel": (16, 29),
    }
    assert some.items() <= shapes.items()
    # Per block: 4 + norm, 3 + norm; 4 + norm, 4 + norm, 3 + norm; two position tables.
    assert len(shapes) == 2 * (5 + 4) + 2 * (5 + 5 + 4) + 2 + 2 + 1 + 1


def test_a_tied_head_has_no_kernel():
    assert "lm_head" not in tiny("v10")[1]


def test_compute_in_bfloat16_with_float32_parameters():
    model, params, ids = tiny()
    low = T5(model.config, dtype=jnp.bfloat16)
    made = jax.eval_shape(low.init, jax.random.key(0), ids, None, ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    got = forward(low, params, ids, None, ids)
    assert got.dtype == jnp.bfloat16
    want = forward(model, params, ids, None, ids)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)


def test_dropout_only_where_asked():
    model, params, ids = tiny()
    plain = forward(model, params, ids, None, ids)
    drop = jax.jit(
        lambda key: model.apply(
            {"params": params},
            *(ids, None, ids),
            deterministic=False,
            rngs={"dropout": key},
        )
    )
    dropped = drop(jax.random.key(1))
    np.testing.assert_array_equal(dropped, drop(jax.random.key(1)))
    assert np.abs(plain - dropped).max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_initial_logits_are_not_saturated(form):
    model, params, ids = tiny(form)
    assert float(jnp.std(forward(model, params, ids, None, ids))) < 2


def primitives_on_parameters(jaxpr, used):
    """Return {parameter's index: primitives that take it}, through nested jaxprs."""
    found = {i: set() for i in used.values()}
    for eqn in jaxpr.eqns:
        taken = {used[v]: i for i, v in enumerate(eqn.invars) if id(v) in map(id, used)}
        inner = eqn.params.get("jaxpr")
        for number, place in taken.items():
            if inner is None:
                found[number].add(eqn.primitive.name)
            else:
                nested = getattr(inner, "jaxpr", inner)
                below = {nested.invars[place]: number}
                found[number] |= primitives_on_parameters(nested, below)[number]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_parameters_meet_plain_products_and_gathers(form):
    model, params, ids = tiny(form)
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    apply = lambda params: model.apply({"params": params}, ids, None, ids)
    jaxpr = jax.make_jaxpr(apply)(params).jaxpr
    used = {v: i for i, v in enumerate(jaxpr.invars)}
    allowed = {
        "kernel": {"dot_general"},
        "weight": {"broadcast_in_dim", "mul", "reshape"},
        "embedding": {"gather"},
    }
    for number, primitives in primitives_on_parameters(jaxpr, used).items():
        path = [key.key for key in paths[number]]
        tied = {"dot_general"} if form == "v10" and path[0] == "shared" else set()
        assert primitives <= allowed[path[-1]] | tied, path
        assert primitives


def test_shift_right():
    config = T5Config(decoder_start_token_id=7, pad_token_id=3)
    labels = jnp.array([[5, -100, 6, -100], [4, 5, 6, 1]])
    want = [[7, 5, 3, 6], [7, 4, 5, 6]]
    np.testing.assert_array_equal(models.shift_right(labels, config), want)


def test_decoder_inputs_are_needed():
    model, params, ids = tiny()
    with pytest.raises(ShapeError, match="shift_right"):
        model.apply({"params": params}, ids)


PUBLISHED = {  # FLAN-T5-small's
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4}},
    "tie_word_embeddings": False,
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 32128,
}


def test_config_keeps_what_it_does_not_compute_with():
    config = T5Config.from_dict(PUBLISHED)
    assert (config.gated, config.dense_act_fn) == (True, "gelu_new")
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (False, False)
    written = config.to_dict()
    assert written.items() >= PUBLISHED.items()
    assert T5Config.from_dict(json.loads(json.dumps(written))) == config
    hash(config)


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(CheckpointError, match="is_decoder is True"):
        T5Config.from_dict({**PUBLISHED, "is_decoder": True})
    with pytest.raises(CheckpointError, match=r"T5 config: attention_sinks is 4"):
        T5Config.from_dict({**PUBLISHED, "attention_sinks": 4})
    # What says that nothing is to be done is let pass.
    T5Config.from_dict({**PUBLISHED, "attention_sinks": None, "typical_p": 1.0})


@pytest.mark.parametrize(
    ("given", "tied", "scaled"),
    [
        ({}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, True),
    ],
)
def test_config_of_the_head(given, tied, scaled):
    config = T5Config.from_dict(given)
    assert config.tie_word_embeddings is tied
    assert config.scale_decoder_outputs is scaled


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"feed_forward_proj": "gated-mish"}, "mish"),
        ({"dense_act_fn": "tanh_wild"}, "tanh_wild"),
        ({"feed_forward_proj": "gated-gelu-new"}, "gated-gelu-new"),
        ({"is_gated_act": True}, "is_gated_act"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"relative_attention_num_buckets": 2}, "num_buckets"),
        ({"relative_attention_max_distance": 16}, "max_distance"),
        ({"num_heads": 0}, "num_heads"),
        ({"d_model": "512"}, "d_model"),
    ],
)
def test_config_refuses_what_it_cannot_honour(wrong, words):
    with pytest.raises(LoraError, match=words) as caught:
        T5Config.from_dict(wrong)
    assert isinstance(caught.value, (CheckpointError, ShapeError))


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [10, 11])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_pytorchs_live(form, seed, tmp_path):
    pytest.importorskip("torch")
    from golden import make_t5

    theirs, batch = make_t5.random_t5(form, seed), make_t5.inputs(seed)
    theirs.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    got = forward(model, params, *batch_of(batch))
    np.testing.assert_allclose(got, make_t5.logits(theirs, batch), atol=1e-5)
