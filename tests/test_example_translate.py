"""The translation example, run in process at few steps."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from jlora import checkpoint, models

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _loop  # noqa: E402
import _options  # noqa: E402
import flan_t5_translate as example  # noqa: E402
from _corpus import pairs  # noqa: E402
from _options import read_settings  # noqa: E402

SMALL = [
    *("--train-size", "512", "--valid-size", "32", "--test-size", "32"),
    *("--eval-batch-size", "32", "--batch-size", "32", "--buckets", "2"),
    *("--warmup", "4", "--lr", "1e-2"),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Runs of the same shapes share their compiled programs."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """Keep caches out of the home folder; never ask the hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 24 steps on the embedded model and the generated corpus."""
    folder = tmp_path_factory.mktemp("run") / "out"
    argv = [*SMALL, "--steps", "24", "--eval-every", "12", "--output", str(folder)]
    assert example.main(argv) == 0
    return folder, argv


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A folder with an untrained T5 of one layer, which compiles faster."""
    model, _ = models.load(example.EMBEDDED)
    config = dataclasses.replace(model.config, num_layers=1, num_decoder_layers=1)
    ids = np.ones((1, 1), np.int32)
    model = models.T5(config=config)
    params = jax.jit(model.init)(jax.random.key(0), ids, None, ids)["params"]
    folder = tmp_path_factory.mktemp("model")
    models.save(model, params, folder, tokenizer_from=example.EMBEDDED)
    return str(folder)


def rows(folder, event):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def same_arrays(one, two):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ------------------------------------------------------------------------- a whole run


def test_the_loss_falls_and_is_logged(finished):
    folder, _ = finished
    valid = rows(folder, "valid")
    assert [row["step"] for row in valid] == [0, 12, 24]
    assert valid[-1]["loss"] < 0.85 * valid[0]["loss"]
    train = rows(folder, "train")
    assert [row["step"] for row in train] == [10, 20, 24]
    assert all(row["tokens_per_second"] > 0 for row in train)
    assert train[-1]["learning_rate"] < train[0]["learning_rate"]
    assert [row["test"] for row in rows(folder, "after")] == ["travel", "home"]


def test_adapter_and_merged_model_are_the_same_model(finished):
    folder, _ = finished
    model, params = models.load(example.EMBEDDED)
    tree = checkpoint.load_adapter(folder / "adapter", params)
    merged_model, merged = models.load(folder / "merged")
    assert merged_model.config == model.config
    same_arrays(jlora.merge(tree), merged)
    assert jlora.summary(tree).trainable == 12 * 2 * 128 * 8


def test_the_merged_folder_has_its_tokenizer(finished):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "merged")
    ids = tokenizer("translate German to English: Das Haus.")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1


def test_the_report_says_what_was_measured(finished):
    folder, _ = finished
    report = (folder / "report.md").read_text()
    _, params = models.load(example.EMBEDDED)
    summary = jlora.summary(checkpoint.load_adapter(folder / "adapter", params))
    for words in (
        "BLEU, travel",
        f"{summary.trainable:,} ({summary.fraction:.2%} of {summary.total:,})",
        "24 steps of 32 pairs",
        "greedy tokens equal in 32 of 32 sentences",
        "| source | reference | before | after |",
        "`adapter`",
        "q/kernel (query)",
    ):
        assert words in report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    first = pairs("travel", "test", 1)[0]
    assert f"| {first.de} | {first.en} |" in report


def test_a_finished_run_resumes_to_the_same_report(finished):
    folder, _ = finished
    before = (folder / "report.md").read_text()
    assert example.main(["--output", str(folder), "--resume"]) == 0
    cut = lambda text: text[text.index("## Translations") : text.index("## Files")]
    assert cut((folder / "report.md").read_text()) == cut(before)


# ------------------------------------------------------------------- stop and continue


