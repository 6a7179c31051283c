"""The folder of a run, and a script's command line."""

import dataclasses
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import jlora
from jlora.train import RunFolder, RunSettings, command_line, option, read_settings


def refuses(message, function, *args, **kwargs):
    with pytest.raises(jlora.OptionError, match=f"(?s){message}"):
        function(*args, **kwargs)


# ------------------------------------------------------------------------- the folder


def test_runs_without_a_folder_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with RunFolder.claim(None, {"rank": 8}, name="translate") as run:
            assert run.path == Path("runs") / f"translate-{number}"
            assert json.loads((run.path / "settings.json").read_text()) == {"rank": 8}


def test_runs_that_begin_at_once_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, claimed = threading.Barrier(8), []

    def claim():
        start.wait()
        claimed.append(RunFolder.claim(None, {}))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.path for run in claimed}) == 8
    for run in claimed:
        run.close()


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_of_many_gets_a_folder_that_all_name(tmp_path, overwrite):
    start, claimed, refused = threading.Barrier(8), [], []
    if overwrite:
        RunFolder.claim(tmp_path / "run", {}).close()

    def claim():
        start.wait()
        try:
            run = RunFolder.claim(tmp_path / "run", {}, overwrite=overwrite)
            claimed.append(run)
        except jlora.OptionError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 1
    assert len(refused) == 7
    claimed[0].close()


def test_another_run_is_not_overwritten_unasked(tmp_path):
    RunFolder.claim(tmp_path, {"rank": 8}).close()
    refuses("holds another run.*--resume.*--overwrite", RunFolder.claim, tmp_path, {})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"rank": 8}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        refuses("is no run", RunFolder.claim, tmp_path, {}, overwrite=overwrite)
        refuses(
            "is no run",
            RunFolder.claim,
            tmp_path / "thesis.tex",
            {},
            overwrite=overwrite,
        )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwriting_removes_what_a_run_wrote_and_no_more(tmp_path):
    place = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    with RunFolder.claim(place, {}) as run:
        run.metrics.write("train", step=1)
        run.adapter.mkdir()
        (place / "thesis.tex").write_text("years of work")
        run.merged.symlink_to(elsewhere)
    with RunFolder.claim(place, {"rank": 2}, overwrite=True) as run:
        names = {path.name for path in place.iterdir()}
        assert names == {"settings.json", "thesis.tex", ".lock"}
        assert run.settings == {"rank": 2}
    assert (elsewhere / "precious").exists()


def test_a_run_that_is_going_on_is_left_alone(tmp_path):
    code = (
        "import sys; from jlora.train import RunFolder\n"
        "run = RunFolder.claim(sys.argv[1], {}); run.state.mkdir()\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    place = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "ready\n"
    going_on = f"is going on, in process {other.pid}"
    refuses(going_on, RunFolder.claim, place, {}, overwrite=True)
    refuses(going_on, RunFolder.resume, place)
    assert (place / "state").is_dir()
    other.kill()  # a process that dies leaves no lock behind
    other.wait()
    RunFolder.resume(place).close()
    RunFolder.claim(place, {}, overwrite=True).close()


def test_resume_needs_a_run_with_a_state(tmp_path):
    refuses("holds no run to resume", RunFolder.resume, tmp_path)
    RunFolder.claim(tmp_path, {"rank": 8}).close()
    refuses("nothing was saved yet", RunFolder.resume, tmp_path)
    (tmp_path / "state").mkdir()
    with RunFolder.resume(tmp_path) as run:
        assert run.resumed
        assert run.settings == {"rank": 8}
    with RunFolder.resume(tmp_path, {"rank": 8, "steps": 9}) as run:
        assert "steps" not in json.loads((tmp_path / "settings.json").read_text())
        run.save_settings()
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 9


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    refuses("cannot be written", RunFolder.claim, tmp_path / "file" / "run", {})
    if Path("/proc").is_dir():
        refuses("/proc/none cannot be written", RunFolder.claim, "/proc/none", {})
    with pytest.raises(jlora.LoraError, match="not a local path"):
        RunFolder.claim("gs://bucket/run", {})


# ------------------------------------------------------------------ the command line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    model: str | None = option(None, "a folder", path=True, group="model")
    files: list[str] | None = option(None, "files", path=True)
    splits: list[str] = option(["a", "b"], "two", count=2, metavar=("A", "B"))
    rank: int = option(8, "r", least=1, group="training")
    dropout: float = option(0.0, "chance", least=0, below=1)
    lr: float | None = option(None, "rate", above=0)
    way: str = option("up", "way", choices=("up", "down"))
    full: bool = option(False, "all")
    epochs: float | None = option(None, "n", above=0, replaces="steps", extends=True)
    steps: int | None = option(None, "n", least=1, replaces="epochs", extends=True)

    def check(self):
        if self.full and self.way == "down":
            raise jlora.OptionError("--full goes up")


def settings(*words):
    return read_settings(Settings, words)


def test_options_have_the_types_of_their_fields():
    got = settings(
        *[
            "--rank",
            "4",
            "--dropout",
            "0.5",
            "--lr",
            "1e-3",
            "--full",
            "--splits",
            "x",
            "y",
            "--steps",
            "9",
        ]
    )
    assert got == Settings(
        rank=4, dropout=0.5, lr=1e-3, full=True, splits=["x", "y"], steps=9
    )
    assert settings() == Settings()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 0", "invalid value for --rank: '0' is not a whole number at least 1"),
        ("--rank 2.5", "'2.5' is not a whole number at least 1"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--lr inf", "'inf' is not a number above 0"),
        ("--dropout 1", "'1' is not a number at least 0 and below 1"),
        ("--way left", 'invalid value "left" for --way. Choose from: "up", "down"'),
        ("--splits x", "--splits requires at least 2 elements"),
        ("--steps 1 --epochs 1", "--steps and --epochs exclude each other"),
        ("--full --way down", "--full goes up"),
        ("--unknown", "unknown option: --unknown"),
        ("--resume", "--resume needs --output"),
        ("--resume --output x --overwrite", "excludes --overwrite"),
        ("--resume --output nowhere", "nowhere holds no run to resume"),
    ],
)
def test_bad_options(words, message):
    refuses(message, settings, *words.split())


