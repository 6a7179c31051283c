"""Configurations and files of GPT-2 and the Llama family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models_decoders import FORMS, GOLDEN, golden

from jlora import JloraWarning, LoraError, models
from jlora._errors import CheckpointError, ShapeError
from jlora.models import GemmaConfig, LlamaConfig, MoeConfig
from jlora.models._hf.families import family_of
from jlora.models._parts.rope import Rope

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {  # as on the hub, less the names of architecture and version
    "gpt2": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    },
    "Llama 3.1 8B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Mistral 7B": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen3 0.6B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Gemma 7B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 24576,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "Gemma 2 27B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "initializer_range": 0.02,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "vocab_size": 256000,
    },
    "Gemma 3 1B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "Mixtral 8x7B": {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen1.5 MoE A2.7B": {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3 30B A3B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def config_of(raw):
    return family_of(raw.get("model_type", "gpt2"), "a test").config.from_dict(raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_and_written_back(name):
    raw = PUBLISHED[name]
    config = config_of(raw)
    written = json.loads(json.dumps(config.to_dict()))
    # What is null may be left out.
    assert {k: written.get(k) for k in raw} == raw
    assert config_of(written) == config
    hash(config)


def test_what_a_file_does_not_say_is_the_familys():
    mistral = LlamaConfig.from_dict({"model_type": "mistral"})
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    assert LlamaConfig.from_dict({"model_type": "qwen3"}).head_dim == 128
    llama = LlamaConfig.from_dict({"model_type": "llama", "head_dim": None})
    assert (llama.num_key_value_heads, llama.head_dim) == (32, 128)
    assert llama.layer_types == ("full_attention",) * 32
    mixtral = MoeConfig.from_dict({"model_type": "mixtral"})
    assert (mixtral.num_experts, mixtral.rope.theta) == (8, 1e6)
    qwen = MoeConfig.from_dict({"model_type": "qwen2_moe"})
    assert (qwen.num_experts, qwen.shared_expert_intermediate_size) == (60, 5632)


def test_layers_and_positions_of_gemma():
    two, three = (
        GemmaConfig.from_dict({"model_type": kind, "num_hidden_layers": 7})
        for kind in ("gemma2", "gemma3_text")
    )
    full = [i for i, kind in enumerate(two.layer_types) if kind == "full_attention"]
    assert full == [1, 3, 5]
    assert three.layer_types.index("full_attention") == 5
    assert three.layer_types.count("sliding_attention") == 6
    assert set(two.ropes.values()) == {Rope(1e4)}
    both = {"full_attention": Rope(1e6), "sliding_attention": Rope(1e4)}
    assert three.ropes == both
    assert (two.score_cap, two.logit_cap, two.score_scale) == (50, 30, 1 / 16)
    own = GemmaConfig(num_hidden_layers=4, sliding_window=8, head_dim=16)
    assert own.layer_types == ("sliding_attention", "full_attention") * 2
    assert own.score_scale == 1 / 4


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {
            "full_attention":
                {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }},
    ],
)  # fmt: skip
def test_old_and_new_positions_of_gemma_3_say_the_same(said):
    config = GemmaConfig.from_dict({"model_type": "gemma3_text", **said})
    assert config.rope == Rope(5e5, "linear", 8.0)
    assert config.local_rope == Rope(2e4)
    written = json.loads(json.dumps(config.to_dict()))
    assert {k: written[k] for k in said} == said
    assert GemmaConfig.from_dict(written) == config


def test_the_first_gemmas_activation_is_the_one_it_was_trained_with():
    raw = {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None}
    assert GemmaConfig.from_dict(raw).hidden_act == "gelu_pytorch_tanh"
    later = GemmaConfig.from_dict({**raw, "model_type": "gemma2"})
    assert later.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("said", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"mlp_only_layers": [1, 4]}, [0, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1]),
    ],
)
def test_layers_that_have_experts(said, sparse):
    config = MoeConfig.from_dict(
        {"model_type": "qwen3_moe", "num_hidden_layers": 5, **said}
    )
    assert [i for i in range(5) if config.is_sparse(i)] == sparse


def test_experts_are_counted_under_either_name():
    raw = {"model_type": "qwen3_moe", "num_experts_per_tok": 2}
    both = [
        MoeConfig.from_dict({**raw, name: 6})
        for name in ("num_experts", "num_local_experts")
    ]
    assert both[0] == both[1]
    written = both[0].to_dict()
    assert (written["num_experts"], written["num_local_experts"]) == (6, 6)


@pytest.mark.parametrize(
    ("said", "sliding"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, 0),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, 1),
        ({"use_sliding_window": True, "sliding_window": 8}, 0),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            2,
        ),
    ],
)
def test_layers_of_qwen_that_slide(said, sliding):
    config = LlamaConfig.from_dict(
        {"model_type": "qwen2", "num_hidden_layers": 4, **said}
    )
    assert config.layer_types.count("sliding_attention") == sliding
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_old_and_new_keys_of_scaling_say_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    both = [Rope.from_dict("llama", raw) for raw in (old, new, {**old, **new})]
    assert len(set(both)) == 1
    assert both[0].to_dict() == {**old, **new}
    assert Rope.from_dict("llama", older) == Rope(5e5, "linear", 2.0)
    assert Rope.from_dict("llama", {}) == Rope()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "mish"),
        ({"model_type": "gpt2", "n_head": 7}, "multiple of n_head"),
        ({"model_type": "gpt2", "n_layer": 0}, "n_layer"),
        ({"model_type": "gpt2", "quantization_config": {"bits": 8}}, "quantization"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window"),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, "softcapping"),
        ({"model_type": "llama", "rope": {"theta": 2}}, "rope"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "gemma2", "hidden_act": "gelu",
          "hidden_activation": "silu"}, "mean the same"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True},
         "use_bidirectional"),
        ({"model_type": "gemma2", "num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
         "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}},
         "where 'full_attention'"),
        ({"model_type": "gemma", "sliding_window": 8}, "sliding_window"),
        ({"model_type": "gemma2", "sliding_window_pattern": 6}, "pattern"),
        ({"model_type": "llama", "rope_local_base_freq": 1e4}, "rope_local"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "8 experts"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_experts"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter"),
        ({"model_type": "mixtral", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"model_type": "mixtral", "num_experts": 4, "num_local_experts": 8},
         "mean the same"),
        ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 0}, "decoder_sparse"),
        ({"model_type": "qwen3_moe", "shared_expert_intermediate_size": 8},
         "shared_expert"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 32},
            "layer_types",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None,
             "max_window_layers": 2},
            "sliding_window",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "32 layers"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "'dynamic'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}}, "factor"),
        (
            {"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        (
            {"model_type": "llama", "rope_theta": 1e6,
             "rope_parameters": {"rope_theta": 1e4}},
            "another thing",
        ),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_honoured_are_refused(wrong, words):
    with pytest.raises(LoraError, match=words) as caught:
        config_of(wrong)
    assert isinstance(caught.value, (CheckpointError, ShapeError))


@pytest.mark.parametrize("form", FORMS)
def test_load_save_load_save_is_stable(form, tmp_path):
    model, params, _ = golden(form)
    models.save(model, params, tmp_path / "a")
    again, same = models.load(tmp_path / "a")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)
    models.save(again, same, tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        a, b = ((tmp_path / x / file).read_bytes() for x in "ab")
        assert a == b
    theirs = load_file(GOLDEN / form / "model.safetensors")
    ours = load_file(tmp_path / "a" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_end_tokens_of_generations_own_file(tmp_path):
    """Chat models say in generation_config.json alone which tokens end a turn."""
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))
    ids = np.array([[5, 7, 11]])
    model, params = models.load(folder)
    (free,) = models.generate(model, params, ids, max_new_tokens=6, eos_token_id=())
    end = int(free[2])
    first = int(np.argmax(np.asarray(free) == end))
    said = {"eos_token_id": [end, 36], "pad_token_id": 3, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    model, params = models.load(folder)
    with pytest.warns(JloraWarning, match="needs a key"):
        (got,) = models.generate(model, params, ids, max_new_tokens=6)
    assert got.tolist() == [*free[: first + 1].tolist(), *[3] * (5 - first)]
    how = {"max_new_tokens": 6, "eos_token_id": (), "do_sample": False}
    (other,) = models.generate(model, params, ids, **how)
    assert other.tolist() == free.tolist()  # what the call says goes first
    models.save(model, params, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == said
    own, theirs = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", folder)
    )
    assert own["eos_token_id"] == theirs["eos_token_id"]
    assert "generation" not in own


def rewritten(form, folder, change):
    """A copy of a golden checkpoint with other tensors."""
    shutil.copytree(GOLDEN / form, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def without(prefix):
    return lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("form", "prefix"), [("gpt2", "transformer."), ("qwen2", "model.")]
)
def test_files_of_the_model_without_head_lack_the_prefix(form, prefix, tmp_path):
    _, params = models.load(rewritten(form, tmp_path / "a", without(prefix)))
    jax.tree.map(np.testing.assert_array_equal, params, golden(form)[1])


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_buffers_that_old_files_hold_are_passed_over(prefix, tmp_path):
    def old(tensors):
        mask = np.tril(np.ones((1, 1, 4, 4), np.uint8))
        held = {f"{prefix}h.{i}.attn.bias": mask for i in range(2)}
        held |= {f"{prefix}h.0.attn.masked_bias": np.float32([-1e4])}
        held |= {"lm_head.weight": tensors["transformer.wte.weight"]}
        if not prefix:
            tensors = without("transformer.")(tensors)
        return {**tensors, **held}

    _, params = models.load(rewritten("gpt2", tmp_path / "a", old))
    jax.tree.map(np.testing.assert_array_equal, params, golden("gpt2")[1])


def fused(tensors, config):
    """The tensors of all experts, as PyTorch's modules hold them, of single ones."""
    mixtral = config.model_type == "mixtral"
    first, last = (
        (("w1", "w3"), ("w2",))
        if mixtral
        else (("gate_proj", "up_proj"), ("down_proj",))
    )
    block = "block_sparse_moe" if mixtral else "mlp"
    whole = {k: v for k, v in tensors.items() if ".experts." not in k}
    whole = {k.replace(f".{block}.", ".mlp."): v for k, v in whole.items()}
    for layer in range(config.num_hidden_layers):
        for name, parts in (("gate_up_proj", first), ("down_proj", last)):
            start = f"model.layers.{layer}.{block}.experts"
            if config.is_sparse(layer):
                stacks = [
                    np.stack(
                        [
                            tensors[f"{start}.{e}.{part}.weight"]
                            for e in range(config.num_experts)
                        ]
                    )
                    for part in parts
                ]
                whole[f"model.layers.{layer}.mlp.experts.{name}"] = np.concatenate(
                    stacks, axis=1
                )
    return whole


