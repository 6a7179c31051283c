"""Classification: GLUE's files as they come, labels, runs and what they report."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_bert
from tools import randomise

import jlora
from jlora import data, metrics, tasks, train

WORDS = ["the", "film", "book", "was", "is", "good", "bad", "dull", "fine", "not"]
# The heads of GLUE's own files, and a row of each; what is asked for is marked by X, Y.
OFFICIAL = {
    "cola": ("train.tsv", None, "gj04\t1\t\tX"),
    "sst2": ("SST-2/train.tsv", "sentence\tlabel", "X\t1"),
    "mrpc": (
        "MRPC/train.tsv",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t70\t71\tX\tY",
    ),
    "qqp": (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "1\t3\t4\tX\tY\t1",
    ),
    "stsb": (
        "STS-B/train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
        "sentence2\tscore",
        '0\tmain\tM\t2012\t1\tnone\tnone\tX\tY\t5.000',
    ),
    "mnli": (
        "MNLI/train.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
        "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\t"
        "sentence2\tlabel1\tgold_label",
        "0\t1\t1n\tg\tp\tp\tp\tp\tX\tY\tneutral\tneutral",
    ),
    "qnli": (
        "QNLI/train.tsv",
        "index\tquestion\tsentence\tlabel",
        "0\tX\tY\tnot_entailment",
    ),
    "rte": ("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel",
            "0\tX\tY\tnot_entailment"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert.make(tmp_path_factory.mktemp("bert"), WORDS)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# -- GLUE's files ----------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.GLUE)
def test_the_files_of_a_task_as_glue_has_them(task, tmp_path):
    name, head, row = OFFICIAL[task]
    place = tmp_path / (name if "/" in name else f"CoLA/{name}")
    write(place, *([head] if head else []), row)
    (found,) = tasks.glue_examples(task, "train", tmp_path).values()
    is_pair = len(tasks.GLUE[task].text) == 2
    assert (found.texts, found.pairs) == (["X"], ["Y"] if is_pair else None)
    assert found.labels.tolist() == [5.0 if task == "stsb" else 1]
    assert found.labels.dtype == (np.float32 if task == "stsb" else np.int32)


@pytest.mark.parametrize("task", tasks.GLUE)
def test_the_files_of_a_task_as_the_hub_has_them(task, tmp_path):
    known = tasks.GLUE[task]
    labels = [4.5, 0.0] if task == "stsb" else [0, -1]
    columns = {name: ["a film", "a book"] for name in known.text}
    table = pyarrow.table({**columns, "label": labels, "idx": [0, 1]})
    (tmp_path / task).mkdir()
    halves = ["_matched", "_mismatched"] if task == "mnli" else [""]
    for half in halves:
        file = tmp_path / task / f"validation{half}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, file)
    found = tasks.glue_examples(task, "test", tmp_path)
    assert [*found] == (["matched", "mismatched"] if task == "mnli" else ["test"])
    for examples in found.values():
        assert examples.labels.tolist() == ([4.5, 0.0] if task == "stsb" else [0])


def test_metrics_and_classes_are_those_of_the_same_tasks():
    assert {*tasks.GLUE} < {*metrics.GLUE_TASKS}
    for task, known in tasks.GLUE.items():
        of_numbers = "pearson" in metrics.GLUE_TASKS[task]
        assert (known.classes == ()) == of_numbers
        assert known.num_labels == (1 if of_numbers else len(known.classes))


def test_files_without_a_head_are_told_from_those_with_one(tmp_path):
    write(tmp_path / "stsb/train.csv", '"one, two",two,3.8', "three,four,0")
    (found,) = tasks.glue_examples("stsb", "train", tmp_path).values()
    assert (found.texts, found.pairs) == (["one, two", "three"], ["two", "four"])
    np.testing.assert_allclose(found.labels, [3.8, 0.0], rtol=1e-6)
    write(tmp_path / "cola/in_domain_dev.tsv", "gj04\t0\t*\tFilm the.", "x\t1\t\tY z.")
    (found,) = tasks.glue_examples("cola", "test", tmp_path).values()
    assert found.texts == ["Film the.", "Y z."]
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("rte", "train", "no folder of the task rte; it holds cola, sst2"),
        ("sst2", "test", r"holds train.tsv, and nothing to test with"),
        ("cola", "train", "line 2, column label: '3' is none of the classes unacc"),
        ("sst2", "train", "columns text, label.*\n.*needs sentence, label"),
    ],
)
def test_files_that_are_not_the_tasks(tmp_path, task, split, message):
    write(tmp_path / "sst2/train.tsv", "text\tlabel\tmore", "a\t1\tb")
    if "columns text" in message:
        message = "has the columns text, label, more.\nThe task needs sentence, label"
    write(tmp_path / "cola/train.tsv", "a\t1\t\tX", "a\t3\t\tX")
    with pytest.raises(jlora.DataError, match=message):
        tasks.glue_examples(task, split, tmp_path)


# -- settings --------------------------------------------------------------------------


def asked(*argv):
    return train.read_settings(tasks.ClassificationSettings, [*map(str, argv)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--glue sst2 --train x", "--glue brings its own data"),
        ("--data x --train y", "say which --glue"),
        ("", "data is needed"),
        ("--train x --regression --classes a b", "--regression has none"),
        ("--train x --text a b c", "takes one column, or two"),
        ("--glue stsb --metrics accuracy", "accuracy is not for such labels"),
        ("--glue cola --metrics pearson", "pearson is not for such labels"),
        ("--glue sst2 --warmup 3 --warmup-ratio 0.1", "exclude each other"),
        ("--glue boolq", "boolq"),
    ],
)
def test_options_that_do_not_go_together(argv, message):
    model = [] if "model is" in message else ["--model", "x"]
    with pytest.raises(jlora.OptionError, match=message):
        asked(*argv.split(), *model)


def test_the_rate_rises_for_a_part_of_the_steps():
    s = asked("--glue", "rte", "--model", "x", "--warmup-ratio", "0.1", "--lr", "1.0",
              "--schedule", "linear")  # fmt: skip
    _, rate = s.optimizer(50)
    np.testing.assert_allclose([rate(0), rate(5), rate(50)], [0.0, 1.0, 0.0])


def test_classes_and_metrics_of_ones_own_tables(tmp_path):
    write(tmp_path / "a.tsv", "x\ty", "good film\tfine", "bad film\tpoor", "film\t-")
    own = ["--model", "x", "--train", tmp_path / "a.tsv", "--text", "x", "--label", "y"]
    s = asked(*own)
    assert (s.class_names, s.num_labels) == (("fine", "poor"), 2)
    assert s.metric_names == ("accuracy", "f1")
    s = asked(*own, "--classes", "poor", "fine")
    assert s.examples(s.train).labels.tolist() == [1, 0]
    s = asked(*own, "--regression")
    with pytest.raises(jlora.DataError, match="line 2, column y: 'fine' is no number"):
        s.examples(s.train)
    write(tmp_path / "b.csv", "2,good film", "10,bad film")
    numbered = ["--train", tmp_path / "b.csv", "--text", "2", "--label", "1"]
    s = asked("--model", "x", *numbered)
    assert s.class_names == ("2", "10")
    assert s.examples(s.train).labels.tolist() == [0, 1]


# -- runs ------------------------------------------------------------------------------


def sentences(count, rng):
    """Sentences of which the class is whether one of three words is in them."""
    rows = [[*rng.choice(WORDS, 5)] for _ in range(count)]
    return [
        (" ".join(row), int(bool({"good", "fine", "film"} & {*row}))) for row in rows
    ]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name, count in (("train", 120), ("dev", 40)):
        rows = [f"{text}\t{label}" for text, label in sentences(count, rng)]
        write(place / f"sst2/{name}.tsv", "sentence\tlabel", *rows)
        pairs = [f"{x},{y},{a + b}" for (x, a), (y, b) in
                 zip(sentences(count, rng), sentences(count, rng), strict=True)]  # fmt: skip
        write(place / f"stsb/{name}.csv", *pairs)
    return place


SMALL = ["--batch-size", "16", "--eval-batch-size", "16", "--steps", "3", "--lr", "0.02",
         "--warmup", "0", "--buckets", "1", "--valid-size", "8", "--rank", "2"]  # fmt: skip


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_whole_task_by_its_name(task, folder, own, tmp_path):
    out = tmp_path / "run"
    s = asked("--model", folder, "--glue", task, "--data", own, "--output", out, *SMALL)
    tasks.run("classify", s)
    report = (out / "report.md").read_text()
    names = {"sst2": ["accuracy"], "stsb": ["pearson", "spearman"]}[task]
    assert all(f"| test | 40 | {name} |" in report for name in names)
    assert ("said positive" in report) == (task == "sst2")
    config = json.loads((out / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]

    # The code of the report does what it says.
    code = report.split("```python\n")[1].split("```")[0]
    said = {}
    exec(code.replace("print(", "said.update(last="), {"said": said})
    before, after = (data.read_table(out / "outputs" / f"test.{when}.tsv")
                     for when in ("before", "after"))  # fmt: skip
    assert len(before) == len(after) == 40
    columns = after.columns[1:]
    assert any(not np.array_equal(before.floats(x), after.floats(x)) for x in columns)
    text = code.split("tokenizer([")[1].split("'")[1]
    row = tasks.glue_examples(task, "test", own)["test"].texts.index(text)
    if task == "sst2":
        assert said["last"] == after.text("prediction")[row]
    else:
        assert float(said["last"]) == pytest.approx(
            after.floats("prediction")[row], 1e-3
        )


def test_logits_predictions_and_tables(folder, own):
    s = asked("--model", folder, "--glue", "sst2", "--data", own, *SMALL)
    loaded = s.load(folder)
    task = tasks.Classification(s, loaded)
    tree = randomise(s.adapt(loaded.params, s.key), jax.random.key(3))
    logits = task.logits(tree, task.tests["test"])
    merged = jlora.merge(tree)
    texts, labels = task.examples["test"].texts, task.examples["test"].labels
    batch = loaded.tokenizer(texts, padding=True, return_tensors="np")
    apply = tasks.logits_of(loaded.model)
    np.testing.assert_allclose(logits, apply(merged, dict(batch)), atol=1e-4)

    said = logits.argmax(-1)
    scores = task.scores({"test": logits})
    assert scores["test"]["accuracy"] == pytest.approx((said == labels).mean())
    _, rows = task.by_class("test", logits)
    for number, row in enumerate(rows):
        counts = [int(((labels == number) & (said == other)).sum()) for other in (0, 1)]
        assert [*row[-2:]] == counts
    old = -logits  # the opposite answers
    samples = task.samples({"test": old}, {"test": logits})
    right = [row for row in samples if row[2] == row[4]]
    assert all(row[3] != row[2] for row in right)
    wrong = [row for row in samples if row[2] != row[4]]
    assert len(wrong) == min(3, (said != labels).sum())
    sure = [float(row[0]) for row in wrong]
    assert sure == sorted(sure, reverse=True)


def test_pairs_bring_token_types(folder, own):
    s = asked("--model", folder, "--glue", "stsb", "--data", own, *SMALL)
    task = tasks.Classification(s, s.load(folder))
    batch = next(iter(task.train))
    assert batch["labels"].dtype == np.float32
    for ids, types in zip(batch["input_ids"], batch["token_type_ids"], strict=True):
        first = [*ids].index(3)  # [SEP]
        assert not types[: first + 1].any()
        assert types[first + 1]
    long, loaded = dataclasses.replace(s, max_length=25), s.load(folder)
    with pytest.raises(jlora.OptionError, match="places for 24 tokens"):
        tasks.Classification(long, loaded)


# -- mixed batches ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_batch_is_routed_to_each_examples_task(kind, tmp_path):
    folder = tiny_bert.make(tmp_path, WORDS, model_type=kind, pad_token_id=0)
    own = {"many": 3, "number": 1, "two": 2}
    pairs, base = {}, None
    for place, (name, labels) in enumerate(own.items()):
        s = dataclasses.replace(
            asked("--model", folder, "--glue", "cola", "--rank", 2 + place)
        )
        model, params, tokenizer = s.load(folder, num_labels=labels)
        base = base or params[model.config.prefix]
        params = {**params, model.config.prefix: base}
        tree = randomise(s.adapt(params), jax.random.key(place))
        pairs[name] = (model, tree)
    router = tasks.Router(pairs)
    texts = ["good film", "the book was not fine", "bad", "dull book was good film"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="np"))
    names = ["number", "many", "two", "number"]
    routed = router(batch, names)
    assert [len(x) for x in routed] == [1, 3, 2, 1]
    for row, name in enumerate(names):
        model, tree = pairs[name]
        alone = jlora.lora(tasks.logits_of(model))(tree, batch)[row]
        np.testing.assert_allclose(routed[row], alone, atol=2e-5)
    with pytest.raises(jlora.OptionError, match="no task 'other'; there are many, nu"):
        router(batch, ["other"] * 4)


def test_dropout_within_the_model_is_for_training_alone(folder):
    s = asked("--model", folder, "--glue", "rte", "--model-dropout")
    model, params, _ = s.load(folder)
    batch = {"input_ids": np.array([[2, 5, 6, 3]]), "labels": np.array([1])}
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    loss = jax.jit(tasks.classification_loss(model, dropout=True))
    one, two = (loss(params, batch, jax.random.key(k))[0] for k in (0, 1))
    plain = jax.jit(tasks.classification_loss(model))(params, batch, None)[0]
    assert len({float(one), float(two), float(plain)}) == 3
    np.testing.assert_allclose(loss(params, batch, None)[0], plain, rtol=1e-6)
