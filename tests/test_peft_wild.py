"""PEFT folders as they are met: raw keys, added tokens, rounded copies, later keys."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
import jlora.peft
from jlora import models

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
V, D = 20, 12  # tokens and width of the base
IDS = np.array([[3, 1, 4], [1, 5, 9]])
Q, EMBED, HEAD = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"


def random(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return rng.normal(size=shape).astype(np.float32) * 0.3


def llama(tied=False, vocab=V):
    config = models.LlamaConfig(vocab_size=vocab, hidden_size=D, intermediate_size=10,
        num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1,
        max_position_embeddings=16, tie_word_embeddings=tied)  # fmt: skip
    model = models.Llama(config=config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(random(*x.shape)), shapes)


def folder(path, tensors, **config):
    path.mkdir(exist_ok=True)
    named = {f"{PREFIX}{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(named, path / WEIGHTS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / CONFIG).write_text(json.dumps({**said, **config}))
    return path


def on_q(infix=""):
    a, b = random(2, D), random(D, 2)
    return {f"{Q}.lora_A{infix}.weight": a, f"{Q}.lora_B{infix}.weight": b}


def logits(model, tree):
    apply = jlora.lora(lambda p: model.apply({"params": p}, IDS))
    return np.asarray(apply(tree))


def changed(params, **deltas):
    """A copy with something added to the kernels: what PEFT computes."""
    out = jax.tree.map(lambda x: x, params)
    q = out["model"]["layers"]["0"]["self_attn"]["q_proj"]
    q["kernel"] += 2.0 * (random(D, 2) @ random(2, D)).T
    for name, delta in deltas.items():
        out[name]["kernel"] += delta
    return out


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def refused(match, *args, **kwargs):
    with pytest.raises(jlora.CheckpointError, match=match):
        jlora.peft.load(*args, **kwargs)


# -- keys of the model itself ----------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "german"])
def test_keys_that_hold_the_adapters_name(name, tmp_path):
    model, params = llama()
    extra = {f"{HEAD}.modules_to_save.{name}.weight": random(V, D, seed=1),
             f"{HEAD}.original_module.weight": random(V, D)}  # fmt: skip
    place = folder(tmp_path / "a", {**on_q(f".{name}"), **extra},
                   modules_to_save=["lm_head"])  # fmt: skip
    want = changed(params)
    want["lm_head"]["kernel"] = jnp.asarray(random(V, D, seed=1).T)
    close(logits(model, jlora.peft.load(place, params)), logits(model, want))


def test_such_keys_of_dora_tables_and_tokens(tmp_path):
    model, params = llama()
    tree = jlora.lorafy(params, 2, ["q_proj"], dora=True)
    jlora.peft.save(tmp_path / "a", tree)
    wanted = jlora.peft.load(tmp_path / "a", params)
    raw = {}
    for key, value in jlora._files.read_tensors(tmp_path / "a" / WEIGHTS).items():
        new = key.replace("_vector", "_vector.default.weight")
        raw[new.replace("_A.", "_A.default.").replace("_B.", "_B.default.")] = value
    save_file(raw, tmp_path / "a" / WEIGHTS)
    got = jlora.peft.load(tmp_path / "a", params)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, wanted))
    table = {f"{EMBED}.lora_embedding_A.default": random(2, V),
             f"{EMBED}.lora_embedding_B.default": random(D, 2)}  # fmt: skip
    place = folder(tmp_path / "b", table, target_modules=["embed_tokens"])
    node = jlora.peft.load(place, params)["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(node.adapters[""].a, random(2, V).T)
    rows = {f"{EMBED}.token_adapter.trainable_tokens_delta.default": random(1, D)}
    place = folder(tmp_path / "c", {**on_q(".default"), **rows},
                   trainable_token_indices=[7])  # fmt: skip
    node = jlora.peft.load(place, params)["model"]["embed_tokens"]["embedding"]
    assert node.indices == (7,)
    np.testing.assert_array_equal(node.rows, random(1, D))


def test_keys_that_are_not_understood_are_shown(tmp_path):
    _, params = llama()
    two = {**on_q(".de"), **on_q(".fr")}
    refused("several adapters in one file, de, fr", folder(tmp_path / "a", two), params)
    odd = {**on_q(), f"{Q}.lora_C.default.weight": random(2, D)}
    refused(r"lora_C\.default\.weight", folder(tmp_path / "b", odd), params)
    twice = {**on_q(), **on_q(".default")}
    refused("which are one tensor", folder(tmp_path / "c", twice), params)
    copy = {**on_q(), f"{HEAD}.modules_to_save.default.weight": random(V, D)}
    refused("modules_to_save", folder(tmp_path / "d", copy), params)


# -- the configuration -----------------------------------------------------------------


def test_null_targets_are_those_of_the_file(tmp_path):
    model, params = llama()
    place = folder(tmp_path / "a", on_q(), target_modules=None)
    close(logits(model, jlora.peft.load(place, params)), logits(model, changed(params)))
    place = folder(
        tmp_path / "b", on_q(), target_modules=None, exclude_modules=["q_proj"]
    )
    refused("has an adapter, but is not targeted", place, params)


@pytest.mark.parametrize("value", [32, 0.5, "fast"])
def test_a_later_releases_settings_are_passed_over(value, tmp_path):
    model, params = llama()
    place = folder(tmp_path / "a", on_q(), tomorrows_group_size=value)
    with pytest.warns(jlora.JloraWarning, match=f"tomorrows_group_size {value!r}"):
        tree = jlora.peft.load(place, params)
    close(logits(model, tree), logits(model, changed(params)))


@pytest.mark.parametrize(
    "said",
    [
        {"use_tomorrow": True},
        {"tomorrow_config": {"r": 2}},
        {"tomorrows_layers": [1]},
        {"lora_scaling": 2.0},
        {"delta_scale": 0.5},
        {"use_qalora": True},
        {"megatron_config": "x"},
    ],
)
def test_what_would_change_numbers_stays_an_error(said, tmp_path):
    _, params = llama()
    refused(next(iter(said)), folder(tmp_path / "a", on_q(), **said), params)


# -- copies of the base ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (ml_dtypes.bfloat16, jnp.float32),
        (np.float16, jnp.float32),
        (np.float32, jnp.bfloat16),
        (np.float32, jnp.float32),
    ],
)
def test_a_rounded_copy_of_the_base_is_the_base(stored, held, tmp_path):
    model, params = llama()
    params = jax.tree.map(lambda x: x.astype(held), params)
    head = random(D, V).T.astype(stored)
    on_head = {"lm_head.lora_A.weight": random(2, D), "lm_head.lora_B.weight": random(V, 2),
               "lm_head.base_layer.weight": head}  # fmt: skip
    place = folder(tmp_path / "a", {**on_q(), **on_head},
                   target_modules=["q_proj", "lm_head"])  # fmt: skip
    node = jlora.peft.load(place, params)["lm_head"]["kernel"]
    assert node.base is params["lm_head"]["kernel"]
    plain = {**on_q(), "lm_head.weight": head}
    tree = jlora.peft.load(folder(tmp_path / "b", plain), params)
    assert tree["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    other = {**on_q(), "lm_head.weight": (random(D, V).T + 0.01).astype(stored)}
    refused("its values are not those", folder(tmp_path / "c", other), params)


# -- added tokens ----------------------------------------------------------------------


def grown(params, rows=2):
    """The base with room for more tokens."""
    model, _ = llama(tied="lm_head" not in params)
    return models.resize_vocabulary(model, params, V + rows)[1]


def tables(params):
    """The embedding and the head with two rows more, as PyTorch has them."""
    more = random(2, D, seed=8), random(2, D, seed=9)
    embedding = np.asarray(params["model"]["embed_tokens"]["embedding"])
    head = np.asarray(params["lm_head"]["kernel"]).T
    return np.concatenate([embedding, more[0]]), np.concatenate([head, more[1]])


def test_tables_with_added_tokens(tmp_path):
    _, params = llama()
    model, _ = llama(vocab=V + 2)
    embedding, head = tables(params)
    held = {f"{EMBED}.weight": embedding, f"{HEAD}.weight": head}
    place = folder(tmp_path / "a", {**on_q(), **held})
    refused(r"jlora\.models\.resize_vocabulary\(model, params, 22\)", place, params)
    with pytest.warns(jlora.JloraWarning, match=r"lm_head/kernel' \(2 rows\)"):
        tree = jlora.peft.load(place, grown(params))
    want = grown(changed(params))
    want["model"]["embed_tokens"]["embedding"] = jnp.asarray(embedding)
    want["lm_head"]["kernel"] = jnp.asarray(head.T)
    close(logits(model, tree), logits(model, want))
    jlora.peft.save(tmp_path / "again", tree)  # nothing of it is lost
    again = jlora.peft.load(tmp_path / "again", grown(params))
    close(logits(model, again), logits(model, want))
    wrong = jax.tree.map(lambda x: x + 0.1, grown(params))
    refused("its values are not those", place, wrong)


def test_added_tokens_below_an_adapter(tmp_path):
    _, params = llama()
    model, _ = llama(vocab=V + 2)
    embedding, head = tables(params)
    a, b = random(2, D, seed=3), random(V + 2, 2)
    held = {f"{EMBED}.weight": embedding, f"{HEAD}.base_layer.weight": head,
            f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b}  # fmt: skip
    place = folder(
        tmp_path / "a", {**on_q(), **held}, target_modules=["q_proj", "lm_head"]
    )
    refused(r"resize_vocabulary\(model, params, 22\)", place, params)
    with (
        pytest.warns(jlora.JloraWarning, match="base below the adapter"),
        pytest.warns(jlora.JloraWarning, match="fully trained leaves"),
    ):
        tree = jlora.peft.load(place, grown(params))
    want = grown(changed(params))
    want["model"]["embed_tokens"]["embedding"] = jnp.asarray(embedding)
    want["lm_head"]["kernel"] = jnp.asarray(head.T) + 2.0 * (b @ a).T
    close(logits(model, tree), logits(model, want))


def test_added_tokens_that_are_trained(tmp_path):
    _, params = llama()
    _, head = tables(params)
    place = folder(tmp_path / "a", {**on_q(), f"{HEAD}.weight": head},
                   modules_to_save=["lm_head"])  # fmt: skip
    refused(r"resize_vocabulary\(model, params, 22\)", place, params)
    tree = jlora.peft.load(place, grown(params))
    np.testing.assert_array_equal(tree["lm_head"]["kernel"].value, head.T)
    rows = {f"{EMBED}.token_adapter.trainable_tokens_delta": random(1, D)}
    place = folder(tmp_path / "b", {**on_q(), **rows}, trainable_token_indices=[V + 1])
    refused("resize_vocabulary", place, params)
    jlora.peft.load(place, grown(params))


# -- tied heads ------------------------------------------------------------------------


def test_an_adapter_of_a_tied_head(tmp_path):
    """PEFT adapts the head and leaves the embedding as it is."""
    model, params = llama(tied=True)
    a, b = random(2, D, seed=3), random(V, 2)
    held = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    place = folder(
        tmp_path / "a", {**on_q(), **held}, target_modules=["q_proj", "lm_head"]
    )
    refused(r"jlora\.models\.untie\(model, params\)", place, params, model=model)
    apart, params = models.untie(model, params)
    tree = jlora.peft.load(place, params, model=apart)
    want = changed(params, lm_head=2.0 * (b @ a).T)
    close(logits(apart, tree), logits(apart, want))
