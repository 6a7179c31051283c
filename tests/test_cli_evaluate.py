"""`jlora evaluate` of classifiers, of regressions, and of whole tasks."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small_models
import tiny_bert
from tools import randomise

import jlora
from jlora import checkpoint, data, metrics, models, tasks

WORDS = ["the", "film", "book", "was", "good", "bad", "dull", "fine", "not"]
ASSETS = Path(__file__).parents[1] / "examples" / "assets"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert.make(tmp_path_factory.mktemp("bert"), WORDS)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)]


def table(file, labels, seed=0):
    lines = [f"{x}\t{y}" for x, y in zip(rows(len(labels), seed), labels, strict=True)]
    file.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return file


def a_run(folder, kind, settings):
    """What a run of a task leaves, with a random adapter; its model and its tree."""
    loaded = settings.load(settings.model)
    tree = randomise(settings.adapt(loaded.params, settings.key), jax.random.key(1))
    checkpoint.save_adapter(folder / "adapter", tree)
    (folder / "settings.json").write_text(json.dumps(settings.kept(kind)))
    merged = jlora.merge(tree)
    models.save(loaded.model, merged, folder / "merged")
    loaded.tokenizer.save_pretrained(folder / "merged")
    return loaded, merged


def logits_of(loaded, merged, texts):
    """By the model itself, in one batch."""
    batch = dict(loaded.tokenizer(texts, padding=True, return_tensors="np"))
    apply = jax.jit(
        lambda params, batch: loaded.model.apply({"params": params}, **batch)
    )
    return np.asarray(apply(merged, batch))


def judged(done, *argv):
    return json.loads(done("evaluate", *argv, "--json"))["tests"]


def test_the_metrics_of_labelled_texts(done, run, bert, tmp_path):
    names = ["dull", "fine", "odd"]
    test = table(tmp_path / "test.tsv", [names[i % 3] for i in range(7)])
    train = table(tmp_path / "train.tsv", names * 5, seed=1)
    settings = tasks.ClassificationSettings(
        model=str(bert),
        train=[str(train)],
        valid=[str(train)],
        test=[str(test)],
        rank=2,
    )
    place = tmp_path / "run"
    loaded, merged = a_run(place, "classify", settings)
    said = logits_of(loaded, merged, rows(7)).argmax(-1)
    true = np.arange(7) % 3
    assert 0 < metrics.accuracy(said, true) < 1
    want = {
        "examples": 7,
        "accuracy": metrics.accuracy(said, true),
        "macro_f1": metrics.f1(said, true, average="macro"),
    }
    assert judged(done, place) == {"test": want}
    # Its adapter on the base says so too, and its merged model, which knows the names.
    assert judged(done, place, "--base", bert) == {"test": want}
    argv = [place / "merged", "--data", test]
    assert judged(done, *argv) == {"test.tsv": want}
    (found,) = judged(done, *argv, "--metrics", "matthews", "--limit", 4).values()
    assert found == {"examples": 4, "matthews": metrics.matthews(said[:4], true[:4])}
    assert "test.tsv         7" in done("evaluate", *argv)
    for more, status, message in [
        (["--classes", *names, "even"], 2, "tells 3 classes apart, and 4 are named"),
        (["--label", "mark"], 1, "has the columns sentence, label, not 'mark'"),
        (["--classes", "a", "b", "c"], 1, "'dull' is none of the classes a, b, c"),
    ]:
        got, out, err = run("evaluate", *argv, *more)
        assert (got, out) == (status, "")
        assert message in err
    status, _, err = run("evaluate", place / "merged")
    assert (status, "pass --data FILE" in err) == (2, True)
    status, _, err = run("evaluate", bert, "--data", test)
    assert (status, "sorts no texts into classes" in err) == (1, True)


def test_the_correlations_of_numbers(done, bert, tmp_path):
    numbers = np.random.default_rng(2).uniform(0, 5, 9).round(2)
    test = table(tmp_path / "test.tsv", numbers)
    train = table(tmp_path / "train.tsv", numbers, seed=1)
    settings = tasks.ClassificationSettings(
        model=str(bert),
        train=[str(train)],
        valid=[str(train)],
        test=[str(test)],
        regression=True,
    )
    loaded, merged = a_run(tmp_path / "run", "classify", settings)
    said = logits_of(loaded, merged, rows(9))[:, 0]
    want = {
        "pearson": metrics.pearson(said, numbers),
        "spearman": metrics.spearman(said, numbers),
    }
    for argv in ([], ["--data", test]):
        (found,) = judged(done, tmp_path / "run", *argv).values()
        assert found.pop("examples") == 9
        assert found == pytest.approx(want, abs=1e-5)
    (found,) = judged(done, tmp_path / "run/merged", "--data", test).values()
    assert found["pearson"] == pytest.approx(want["pearson"], abs=1e-5)


def test_a_run_of_glue_says_which(bert):
    """Its settings name both the kind of task and the task of GLUE."""
    settings = tasks.ClassificationSettings(model=str(bert), glue="sst2")
    kept = settings.kept("classify")
    assert (kept["task"], kept["glue"]) == ("classify", "sst2")
    assert settings.load(bert).model.config.extra["id2label"] == {
        "0": "negative",
        "1": "positive",
    }


def test_a_run_of_conversations_is_judged_as_it_trained(run, tmp_path):
    chat = ASSETS / "tiny-chat"
    config = models.LlamaConfig(
        **{**small_models.LLAMA, "num_hidden_layers": 1},
        vocab_size=768, eos_token_id=1,
    )  # fmt: skip
    config = dataclasses.replace(config, max_position_embeddings=128)
    model = models.Llama(config=config)
    ids = np.ones((1, 1), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    models.save(model, params, tmp_path / "base", tokenizer_from=chat)
    talks = [
        {"messages": [
            {"role": "user", "content": f"Where is the {x}?"},
            {"role": "assistant", "content": f"The {x} is here."},
        ]}
        for x in ("heron", "train", "boat", "book", "bus", "key")
    ]  # fmt: skip
    for name, part in (("train", talks[:4]), ("valid", talks[4:])):
        text = "".join(json.dumps(talk) + "\n" for talk in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    settings = tasks.ChatSettings(
        model=str(tmp_path / "base"), train=[str(tmp_path / "train.jsonl")],
        valid=[str(tmp_path / "valid.jsonl")], max_new_tokens=4, max_length=128,
        buckets=1,
    )  # fmt: skip
    place = tmp_path / "run"
    loaded, merged = a_run(place, "chat", settings)
    status, out, _ = run("evaluate", place, "--json")
    assert status == 0
    found = json.loads(out)["tests"]["held out"]
    tokens = data.tokenise_chats(
        loaded.tokenizer, data.read_conversations([tmp_path / "valid.jsonl"]), 128
    ).columns
    losses, apply = [], jax.jit(loaded.model.apply)
    for row, labels in zip(tokens["input_ids"], tokens["labels"], strict=True):
        logits = apply({"params": merged}, np.asarray(row)[None])
        log_p = np.asarray(jax.nn.log_softmax(logits))[0, :-1]
        wanted = np.asarray(labels)[1:]
        losses += [-log_p[i, y] for i, y in enumerate(wanted) if y >= 0]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["words an answer"] >= 0
    other = shutil.copy(tmp_path / "train.jsonl", tmp_path / "other.jsonl")
    status, out, _ = run("evaluate", place, "--data", other, "--limit", 1, "--json")
    assert json.loads(out)["tests"]["held out"]["loss"] != found["loss"]