@pytest.mark.parametrize("form", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_load_from_single_tensors_and_from_one(form, tmp_path):
    model, params, _ = golden(form)
    change = lambda tensors: fused(tensors, model.config)
    folder = rewritten(form, tmp_path / "a", change)
    held = load_file(folder / "model.safetensors")
    assert len(held) < len(load_file(GOLDEN / form / "model.safetensors")) - 8
    again, same = models.load(folder)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["mixtral", "qwen3_moe"])
def test_pytorch_reads_the_experts_alike_live(form, tmp_path):
    """The test's own fused tensors are what PyTorch's modules hold."""
    pytest.importorskip("torch")
    import transformers

    model, _, _ = golden(form)
    change = lambda tensors: fused(tensors, model.config)
    folder = rewritten(form, tmp_path / "a", change)
    load = transformers.AutoModelForCausalLM.from_pretrained
    state = load(GOLDEN / form).state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_an_expert_that_is_missing_is_named(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    drop = lambda tensors: {k: v for k, v in tensors.items() if k != name}
    with pytest.raises(CheckpointError, match=name):
        models.load(rewritten("mixtral", tmp_path / "a", drop))


def test_frequencies_of_old_llamas_are_passed_over(tmp_path):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    add = lambda tensors: {**tensors, name: np.ones(4, np.float32)}
    models.load(rewritten("llama", tmp_path / "a", add))


def test_a_head_that_is_another_than_the_tied_one_is_refused(tmp_path):
    head = lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"must equal transformer\.wte"):
        models.load(rewritten("gpt2", tmp_path / "a", head))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "said",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {"rope_theta": 5e5, **LLAMA3},
        {"rope_theta": 5e5, **LLAMA3, "factor": 32.0, "low_freq_factor": 2.0},
    ],
)
def test_frequencies_are_pytorchs_live(said):
    pytest.importorskip("torch")
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = TheirConfig(hidden_size=512, num_attention_heads=4, rope_parameters=said)
    want = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    got = Rope.from_dict("llama", {"rope_parameters": said}).frequencies(128)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
