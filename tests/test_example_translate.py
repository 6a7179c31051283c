"""The translation example, run in process at few steps."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
from jlora import checkpoint, data, models, train

EXAMPLES = Path(__file__).parents[1] / "examples"
CORPUS = EXAMPLES / "assets" / "corpus"
sys.path.insert(0, str(EXAMPLES))

import flan_t5_translate as example  # noqa: E402

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
    """A run of 24 steps on the embedded model and corpus, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("run") / "out"
    argv = [*SMALL, "--steps", "24", "--eval-every", "12", "--output", str(folder)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert example.main(argv) == 0
    return folder, argv, out.getvalue()


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
    return train.MetricsLog(folder / "metrics.jsonl").rows(event)


def same_arrays(one, two):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def pairs(name="travel.test", n=60):
    files = [CORPUS / f"{name}.{code}" for code in ("de", "en")]
    return data.read_pairs(files, "de-en")[:n]


# ------------------------------------------------------------------------- a whole run


def test_the_loss_falls_and_is_logged(finished):
    folder, _, _ = finished
    valid = rows(folder, "valid")
    assert [row["step"] for row in valid] == [0, 12, 24]
    assert valid[-1]["loss"] < 0.85 * valid[0]["loss"]
    logged = rows(folder, "train")
    assert [row["step"] for row in logged] == [*range(1, 25)]
    assert all(row["tokens_per_second"] > 0 for row in logged)
    assert logged[-1]["learning_rate"] < logged[5]["learning_rate"]


def test_adapter_and_merged_model_are_the_same_model(finished):
    folder, _, _ = finished
    model, params = models.load(example.EMBEDDED)
    tree = checkpoint.load_adapter(folder / "adapter", params)
    merged_model, merged = models.load(folder / "merged")
    assert merged_model.config == model.config
    same_arrays(jlora.merge(tree), merged)
    assert jlora.summary(tree).trainable == 12 * 2 * 128 * 8


def test_the_report_says_what_was_measured(finished):
    folder, _, printed = finished
    report = (folder / "report.md").read_text()
    _, params = models.load(example.EMBEDDED)
    summary = jlora.summary(checkpoint.load_adapter(folder / "adapter", params))
    for words in (
        "| test | sentences | BLEU before | BLEU after | change |",
        "| travel | 32 |",
        f"{summary.trainable:,} ({summary.fraction:.2%} of {summary.total:,})",
        "24 steps (1.50 epochs)",
        "| merged model | translates a batch as the unmerged does, in float32 |",
        "| chrF | source | reference | before | after |",
        "e to its power is the perplexity",
        "| command | python ",
        f"jax {jax.__version__}",
        "on the host |",
        "`adapter`",
        "q/kernel (query)",
    ):
        assert words in report
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("travel", "home"):
        assert f"| {name} | 32 |" in report
        assert len(re.findall(rf"^{name} +32 ", printed, re.M)) == 1
    assert "home fell by" in printed
    assert "a model forgets" in printed
    assert printed.count("  after      ") == 4
    for when in ("before", "after"):
        lines = data.read_lines(folder / "outputs" / f"travel.{when}.txt")
        assert len(lines) == 32
    # Good and bad ones, both of the test.
    cells = [
        line.split(" | ") for line in report.splitlines() if line.count(" | ") == 4
    ]
    sources = {pair.source for pair in pairs()}
    chosen = [row for row in cells if row[1] in sources]
    quality = [int(row[0].strip("| ")) for row in chosen]
    assert len(quality) == 6
    assert quality == sorted(quality, reverse=True)
    assert quality[0] > quality[-1]


def test_the_five_lines_that_use_the_model_work(finished, capsys):
    _, _, printed = finished
    code = printed.split("Now use it:\n\n")[1].split("\n\nThe report")[0]
    exec(compile(code, "use", "exec"), {})
    (said,) = eval(capsys.readouterr().out)
    assert said.endswith((".", "?"))


def test_a_finished_run_resumes_to_the_same_report(finished):
    folder, _, _ = finished
    before = (folder / "report.md").read_text()
    assert example.main(["--output", str(folder), "--resume"]) == 0
    after = (folder / "report.md").read_text()
    cut = lambda text: text[text.index("## Translations") : text.index("## Files")]
    assert cut(after) == cut(before)
    assert after.split("## Training")[0] == before.split("## Training")[0]


def test_interrupted_and_resumed_is_uninterrupted(
    finished, tmp_path, ctrl_c_at, monkeypatch, capsys
):
    folder, argv, _ = finished
    stopped = tmp_path / "stopped"
    ctrl_c_at(7)
    assert example.main([*argv[:-1], str(stopped)]) == 130
    out = capsys.readouterr().out
    command = f"--output {stopped} --resume"
    assert "Stopped and saved after step 7 of 24" in out
    assert command in out
    monkeypatch.undo()
    assert example.main(command.split()) == 0
    _, params = models.load(example.EMBEDDED)
    same_arrays(
        checkpoint.load_adapter(stopped / "adapter", params),
        checkpoint.load_adapter(folder / "adapter", params),
    )
    losses = lambda path: [(row["step"], row["loss"]) for row in rows(path, "train")]
    assert losses(stopped) == losses(folder)


# --------------------------------------------------------------------- your own corpus


def test_a_dataset_of_wmt_form_with_full_fine_tuning(one_layer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    wmt, out = tmp_path / "wmt", tmp_path / "out"
    wmt.mkdir()
    for split in ("train", "validation", "test"):
        cells = [{"de": p.source, "en": p.target} for p in pairs("travel.train")]
        table = pyarrow.table({"translation": cells})
        pyarrow.parquet.write_table(table, wmt / f"{split}.parquet")
    argv = ["--model", one_layer, "--dataset", str(wmt), "--direction", "en-de"]
    argv += ["--full", "--precision", "bfloat16", "--steps", "3", "--batch-size", "8"]
    argv += ["--accumulate", "2", "--beams", "2", "--buckets", "1", "--test-size", "4"]
    argv += ["--schedule", "linear", "--eval-batch-size", "8", "--eval-every", "3"]
    assert example.main([*argv, "--output", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert "(100.00% of " in report
    assert "| trained | every weight |" in report
    pair = pairs("travel.train")[0]
    assert f"| {pair.target} | {pair.source} |" in report


def write_corpus(folder, codes=("de", "en"), n=60, tag="", times=1):
    for side, code in enumerate(codes):
        lines = [
            f"{tag if side else ''}{' '.join([p[side]] * times)}\n" for p in pairs(n=n)
        ]
        (folder / f"corpus.{code}").write_text("".join(lines))
    return [str(folder / f"corpus.{code}") for code in codes]


def test_another_language_all_linear_layers_dropout_and_cut_texts(
    one_layer, tmp_path, capsys
):
    files, out = write_corpus(tmp_path, ("en", "cs"), times=5), tmp_path / "out"
    argv = ["--train", *files[::-1], "--model", one_layer, "--direction", "en-cs"]
    argv += ["--targets", "all-linear", "--dropout", "0.1", "--rank", "2", "--epochs"]
    argv += ["0.5", "--batch-size", "8", "--buckets", "1", "--eval-batch-size", "8"]
    argv += ["--max-source-length", "16", "--max-target-length", "20"]
    argv += ["--keep", *files, "--test-size", "6", "--output", str(out)]
    assert example.main(argv) == 0
    report, printed = (out / "report.md").read_text(), capsys.readouterr().out
    assert "wi_*/kernel" in report
    assert "lm_head" not in report
    assert "| keep | 6 |" in report
    assert "translate English to Czech: " in report
    for said in (report, printed):
        assert "train, sources: 49 of 49 texts are longer than 16 tokens" in said
        assert "test, targets: 6 of 6 texts are longer than 20 tokens" in said


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
        ("--full --rank 4", "--full trains every weight: --rank, --alpha"),
        ("--full --dropout 0.1", "--full trains every weight"),
        ("--steps 1 --epochs 1", "--steps and --epochs exclude each other"),
        ("--batch-size 8 --accumulate 3", "does not fall into --accumulate 3"),
        ("--direction german", "unknown direction 'german'"),
        ("--direction en-cs", "the embedded corpus is German and English"),
        ("--model there", "--model needs data"),
        ("--config de-en", "--config belongs to a --dataset"),
        ("--dataset wmt/wmt16 --train a.de a.en", "brings its own splits"),
        ("--test a.de a.en", "--valid, --test and --keep need --train"),
        ("--train nowhere.de nowhere.en", "nowhere.de: no such file"),
        ("--dataset nobody/nothing", "nobody/nothing [train] cannot be read"),
    ],
)
def test_bad_options(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(argv.split(), capsys)
    assert not list(tmp_path.glob("runs/*"))


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
    out, files = tmp_path / "out", write_corpus(tmp_path)
    argv = [*argv.split(), "--train", *files, "--output", str(out)]
    assert message in fails(argv, capsys)
    assert not out.exists()


def test_a_token_that_the_model_does_not_know_stops_before_training(
    tmp_path, capsys, one_layer
):
    tokenizer = data.load_tokenizer(one_layer)
    tokenizer.add_tokens(["<formal>"])
    model, params = models.load(one_layer)
    models.save(model, params, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "valid").mkdir()
    argv = ["--model", str(tmp_path / "model"), "--train", *write_corpus(tmp_path)]
    argv += ["--valid", *write_corpus(tmp_path / "valid", tag="<formal> ")]
    message = fails([*argv, "--output", str(tmp_path / "out")], capsys)
    assert "the token 1460 ('<formal>') is beyond the model's vocabulary" in message
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_overwritten_unasked(finished, capsys):
    folder, argv, _ = finished
    message = fails(argv, capsys)
    assert f"{folder} holds another run" in message
    assert "--resume" in message
    assert "--overwrite" in message


def test_resume_with_other_settings(finished, capsys):
    folder, _, _ = finished
    message = fails(["--output", str(folder), "--resume", "--rank", "4"], capsys)
    assert "has --rank as it is by default, not 4" in message
