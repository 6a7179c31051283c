"""The console's commands that use models: merge, generate, chat."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tools import randomise

import jlora
import jlora.peft
from jlora import checkpoint, cli, data, models

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "assets" / "tiny-t5-de-en"
T5 = GOLDEN / "peft" / "t5_qv"
TEXTS = ["Der Wind ist kalt.", "Die See ist ruhig.", "Das Fass."]


@pytest.fixture
def run(capsys):
    def run(*argv):
        status = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def done(run):
    def done(*argv):
        status, out, err = run(*argv)
        assert (status, err) == (0, "")
        return out

    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A T5 of one layer with a tokenizer, which compiles fast."""
    model, _ = models.load(TINY)
    config = dataclasses.replace(model.config, num_layers=1, num_decoder_layers=1)
    ids = np.ones((1, 1), np.int32)
    model = models.T5(config=config)
    params = jax.jit(model.init)(jax.random.key(0), ids, None, ids)["params"]
    folder = tmp_path_factory.mktemp("base") / "t5"
    models.save(model, params, folder, tokenizer_from=TINY)
    return folder


@pytest.fixture(scope="module")
def a_run(base, tmp_path_factory):
    """What a run leaves that was stopped: an adapter and settings, no merged model."""
    folder = tmp_path_factory.mktemp("runs") / "translate-1"
    _, params = models.load(base)
    tree = jlora.lorafy(params, 2, ["query", "value"], alpha=8)
    checkpoint.save_adapter(folder / "adapter", randomise(tree, jax.random.key(1)))
    settings = {"task": "translate", "model": str(base), "direction": "de-en"}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def adapted(a_run, base):
    model, params = models.load(base)
    return model, checkpoint.load_adapter(a_run / "adapter", params)


# -- merge -----------------------------------------------------------------------------