def test_what_exists_is_kept_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.de").write_text("x")
    got = settings("--files", "a.de", "b.de", "--model", "google/flan-t5-small")
    assert got.files == [str((tmp_path / "a.de").resolve()), "b.de"]
    assert got.model == "google/flan-t5-small"


def test_resuming_takes_what_the_run_had(tmp_path):
    place = str(tmp_path / "run")
    with settings("--rank", "4", "--epochs", "2", "--output", place).claim("x") as run:
        run.state.mkdir()
    resume = ["--output", place, "--resume"]
    again = settings(*resume)
    assert (again.rank, again.epochs, again.resume) == (4, 2.0, True)
    assert settings(*resume, "--rank", "4").rank == 4
    refuses("has --rank 4, not 8", settings, *resume, "--rank", "8")
    refuses("has --lr as it is by default, not 1.0", settings, *resume, "--lr", "1")
    longer = settings(*resume, "--steps", "250")
    assert (longer.steps, longer.epochs) == (250, None)
    with longer.claim("x") as run:
        assert run.resumed
        run.save_settings()
    assert settings(*resume).steps == 250
    saved = {**run.settings, "colour": "red"}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(saved))
    refuses("settings unknown here: colour", settings, *resume)


def test_a_script_says_what_went_wrong(capsys):
    def fails(error):
        def run(settings):
            raise error

        return command_line(Settings, run, [])

    assert command_line(Settings, lambda settings: None, []) == 0
    assert fails(jlora.DataError("line 3")) == 2
    assert capsys.readouterr().err == "error: line 3\n"
    assert fails(OSError(28, "No space left on device", "runs/x")) == 2
    assert "No space left on device: 'runs/x'" in capsys.readouterr().err
    assert fails(jlora.train.Interrupted("step 3 of 9")) == 130
    assert "Stopped and saved after step 3 of 9" in capsys.readouterr().out
    assert fails(KeyboardInterrupt()) == 130
    assert command_line(Settings, lambda s: None, ["--help"], "About it.") == 0
    text = capsys.readouterr().out
    assert text.index("About it.") < text.index("model:") < text.index("run:")
    assert "--splits A B" in text
    inside = text[text.index("training:") : text.index("run:")]
    assert "--rank N " in inside
    assert "--full " in inside
    assert "--overwrite" not in inside
    assert "--files" not in inside


@pytest.mark.filterwarnings("default::jlora.JloraWarning")
def test_a_script_says_its_warnings(capsys):
    def warns(settings):
        warnings.warn("3 pairs left out", jlora.JloraWarning, stacklevel=1)

    assert command_line(Settings, warns, []) == 0
    assert capsys.readouterr().err == "warning: 3 pairs left out\n"
