"""One architecture by many names: model types, shared tensors, keys nothing reads."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora import JloraWarning, models
from jlora._errors import CheckpointError
from jlora.models import BertConfig, T5Config

GOLDEN = Path(__file__).parent / "golden"
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 10]])


def copied(form, folder, said=None, tensors=None):
    """A golden checkpoint with other words in its files.

    Args:
      form: which.
      folder: where to.
      said: keys of `config.json`, `None` of those to remove.
      tensors: a function of the tensors by name.
    """
    folder = Path(shutil.copytree(GOLDEN / form, folder))
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **(said or {})}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if tensors is not None:
        held = tensors(load_file(folder / "model.safetensors"))
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def outputs(model, params, ids=IDS):
    args = (ids, None, ids) if isinstance(model, models.T5) else (ids,)
    return np.asarray(jax.jit(model.apply)({"params": params}, *args))


def same_outputs(folder, other, **how):
    got, want = outputs(*models.load(folder, **how)), outputs(*models.load(other))
    np.testing.assert_array_equal(got, want)


# --- model types


def test_an_mt5_is_a_t5_whose_head_is_told_by_the_tensors(tmp_path):
    said = {"model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
    said |= {"scale_decoder_outputs": None, "tie_word_embeddings": True}
    folder = copied("t5/v11", tmp_path / "mt5", said)
    same_outputs(folder, GOLDEN / "t5" / "v11")
    model, params = models.load(folder)
    assert not model.config.tie_word_embeddings
    models.save(model, params, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["model_type"] == "mt5"
    assert written["architectures"] == ["MT5ForConditionalGeneration"]
    again, _ = models.load(tmp_path / "again")
    assert again.config == model.config


def test_a_tied_mt5_scales_nothing(tmp_path):
    said = {"model_type": "mt5", "scale_decoder_outputs": None}
    folder = copied("t5/v10", tmp_path / "mt5", {**said, "tie_word_embeddings": False})
    model, params = models.load(folder)
    assert model.config.tie_word_embeddings
    plain = models.T5(config=T5Config.from_dict({**model.config.to_dict()}))
    assert not plain.config.scale_decoder_outputs
    t5, same = models.load(GOLDEN / "t5" / "v10")
    scale = t5.config.d_model**-0.5
    np.testing.assert_allclose(
        outputs(model, params) * scale, outputs(t5, same), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(CheckpointError, match="mT5 scales nothing"):
        T5Config(model_type="mt5", scale_decoder_outputs=True)


def test_defaults_of_an_mt5():
    config = T5Config.from_dict({"model_type": "mt5", "num_layers": 3})
    assert (config.vocab_size, config.d_ff, config.num_heads) == (250112, 1024, 6)
    assert (config.num_layers, config.gated) == (3, True)


@pytest.mark.parametrize(
    ("kind", "prefix", "classes"),
    [
        ("xlm-roberta", "roberta", "XLMRoberta"),
        ("camembert", "roberta", "Camembert"),
        ("data2vec-text", "data2vec_text", "Data2VecText"),
    ],
)
def test_robertas_by_other_names(tmp_path, kind, prefix, classes):
    (source,) = [
        folder
        for folder in (GOLDEN / "encoders").iterdir()
        if folder.is_dir()
        and json.loads((folder / "config.json").read_text())["architectures"]
        == ["RobertaForMaskedLM"]
    ][:1]
    said = {"model_type": kind, "architectures": [f"{classes}ForMaskedLM"]}
    rename = lambda held: {
        name.replace("roberta.", f"{prefix}.", 1): x for name, x in held.items()
    }
    form = f"encoders/{source.name}"
    folder = copied(form, tmp_path / "other", said, rename)
    same_outputs(folder, source)
    model, params = models.load(folder)
    models.save(model, params, tmp_path / "again")
    held = load_file(tmp_path / "again" / "model.safetensors")
    assert held.keys() == load_file(folder / "model.safetensors").keys() - {
        "lm_head.decoder.weight",
        "lm_head.decoder.bias",
    }
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["architectures"] == [f"{classes}ForMaskedLM"]
    with pytest.warns(JloraWarning, match="newly initialised"):
        model, _ = models.load(folder, head="classification", num_labels=3)
    assert model.config.model_type == kind


def test_a_ministral_may_mix_its_layers(tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    said = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
    folder = copied("decoders/mistral", tmp_path / "all", said)
    same_outputs(folder, GOLDEN / "decoders" / "mistral")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    types = [kinds[i % 2] for i in range(layers)]
    folder = copied(
        "decoders/mistral", tmp_path / "mixed", {**said, "layer_types": types}
    )
    assert models.load(folder)[0].config.layer_types == tuple(types)


# --- shared tensors


def only(name, *others):
    """Keep a shared tensor by one of its names alone."""

    def change(held):
        value = next(held[n] for n in (name, *others) if n in held)
        kept = {n: x for n, x in held.items() if n not in others}
        return {**kept, name: value}

    return change


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("t5/v10", "encoder.embed_tokens.weight"),
        ("t5/v10", "decoder.embed_tokens.weight"),
        ("t5/v10", "lm_head.weight"),
        ("t5/v11", "decoder.embed_tokens.weight"),
    ],
)
def test_any_name_of_t5s_table_is_enough(tmp_path, form, name):
    stacks = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    names = {
        "shared.weight",
        *stacks,
        *(["lm_head.weight"] if form == "t5/v10" else []),
    }
    folder = copied(form, tmp_path / "t5", None, only(name, *sorted(names - {name})))
    same_outputs(folder, GOLDEN / form)


@pytest.mark.parametrize(
    ("form", "table"),
    [
        ("gpt2", "transformer.wte.weight"),
        ("gemma2", "model.embed_tokens.weight"),
    ],
)
def test_a_tied_heads_name_is_enough(tmp_path, form, table):
    form = f"decoders/{form}"
    folder = copied(form, tmp_path / "it", None, only("lm_head.weight", table))
    same_outputs(folder, GOLDEN / form)


def test_names_of_one_tensor_that_disagree_are_refused(tmp_path):
    def change(held):
        table = held.pop("shared.weight")
        stack = {"encoder.embed_tokens.weight": table}
        return {**held, **stack, "decoder.embed_tokens.weight": table + 1}

    folder = copied("t5/v10", tmp_path / "t5", None, change)
    with pytest.raises(CheckpointError, match=r"must equal shared\.weight"):
        models.load(folder)


def test_a_head_of_its_own_is_no_embedding(tmp_path):
    change = only("lm_head.weight", "shared.weight")
    folder = copied("t5/v11", tmp_path / "t5", None, change)
    with pytest.raises(CheckpointError, match=r"missing:\n  shared\.weight"):
        models.load(folder)


# --- keys that nothing reads


@pytest.mark.parametrize("form", ["t5/v11", "decoders/llama", "encoders/bert"])
def test_keys_that_nothing_reads_are_passed_over_with_one_warning(tmp_path, form):
    folder = GOLDEN / form
    if not folder.exists():
        form = f"encoders/{min(p.name for p in folder.parent.iterdir() if p.is_dir())}"
    said = {"unsloth_fixed": True, "is_llama_config": True, "license": "mit"}
    quiet = {"transformers.js_config": {"dtype": "q4"}, "loss_type": "ForCausalLM"}
    quiet |= {
        "model_max_length": 512,
        "use_flash_attn": True,
        "rope_interleaved": False,
    }
    folder = copied(form, tmp_path / "model", {**said, **quiet})
    with pytest.warns(JloraWarning) as caught:
        model, params = models.load(folder)
    (warning,) = caught
    assert all(key in str(warning.message) for key in said)
    assert not any(key in str(warning.message) for key in quiet)
    models.save(model, params, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {**written, **said, **quiet} == written  # they are kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(GOLDEN / form)


@pytest.mark.parametrize(
    "said",
    [
        {"rope_interleaved": True},
        {"logits_scaling": 8.0},
        {"embedding_multiplier": 12},
        {"no_rope_layers": [1, 0]},
        {"use_qk_norm": True},
        {"clip_qkv": 8},
        {"partial_rotary_factor": 0.5},
        {"quantization_config": {"bits": 4}},
        {"attn_logit_softcapping": 30.0},
        {"use_mup": True},
        {"num_experts": 4},
    ],
    ids=str,
)
def test_keys_that_change_numbers_are_refused(said):
    (key,) = said
    for form, config in (("decoders/llama", models.LlamaConfig), ("t5/v11", T5Config)):
        raw = json.loads((GOLDEN / form / "config.json").read_text())
        with pytest.raises(CheckpointError, match=key):
            config.from_dict({**raw, **said})
    raw = {"model_type": "bert", "architectures": ["BertModel"]}
    with pytest.raises(CheckpointError, match=key):
        BertConfig.from_dict({**raw, **said})


# --- live


@pytest.mark.oracle
@pytest.mark.parametrize(
    "kind",
    ["mt5", "mt5 tied", "xlm-roberta", "camembert", "data2vec-text", "ministral"],
)
def test_outputs_are_pytorchs_live(kind, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    kind, *tied = kind.split()
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "mt5":
        sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 6, "d_ff": 20}
        sizes |= {"num_layers": 2, "num_heads": 3}
    elif kind == "ministral":
        sizes |= {"num_key_value_heads": 1, "head_dim": 6, "sliding_window": 3}
        sizes |= {"layer_types": ["full_attention", "sliding_attention"]}
    else:
        sizes |= {"max_position_embeddings": 20, "type_vocab_size": 1}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    make = {
        "mt5": transformers.AutoModelForSeq2SeqLM,
        "ministral": transformers.AutoModelForCausalLM,
    }.get(kind, transformers.AutoModelForMaskedLM)
    theirs = make.from_config(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.2 * torch.randn_like(value))
        if kind == "mt5" and not tied:
            theirs.lm_head.weight = torch.nn.Parameter(torch.randn(31, 16) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[3, 4, 5, 6, 8, 2], [7, 8, 9, 10, 2, 1]])
    mask = (ids != 1).long()
    more = {"decoder_input_ids": ids} if kind == "mt5" else {}
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask, **more).logits.numpy()
    model, params = models.load(tmp_path / "theirs")
    args = (ids.numpy(), mask.numpy(), *(x.numpy() for x in more.values()))
    got = np.asarray(model.apply({"params": params}, *args))
    kept = mask.numpy()[..., None] if kind != "mt5" else 1
    np.testing.assert_allclose(got * kept, want * kept, atol=3e-5 * np.abs(want).max())
    # What is written here is read there, and computes the same.
    models.save(model, params, tmp_path / "ours")
    again = make.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        back = again(input_ids=ids, attention_mask=mask, **more).logits.numpy()
    np.testing.assert_allclose(back, want, atol=1e-6)