def test_interrupted_and_resumed_is_uninterrupted(
    finished, tmp_path, monkeypatch, capsys
):
    folder, argv = finished
    stopped = tmp_path / "stopped"
    count = iter(range(1000))
    add = _loop.Meter.add

    def interrupt(self, batch):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        add(self, batch)

    monkeypatch.setattr(_loop.Meter, "add", interrupt)
    assert example.main([*argv[:-1], str(stopped)]) == 130
    out = capsys.readouterr().out
    command = f"--output {stopped} --resume"
    assert "Stopped and saved after step 8 of 24" in out
    assert command in out
    assert not rows(stopped, "after")
    assert example.main(command.split()) == 0
    model, params = models.load(example.EMBEDDED)
    same_arrays(
        checkpoint.load_adapter(stopped / "adapter", params),
        checkpoint.load_adapter(folder / "adapter", params),
    )
    losses = lambda path: [(row["step"], row["loss"]) for row in rows(path, "train")]
    assert losses(stopped) == losses(folder)


def test_what_was_logged_after_the_saved_state_is_dropped(tmp_path):
    metrics = example.Metrics(tmp_path)
    metrics.write("before", bleu=1.0)
    for step in (10, 20, 30):
        metrics.write("train", step=step, loss=1.0)
    metrics.cut(20)
    assert [row["step"] for row in metrics.rows("train")] == [10, 20]
    assert metrics.rows("before")


def test_a_second_signal_interrupts_at_once():
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with _loop.stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_stops_the_run():
    loop = object.__new__(_loop.Loop)
    loop.progress = _loop.Progress(step=12)
    out = {"nonfinite": True, "loss": np.nan, "grad_norm": np.inf, "weight": 1}
    loop.pending = [out]
    with pytest.raises(jlora.NonFiniteError, match="step 12: the loss is nan"):
        loop.collect()


# --------------------------------------------------------------------- your own corpus


def wmt_folder(folder, n=64):
    """A dataset as WMT's: parquet files of {"translation": {"de": ..., "en": ...}}."""
    import datasets

    folder.mkdir()
    for split in ("train", "validation", "test"):
        drawn = pairs("travel", split, n)
        rows = [{"translation": {"de": p.de, "en": p.en}} for p in drawn]
        file = str(folder / f"{split}.parquet")
        datasets.Dataset.from_list(rows).to_parquet(file)
    return str(folder)


