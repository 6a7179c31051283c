"""The console's commands that use models: merge, generate, chat."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
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
from jlora import checkpoint, data, models
from jlora.cli import _sources

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "assets" / "tiny-t5-de-en"
T5 = GOLDEN / "peft" / "t5_qv"
TEXTS = ["Der Wind ist kalt.", "Die See ist ruhig.", "Das Fass."]


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
    done(*argv, "--dtype", "bfloat16", "--overwrite")  # float32 sums, rounded once
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "out")[1], want)
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


def test_texts_become_messages_when_asked(done, run, decoder, tmp_path):
    folder, few = decoder / "chat", ["--max-new-tokens", 5]
    one, two = (continued(folder, f"<user>{x}<assistant>") for x in ("Hi", "So?"))
    assert one != two
    assert done("generate", folder, "Hi", "So?", "--chat", *few) == f"{one}\n{two}\n"
    told = continued(folder, "<system>Be brief.<user>Hi<assistant>")
    assert done("generate", folder, "Hi", "--system", "Be brief.", *few) == f"{told}\n"
    bare = continued(folder, "Hi")
    assert done("generate", folder, "Hi", *few) == f"{bare}\n"
    # A run on conversations answers messages, unless it is told otherwise.
    a_chat = tmp_path / "chat-1"
    shutil.copytree(folder, a_chat / "merged")
    (a_chat / "settings.json").write_text('{"task": "chat"}')
    assert done("generate", a_chat, "Hi", *few) == f"{one}\n"
    assert done("generate", a_chat, "Hi", "--raw", *few) == f"{bare}\n"
    for argv, status, message in [
        ([folder, "Hi", "--raw", "--chat"], 2, "--raw puts texts into no template"),
        ([decoder / "plain", "Hi", "--chat"], 1, "no chat template"),
    ]:
        got, out, err = run("generate", *argv)
        assert (got, out) == (status, "")
        assert message in err


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


# -- quantize --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_folder_loads_code_by_code(form, done, base, tmp_path):
    argv = ["quantize", base, tmp_path / "q", "--form", form, "--json"]
    report = json.loads(done(*argv))
    _, dense = models.load(base)
    quantize = jlora.quantizer(form, exclude=["lm_head"])
    _, wanted = models.load(base, quantize=quantize)
    _, found = models.load(tmp_path / "q", quantize=jlora.quantizer())
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(x, y)
    before = sum(x.nbytes for x in jax.tree.leaves(dense))
    assert report["bytes_before"] == before
    assert report["bytes_after"] == sum(
        x.nbytes for x in load_file(tmp_path / "q" / "model.safetensors").values()
    )
    assert report["left"] == {}
    paths = {row["kernel"] for row in report["kernels"]}
    assert "lm_head/kernel" not in paths
    path = "encoder/block/0/layer/0/SelfAttention/q/kernel"
    kernel, got = dense, jlora.dequantize(found)
    for part in path.split("/"):
        kernel, got = kernel[part], got[part]
    (row,) = [row for row in report["kernels"] if row["kernel"] == path]
    error = np.asarray(got) - np.asarray(kernel)
    lost = np.linalg.norm(error) / np.linalg.norm(kernel)
    np.testing.assert_allclose(row["relative_error"], lost, rtol=1e-4)
    np.testing.assert_allclose(row["max_error"], np.abs(error).max(), rtol=1e-4)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    said = config["quantization_config"]
    assert said["llm_int8_skip_modules"] == ["lm_head"]
    assert said.get("bnb_4bit_quant_type", "int8") == form


def test_a_quantised_model_is_taken_as_it_is(done, run, base, tmp_path):
    quantised = tmp_path / "q"
    out = done("quantize", base, quantised)
    assert "times fewer" in out
    _, params = _sources.load(_sources.find(str(quantised)))  # as other commands do
    kernel = params["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]["q"]
    assert isinstance(kernel["kernel"], jlora.Quantized)
    status, _, err = run("quantize", quantised, tmp_path / "again")
    assert status == 1
    assert "quantised already" in err
    status, _, err = run("quantize", base, quantised)
    assert (status, "exists already" in err) == (1, True)
    status, _, err = run("quantize", base, tmp_path / "again", "--block", 48)
    assert status == 1
    assert not (tmp_path / "again").exists()


# -- evaluate --------------------------------------------------------------------------


def test_the_loss_and_the_scores_of_pairs(done, a_run, base, tmp_path):
    pairs = [("Der Wind ist kalt.", "The wind is cold."), ("Das Fass.", "The barrel.")]
    for side, code in enumerate(("de", "en")):
        lines = [pair[side] + "\n" for pair in pairs]
        (tmp_path / f"test.{code}").write_text("".join(lines))
    files = [tmp_path / "test.de", tmp_path / "test.en"]
    report = json.loads(done("evaluate", a_run, "--data", *files, "--json"))
    found = report["tests"]["test.de test.en"]

    model, tree = adapted(a_run, base)
    tokenizer = data.load_tokenizer(base)
    merged, apply = jlora.merge(tree), jax.jit(model.apply)
    total = count = 0
    for source, target in pairs:
        prompt = f"translate German to English: {source}"
        ids, labels = (
            np.asarray([tokenizer(text)["input_ids"]]) for text in (prompt, target)
        )
        shifted = models.shift_right(labels, model.config)
        logits = apply({"params": merged}, ids, None, shifted)
        log_p = jax.nn.log_softmax(logits)
        total -= np.take_along_axis(np.asarray(log_p), labels[..., None], -1).sum()
        count += labels.size
    assert (found["texts"], found["tokens"]) == (2, count)
    np.testing.assert_allclose(found["loss"], total / count, rtol=1e-4)
    np.testing.assert_allclose(found["perplexity"], np.exp(total / count), rtol=1e-3)

    from jlora import metrics

    longest = max(len(tokenizer(p[1])["input_ids"]) for p in pairs)
    room = ["--max-new-tokens", longest + longest // 4 + 1, "--num-beams", 1]
    said = done("generate", a_run, *[p[0] for p in pairs], *room)
    said = [" ".join(line.split()) for line in said.splitlines()]
    assert found["chrF"] == pytest.approx(metrics.chrf(said, [p[1] for p in pairs]))
    bare = json.loads(
        done("evaluate", a_run, "--data", *files, "--json", "--loss-only")
    )
    assert "BLEU" not in bare["tests"]["test.de test.en"]


def test_the_perplexity_of_texts(done, run, decoder, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("Once upon\na time there\n")
    argv = ["evaluate", decoder / "plain", "--data", file]
    (found,) = json.loads(done(*argv, "--json"))["tests"].values()
    model, params = models.load(decoder / "plain")
    tokenizer = data.load_tokenizer(decoder / "plain")
    apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    losses = []
    for line in file.read_text().splitlines():
        ids = np.asarray([tokenizer(line)["input_ids"]])
        log_p = jax.nn.log_softmax(apply(params, ids))[:, :-1]
        losses += [-np.take_along_axis(np.asarray(log_p), ids[:, 1:, None], -1).ravel()]
    losses = np.concatenate(losses)
    assert (found["texts"], found["tokens"]) == (2, losses.size)
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-4)
    assert re.search(r"book.txt +2 +19 ", done(*argv))


def test_what_cannot_be_judged(run, a_run, decoder, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "x.txt").write_text("a\n")
    for argv, status, message in [
        ([decoder / "plain"], 2, "pass --data FILE"),
        ([decoder / "plain", "--data", tmp_path / "empty"], 1, "holds no text"),
        ([decoder / "plain", "--data", tmp_path / "x.txt"], 1, "no token to predict"),
        ([decoder / "plain", "--data", tmp_path / "none"], 1, "none"),
        ([a_run, "--data", tmp_path / "x.txt"], 1, "x.txt"),
    ]:
        got, out, err = run("evaluate", *argv)
        assert (got, out) == (status, ""), err
        assert message in err


# -- completion ------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_choices(done, tmp_path):
    script = tmp_path / "jlora.bash"
    script.write_text(done("completion", "bash"))
    ask = """
    source "$1"; shift
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
    _jlora; echo "${COMPREPLY[@]}"
    """

    def completed(*words):
        argv = ["bash", "-c", ask, "bash", script, "jlora", *words]
        return subprocess.run(argv, capture_output=True, text=True).stdout.split()

    assert completed("in") == ["inspect"]
    assert {"train", "merge", "generate", "chat"} <= {*completed("")}
    assert {"--base", "--dtype"} <= {*completed("merge", "--")}
    assert completed("merge", "--dtype", "") == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_scripts_too(shell, done, run):
    text = done("completion", shell)
    assert all(word in text for word in ("inspect", "dtype", "bfloat16"))
    assert run("completion", "csh")[0] == 2
