"""What training scripts share: options, losses, whole runs by name."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from tools import randomise

import jlora
from jlora import data, models, tasks, train

IDS = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def mean_of_the_counted(logits, labels):
    """The definition: the mean of -log p of each label that is not below 0."""
    log_p = jax.nn.log_softmax(np.asarray(logits, np.float64))
    rows = [
        -log_p[place][labels[place]] for place in np.ndindex(labels.shape)
        if labels[place] >= 0
    ]  # fmt: skip
    return np.sum(rows), len(rows)


def test_the_loss_of_a_decoder_predicts_each_token_from_those_before():
    model, params = small_models.make("gpt2")
    labels = np.where(MASK * [0, 0, 1, 1, 1], IDS, data.IGNORED)  # a prompt of two
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    total, count = jax.jit(tasks.causal_loss(model))(params, batch, None)
    logits = model.apply({"params": params}, IDS, MASK)
    want = mean_of_the_counted(logits[:, :-1], labels[:, 1:])
    np.testing.assert_allclose((total, count), want, rtol=1e-5)
    assert count == 4


def test_the_loss_of_an_encoder_decoder_reads_what_it_wrote():
    model, params = small_models.make("t5")
    labels = np.array([[5, 6, 1], [7, 1, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    got = jax.jit(tasks.seq2seq_loss(model))(params, batch, None)
    start = model.config.decoder_start_token_id
    shifted = np.array([[start, 5, 6], [start, 7, 1]])
    logits = model.apply({"params": params}, IDS, MASK, shifted)
    np.testing.assert_allclose(got, mean_of_the_counted(logits, labels), rtol=1e-5)


@pytest.mark.parametrize("labels", [np.array([2, -100]), np.array([0.7, -100.0])])
def test_the_loss_of_an_encoder_is_of_classes_or_of_a_number(labels):
    is_number = labels.dtype.kind == "f"
    config = models.BertConfig(
        **{**small_models.BERT, "head": "classification"},
        vocab_size=24,
        num_labels=1 if is_number else 3,
    )
    model = models.BertClassifier(config=config)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda x: x + 0.1, params)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": jnp.asarray(labels)}
    total, count = jax.jit(tasks.classification_loss(model))(params, batch, None)
    logits = np.asarray(model.apply({"params": params}, IDS, MASK))
    want = mean_of_the_counted(logits, labels)[0] if not is_number else None
    want = (logits[0, 0] - 0.7) ** 2 if is_number else want
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert count == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(tasks.AdapterOptions, tasks.TrainingOptions):
    words: str = train.option("", "of its own", group="mine")


def test_what_products_round_to_is_said_of_a_gpu(monkeypatch):
    assert Mine().products == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Mine().products == "float32 with products in TF32"
    assert Mine(precision="bfloat16").products == "bfloat16"
    with jax.default_matmul_precision("highest"):
        assert Mine().products == "float32"


def settings(*argv):
    return train.read_settings(Mine, argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--rank 3 --targets q", "adapters of rank 3 on q"),
        ("--dora --quantize nf4", "DoRA of rank 8 on query value, on a base in nf4"),
        ("--full", "every weight"),
    ],
)
def test_what_is_trained_is_said(argv, said):
    assert settings(*argv.split()).what_is_trained == said


def test_options_become_the_tree_they_name():
    _, params = small_models.make("t5")
    adapt = lambda *argv: settings(*argv).adapt(params, jax.random.key(1))
    rows = jlora.summary(adapt("--rank", "3", "--alpha", "6", "--dora")).rows
    assert {(row.rank, row.scale) for row in rows} == {(3, 2.0)}
    assert jlora.summary(adapt("--full")).fraction == 1
    everywhere = jlora.summary(adapt("--targets", "all-linear", "--rank", "2")).rows
    assert not [row for row in everywhere if "lm_head" in row.path]
    whole = settings().adapt(params, whole=["lm_head"] if "lm_head" in params else [])
    assert jlora.summary(whole).trainable > 0
    pissa = adapt("--init", "pissa", "--rank", "2")
    moved = jax.tree.leaves(jlora.split(pissa)[0])
    assert all(np.abs(x).max() > 0 for x in moved)  # B too begins away from zero


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--full --dora", "--full trains every weight"),
        ("--full --quantize int8", "--quantize freezes them"),
        ("--batch-size 5 --accumulate 2", "does not fall into --accumulate 2"),
        ("--quantize nf5", "nf5"),
        ("--lr-ratio 0", "above 0"),
    ],
)
def test_options_that_do_not_go_together(argv, message):
    with pytest.raises(jlora.OptionError, match=message):
        settings(*argv.split())


def test_loraplus_moves_b_faster():
    _, params = small_models.make("t5")
    tree = randomise(settings("--rank", "2").adapt(params), jax.random.key(2))
    trainable = jlora.split(tree)[0]
    ones = jax.tree.map(jnp.ones_like, trainable)

    def updates(*argv):
        tx, _ = settings("--warmup", "0", *argv).optimizer(10)
        return tx.update(ones, tx.init(trainable), trainable)[0]

    plain, plus = updates(), updates("--lr-ratio", "16")
    labels = jlora.labels(trainable)
    ratios = jax.tree.map(lambda x, y: float((y / x).mean()), plain, plus)
    found = {
        *zip(
            jax.tree.leaves(labels),
            np.round(jax.tree.leaves(ratios), 3).tolist(),
            strict=True,
        )
    }
    assert found == {("a", 1.0), ("b", 16.0)}


def test_every_kind_of_task_names_its_settings():
    for name, kind in tasks.KINDS.items():
        assert dataclasses.is_dataclass(kind.settings), name
        assert issubclass(kind.settings, train.RunSettings)
        assert kind.summary
        assert inspect.signature(kind.make)


def test_a_whole_task_by_its_name(tmp_path):
    from test_example_translate import CORPUS, SMALL, example

    files = lambda name: [str(CORPUS / f"{name}.{code}") for code in ("de", "en")]
    argv = [*SMALL, "--steps", "2", "--model", str(example.EMBEDDED)]
    argv += ["--train", *files("travel.train"), "--output", str(tmp_path / "run")]
    asked = train.read_settings(tasks.TranslationSettings, argv)
    tasks.run("translate", asked)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| test | 32 |" in report
    assert "2 steps" in report
    merged = models.load(tmp_path / "run" / "merged")[1]
    base = models.load(example.EMBEDDED)[1]
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), merged, base)
    assert sum(jax.tree.leaves(changed)) == 12


# -- side by side ----------------------------------------------------------------------


def outcome(method, trainable, after, peak):
    return tasks.Outcome(
        method, method, trainable, 1000, {"new": 20.0, "old": 80.0}, after, 1.5, 9.0,
        0.5, peak, 4 * trainable,
    )  # fmt: skip


def test_advice_speaks_of_the_runs_own_figures(tmp_path):
    full = outcome("full", 1000, {"new": 60.0, "old": 50.0}, 3_000_000)
    lora = outcome("LoRA", 20, {"new": 58.5, "old": 66.0}, 1_200_000)
    comparison = tasks.Comparison((full, lora), "BLEU")
    (said,) = comparison.advice()
    for words in (
        "1.5 BLEU below",
        "2.0% of its",
        "0.40 of its memory",
        "16.0 BLEU more",
    ):
        assert words in said
    head, *rows = comparison.rows
    assert head[3:5] == ("BLEU new", "BLEU old")
    assert rows[1][1] == "20 (2.00%)"
    assert rows[1][3] == "20.0 -> 58.5"
    assert tasks.Comparison((lora,), "BLEU").advice() == []
    comparison.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_methods_see_the_same_examples(tmp_path):
    from test_example_translate import CORPUS, example

    comparing = pytest.importorskip("compare_full_vs_lora")

    base, _ = models.load(example.EMBEDDED)
    config = dataclasses.replace(base.config, num_layers=1, num_decoder_layers=1)
    model = models.T5(config=config)
    params = jax.jit(model.init)(jax.random.key(0), IDS, None, IDS)["params"]
    models.save(model, params, tmp_path / "model", tokenizer_from=example.EMBEDDED)
    files = [str(CORPUS / f"travel.valid.{code}") for code in ("de", "en")]
    argv = ["--model", str(tmp_path / "model"), "--train", *files, "--steps", "2"]
    argv += ["--train-size", "8", "--valid-size", "8", "--test-size", "4"]
    argv += ["--batch-size", "4", "--eval-batch-size", "8", "--buckets", "1"]
    argv += ["--output", str(tmp_path / "out"), "--methods", "full", "LoRA"]
    assert comparing.main(argv) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| full | " in report
    assert "LoRA: " in report
    first = lambda name: train.MetricsLog(tmp_path / "out" / name / "metrics.jsonl")
    losses = [first(name).rows("train")[0]["loss"] for name in ("full", "LoRA")]
    np.testing.assert_allclose(*losses, rtol=1e-5)  # B is zero before the first step
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "<td>full</td>" in page
    assert comparing.main([*argv, "--overwrite", "--dora"]) == 2