def test_a_dataset_of_wmt_form_with_full_fine_tuning(one_layer, tmp_path):
    out = tmp_path / "out"
    argv = ["--model", one_layer, "--dataset", wmt_folder(tmp_path / "wmt")]
    argv += [
        "--direction",
        "en-de",
        "--full",
        "--precision",
        "bfloat16",
        "--steps",
        "3",
    ]
    argv += ["--batch-size", "8", "--accumulate", "2", "--beams", "2", "--buckets", "1"]
    argv += ["--schedule", "linear", "--test-size", "4", "--eval-batch-size", "8"]
    assert example.main([*argv, "--output", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert "(100.00% of " in report
    source = pairs("travel", "test", 1)[0]
    assert f"| {source.en} | {source.de} |" in report


def test_line_files_with_all_linear_layers_and_dropout(one_layer, tmp_path):
    for code in ("de", "en"):
        lines = [getattr(p, code) + "\n" for p in pairs("travel", "train", 60)]
        (tmp_path / f"corpus.{code}").write_text("".join(lines))
    out = tmp_path / "out"
    argv = ["--train", str(tmp_path / "corpus.de"), str(tmp_path / "corpus.en")]
    argv += [
        "--model",
        one_layer,
        "--targets",
        "all-linear",
        "--dropout",
        "0.1",
        "--rank",
        "2",
    ]
    argv += ["--epochs", "0.5", "--batch-size", "8", "--buckets", "1"]
    argv += ["--eval-batch-size", "8"]
    assert example.main([*argv, "--output", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert "wi_*/kernel" in report
    assert "lm_head" not in report


# ---------------------------------------------------------------------------- bad input


def fails(argv, capsys):
    """Run main; return what it prints on stderr, which is no traceback."""
    assert example.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    message = "\n".join(error[[line[:7] for line in error].index("error: ") :])
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--rank 0", "argument --rank: '0' is not a whole number at least 1"),
        ("--rank 2.5", "'2.5' is not a whole number at least 1"),
        ("--alpha 0", "'0' is not a number above 0"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--dropout 1", "--dropout 1: it is a probability"),
        ("--schedule step", "invalid choice: 'step'"),
        ("--steps 1 --epochs 1", "--steps and --epochs exclude each other"),
        ("--batch-size 8 --accumulate 3", "does not fall into --accumulate 3"),
        ("--direction de-fr", "unknown direction 'de-fr'"),
        ("--model there", "--model needs data"),
        ("--config de-en", "--config belongs to a --dataset"),
        ("--dataset wmt/wmt16 --train a.de a.en", "brings its own splits"),
        ("--test a.de a.en", "--valid and --test need --train"),
        ("--resume", "--resume needs --output"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--train nowhere.de nowhere.en", "nowhere.de: no such file"),
        ("--dataset nobody/nothing", "nobody/nothing [train] cannot be read"),
    ],
)
def test_bad_options(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(argv.split(), capsys)
    assert not list(tmp_path.glob("runs/*"))


def corpus(folder):
    for code in ("de", "en"):
        lines = [getattr(p, code) + "\n" for p in pairs("travel", "train", 40)]
        (folder / f"corpus.{code}").write_text("".join(lines))
    return ["--train", str(folder / "corpus.de"), str(folder / "corpus.en")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model nobody/nothing", "the Hugging Face hub gave no repository"),
        ("--model ./nowhere", "nowhere is no folder"),
        ("--rank 500", "rank=500 for the kernel"),
        ("--targets querry", "'querry' hits nothing in this tree"),
    ],
)
def test_bad_models_and_targets(argv, message, capsys, tmp_path):
    out = tmp_path / "out"
    argv = [*argv.split(), *corpus(tmp_path), "--output", str(out)]
    assert message in fails(argv, capsys)
    assert not out.exists()


def test_bad_corpus_names_the_line(capsys, tmp_path):
    argv = corpus(tmp_path)
    with (tmp_path / "corpus.de").open("a") as file:
        file.write("Eine Zeile mehr.\n")
    message = fails([*argv, "--output", str(tmp_path / "out")], capsys)
    assert "corpus.de has 41 lines" in message
    assert "line 41" in message


# --------------------------------------------------------------------- the run's folder


def test_another_run_is_not_overwritten_unasked(finished, capsys):
    folder, argv = finished
    message = fails(argv, capsys)
    assert f"{folder} holds another run" in message
    assert "--resume" in message
    assert "--overwrite" in message


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    argv = [*SMALL, "--output", str(tmp_path)]
    assert "exists and is no run" in fails(argv, capsys)
    assert "exists and is no run" in fails([*argv, "--overwrite"], capsys)


def test_overwriting_removes_what_a_run_wrote_and_no_more(tmp_path):
    for name in (_options.SETTINGS, _options.METRICS, "thesis.tex"):
        (tmp_path / name).write_text("{}")
    (tmp_path / _options.ADAPTER).mkdir()
    settings = read_settings(["--output", str(tmp_path), "--overwrite"], "")
    _options.claim_folder(settings)
    assert {path.name for path in tmp_path.iterdir()} == {
        _options.SETTINGS,
        "thesis.tex",
    }


def test_resume_without_a_run(tmp_path, capsys):
    message = fails(["--output", str(tmp_path / "none"), "--resume"], capsys)
    assert "holds no run to resume" in message


def test_resume_before_the_first_save(tmp_path, capsys):
    settings = read_settings([*SMALL, "--output", str(tmp_path)], "")
    _options.claim_folder(settings)
    message = fails(["--output", str(tmp_path), "--resume"], capsys)
    assert "nothing was saved yet" in message


def test_resume_with_other_settings(finished, capsys):
    folder, _ = finished
    message = fails(["--output", str(folder), "--resume", "--rank", "4"], capsys)
    assert "has --rank 8, not 4" in message


def test_runs_without_a_folder_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        settings = read_settings([], "")
        assert settings.folder == Path("runs") / f"translate-{number}"
        _options.claim_folder(settings)


def test_learning_rates():
    value = lambda *argv: read_settings(argv, "")
    assert value("--full").learning_rate == 1e-3
    assert value("--lr", "0.5", "--full").learning_rate == 0.5
    settings = value("--lr", "1", "--warmup", "4", "--schedule", "linear")
    schedule = _loop.learning_rate(settings, 12)
    got = [float(schedule(step)) for step in (0, 2, 4, 8, 12)]
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.5, 0])