def test_merging_a_run(done, a_run, base, tmp_path):
    out = done("merge", a_run, tmp_path / "out")
    model, tree = adapted(a_run, base)
    merged_model, merged = models.load(tmp_path / "out")
    assert merged_model.config == model.config
    for x, y in zip(*map(jax.tree.leaves, (merged, jlora.merge(tree))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert "lost to rounding" in out
    assert f"bytes in float32, on {base}" in out
    assert data.load_tokenizer(tmp_path / "out")("kalt")["input_ids"]


def test_merging_pefts_adapter_as_peft_does(done, tmp_path):
    done("merge", T5 / "adapter", tmp_path / "out", "--base", T5 / "base")
    cases = load_file(T5 / "io.safetensors")
    model, params = models.load(tmp_path / "out")
    logits = model.apply(
        {"params": params}, cases["input_ids"], None, cases["decoder_input_ids"]
    )
    np.testing.assert_allclose(logits, cases["merged_logits"], rtol=2e-4, atol=2e-5)


def test_merging_in_another_dtype_says_what_is_lost(done, a_run, base, tmp_path):
    argv = ["merge", a_run / "adapter", tmp_path / "out", "--base", base, "--json"]
    report = json.loads(done(*argv, "--dtype", "bfloat16"))
    assert report["bytes"] * 2 == json.loads(done(*argv, "--overwrite"))["bytes"]
    assert all(0 < kernel["lost"] < 0.2 for kernel in report["kernels"])
    _, tree = adapted(a_run, base)
    done(*argv, "--dtype", "bfloat16", "--overwrite", "--rounding", "stochastic")
    _, merged = models.load(tmp_path / "out")
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    exact = jlora.merge(tree)
    for x, y in zip(*map(jax.tree.leaves, (merged, exact)), strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-6, atol=0.01)


def test_what_cannot_be_merged(run, a_run, base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    embedded = shutil.copytree(a_run, tmp_path / "embedded")
    (embedded / "settings.json").write_text('{"model": null}')
    empty = tmp_path / "early"
    empty.mkdir()
    (empty / "settings.json").write_text("{}")
    for argv, message in [
        ([base, tmp_path / "out"], "a model without an adapter"),
        ([a_run, tmp_path / "full"], "exists already.\nPass another TARGET"),
        ([embedded, tmp_path / "out"], "does not say what model it trained"),
        ([empty, tmp_path / "out"], "has saved no adapter yet"),
        ([T5 / "adapter", tmp_path / "out"], "does not say what it was trained on"),
        ([a_run, tmp_path / "out", "--base", TINY], "saved on another base"),
    ]:
        status, out, err = run("merge", *argv)
        assert (status, out) == (1, "")
        assert message in err
        assert not (tmp_path / "out").exists()


# -- generate --------------------------------------------------------------------------


def test_generating_with_a_runs_adapter_and_prefix(done, a_run, base):
    out = done("generate", a_run, *TEXTS[:2], "--max-new-tokens", 4)
    model, tree = adapted(a_run, base)
    tokenizer = data.load_tokenizer(base)
    prompts = [f"translate German to English: {text}" for text in TEXTS[:2]]
    batch = tokenizer(prompts, return_tensors="np", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens = models.generate(model, jlora.merge(tree), ids, mask, max_new_tokens=4)
    wanted = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert out.splitlines() == wanted
    assert any(wanted)
    bare = done("generate", a_run, *TEXTS[:2], "--prefix", "", "--max-new-tokens", 4)
    assert bare != out


def test_texts_of_a_file_and_of_a_pipe(done, a_run, base, tmp_path, monkeypatch):
    argv = ["generate", base, "--adapter", a_run / "adapter", "--max-new-tokens", 4]
    file = tmp_path / "texts"
    file.write_text("\n".join(TEXTS) + "\n")
    small = done(*argv, "--file", file, "--batch-size", 2, "--json")
    rows = [json.loads(line) for line in small.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    piped = done(*argv)
    assert piped.splitlines() == [row["answers"][0] for row in rows]


def test_beams_and_samples(done, a_run):
    argv = [
        "generate",
        a_run,
        TEXTS[0],
        "--max-new-tokens",
        4,
        "--answers",
        3,
        "--json",
    ]
    (row,) = map(json.loads, done(*argv, "--num-beams", 3).splitlines())
    assert len(set(row["answers"])) == 3
    sampled = ["--sample", "--temperature", 3.0, "--seed"]
    (one,) = map(json.loads, done(*argv, *sampled, 1).splitlines())
    assert one == json.loads(done(*argv, *sampled, 1))
    assert one != json.loads(done(*argv, *sampled, 2))


def test_refusals_of_generate(run, a_run, base, tmp_path):
    bert = GOLDEN / "peft" / "roberta_cls" / "base"
    for argv, status, message in [
        ([a_run, "x", "--top-p", "0.5"], 2, "--top-p: for --sample"),
        ([a_run, "x", "--file", "y"], 2, "TEXT and --file exclude each other"),
        ([a_run, "x", "--temperature", "0"], 2, "'0' is not a number above 0"),
        ([a_run, "x", "--answers", "2"], 1, "greedy search finds one sequence"),
        ([bert, "x"], 1, "tokenizer|generates no text"),
        (
            [T5 / "adapter", "x", "--adapter", T5 / "adapter"],
            1,
            "is an adapter already",
        ),
        ([a_run, "x", "--adapter", T5 / "adapter"], 1, "has an adapter of its own|run"),
        ([base, "x", "--adapter", base], 1, "is a model, no adapter"),
        ([tmp_path / "none", "x"], 1, "does not exist"),
    ]:
        got, out, err = run("generate", *argv)
        assert (got, out) == (status, ""), err
        assert any(part in err for part in message.split("|")), err


# -- chat ------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A small decoder whose tokenizer knows bytes, without a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i + 2 for i, letter in enumerate(letters)} | {"</s>": 0}
    inner = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    config = models.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        eos_token_id=0,
    )  # fmt: skip
    model = models.Llama(config=config)
    ids = np.ones((1, 1), np.int32)
    params = jax.jit(model.init)(jax.random.key(3), ids)["params"]
    params = jax.tree.map(lambda x: 8 * x, params)  # or it says one letter again
    folder = tmp_path_factory.mktemp("decoder")
    models.save(model, params, folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    return folder


@pytest.fixture
def say(run, monkeypatch):
    def say(lines, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        return run("chat", *argv, "--max-new-tokens", 5)

    return say


def continued(folder, text):
    """What the model adds to a text, padded at the other side than the console does."""
    model, params = models.load(folder)
    tokenizer = data.load_tokenizer(folder)
    row = tokenizer(text)["input_ids"]
    ids = np.zeros((1, 128), np.int32)
    ids[0, 128 - len(row) :] = row
    mask = (np.arange(128) >= 128 - len(row)).astype(np.int32)[None]
    tokens = models.generate(model, params, ids, mask, max_new_tokens=5)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_a_chat_has_the_templates_form(say, decoder):
    folder = decoder / "chat"
    status, out, err = say(
        ["Hi", "So?", "/reset", "Hi"], folder, "--system", "Be brief."
    )
    assert status == 0
    assert "by the tokenizer's template" in err
    one = continued(folder, "<system>Be brief.<user>Hi<assistant>").strip()
    history = f"<system>Be brief.<user>Hi<assistant>{one}<user>So?<assistant>"
    two = continued(folder, history).strip()
    assert out == "\n".join([one, two, one]) + "\n"
    assert one != two


def test_without_a_template_the_text_goes_on(say, decoder):
    folder = decoder / "plain"
    status, out, err = say(["Hi", "", "So?", "/exit", "unread"], folder)
    assert status == 0
    assert "no chat template: the model goes on" in err
    one = continued(folder, "Hi")
    assert out == f"{one}\n{continued(folder, f'Hi{one}' + chr(10) + 'So?')}\n"
    status, _, err = say(["Hi"], folder, "--system", "Be brief.")
    assert status == 1
    assert "has no chat template" in err


def test_a_model_with_an_encoder_reads_lines(say, a_run, done):
    status, out, err = say(TEXTS[:2], a_run)
    assert status == 0
    assert "each line stands alone, begun with 'translate German to English: '" in err
    wanted = done(
        "generate", a_run, *TEXTS[:2], "--max-new-tokens", 5, "--batch-size", 1
    )
    assert out == wanted
