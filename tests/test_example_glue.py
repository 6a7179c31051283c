"""The example of several tasks on one BERT, run in process at few steps."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import peft, tasks, train

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import make_tiny_bert  # noqa: E402
import nlu_glue as example  # noqa: E402

ASSETS = EXAMPLES / "assets"


def asked(*argv):
    return train.read_settings(example.Settings, argv)


def test_two_tasks_at_few_steps(tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--tasks", "acceptability", "sentiment", "--steps", "2", "--buckets", "1",
            "--train-size", "64", "--test-size", "16", "--output", str(out)]  # fmt: skip
    assert example.main(argv) == 0
    told = capsys.readouterr().out
    report = (out / "report.md").read_text()
    for said in (told, report):
        assert "acceptability" in said
        assert "f1" in said
    assert "| acceptability | test | 16 | matthews |" in report
    assert (out / "acceptability" / "report.md").exists()
    largest = float(told.split("differs by more than ")[1].split(".\n")[0])
    assert 0 <= largest < 1e-4

    # What PEFT reads holds the adapter and the head of one task.
    tensors = load_file(out / "peft" / "sentiment" / "adapter_model.safetensors")
    shapes = {name.rpartition("model.")[2]: x.shape for name, x in tensors.items()}
    assert shapes["classifier.weight"] == (2, 96)
    assert peft.read_config(out / "peft" / "sentiment")["r"] == 8
    layer = 4 * 2 * 96 + 2 * (96 + 192)  # attention, and the feed-forward's two
    pooler = 2 * 96
    assert sum(x.size for x in tensors.values()) == 8 * (2 * layer + pooler) + 2 * 97

    # A run that is finished is resumed without a step.
    assert example.main(["--output", str(out), "--resume"]) == 0


def test_the_recipe_is_the_papers():
    s = asked("--recipe", "roberta-base")
    assert {*s.names} == {*tasks.GLUE}
    own = s.of_task("cola", Path("x"))
    assert (own.lr, own.batch_size, own.epochs) == (4e-4, 32, 80.0)
    assert (own.rank, own.alpha, own.max_length, own.schedule) == (
        8,
        8.0,
        512,
        "linear",
    )
    assert own.model == "FacebookAI/roberta-base"
    assert own.model_dropout
    _, rate = own.optimizer(100)
    np.testing.assert_allclose([rate(0), rate(6), rate(100)], [0, 4e-4, 0], atol=1e-9)
    assert (
        asked("--recipe", "roberta-base", "--steps", "3").of_task("rte", Path()).epochs
        is None
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--recipe roberta-base --lr 1e-3", "--recipe brings its own"),
        ("--model x", "are for tasks of GLUE"),
        ("--recipe roberta-base --tasks sentiment", "need no --recipe"),
        ("--tasks rte rte", "stands twice"),
    ],
)
def test_options_that_do_not_go_together(argv, message):
    with pytest.raises(jlora.OptionError, match=message):
        asked(*argv.split())


def test_the_embedded_tasks_are_what_the_script_makes(tmp_path):
    make_tiny_bert.write_tasks(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (ASSETS / "sentences" / file.name).read_text()
    assert {p.name for p in tmp_path.iterdir()} == {
        p.name for p in (ASSETS / "sentences").glob("*.tsv")
    }
    made = make_tiny_bert.tokenizer()
    kept = jlora.data.load_tokenizer(ASSETS / "tiny-bert")
    text = "The dogs chase a xylophone!"
    assert kept(text)["input_ids"] == made(text)["input_ids"]
    assert kept.unk_token_id not in kept(text)["input_ids"]
    sizes = sum(p.stat().st_size for name in ("sentences", "tiny-bert")
                for p in (ASSETS / name).iterdir())  # fmt: skip
    assert sizes < 2e6
