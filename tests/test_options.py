"""Options from command lines and files: what is given, what is refused, what help says."""

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jlora._options import (
    UsageError,
    option,
    options_of,
    read_file,
    read_toml,
    read_words,
    template,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    output: str | None = option(None, "where to write", group="run", metavar="DIR")
    resume: bool = option(False, "go on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixin(Base):
    rank: int = option(8, "r", least=1, group="training")
    lr: float | None = option(None, "rate", above=0)
    ranks: list[int] = option([8], "several", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Mixin):
    files: list[str] | None = option(None, "files", group="data", metavar="FILE")
    splits: list[str] = option(["a", "b"], "two", count=2, metavar=("A", "B"))
    way: str = option("up", "way", choices=("up", "down"))
    kind: str | None = option(
        None, "kind", choices=("encoder", "decoder", "both of it")
    )
    full: bool = option(True, "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Base):
    source: Path = option(about="what to read", metavar="SOURCE", positional=True)
    texts: list[str] = option([], "texts", metavar="TEXT", positional=True)
    rank: int = option(8, "r", least=1)


def given(words, kind=Settings):
    return read_words(kind, words.split(), program="prog")


def test_only_what_is_given_is_returned_in_its_order():
    words = "--ranks 3 5 --no-full --lr=1e-3 --files a b --splits x y"
    found = given(words)
    assert found == {
        "ranks": [3, 5], "full": False, "lr": 1e-3, "files": ["a", "b"],
        "splits": ["x", "y"],
    }  # fmt: skip
    assert list(found) == ["ranks", "lr", "files", "splits", "full"]
    assert given("") == {}


def test_positional_words():
    found = given("here a b --rank 3", Command)
    assert found == {"source": Path("here"), "texts": ["a", "b"], "rank": 3}
    assert given("--rank 3 here", Command) == {"source": Path("here"), "rank": 3}
    with pytest.raises(UsageError, match="SOURCE is missing"):
        given("--rank 3", Command)
    with pytest.raises(UsageError, match="'gs://x' is not a local path"):
        given("gs://x", Command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rnk 3", "unknown option: --rnk. Did you mean --rank?\nSee prog --help."),
        ("--rank 2.5", "'2.5' is not a whole number at least 1"),
        ("--ranks 2 0", "'0' is not a whole number at least 1"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--splits x y z", "--splits accepts at most 2 elements"),
        ("--files", "--files requires at least 1 element"),
        ("--rank", "--rank requires an argument"),
        ("--rank 1 --rank 2", "--rank specified multiple times"),
        ("--way left", 'invalid value "left" for --way. Choose from: "up", "down"'),
        ("word", "nothing takes the word 'word'"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(UsageError) as error:
        given(words)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_a_files_settings_are_checked_like_words():
    file = {"rank": 3, "ranks": [2, 3], "full": False, "lr": 1, "way": "down"}
    assert read_file(Settings, file, "c.toml") == file
    assert type(read_file(Settings, {"lr": 1}, "c.toml")["lr"]) is float
    assert read_file(Mixin, {"rank": 3}, "c.toml") == {"rank": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 3}, "c.toml: 'rnak' is no setting.\nDid you mean 'rank'?"),
        ({"zzz": 3}, "c.toml: 'zzz' is no setting.\nRemove it."),
        ({"rank": 2.5}, "c.toml: invalid value for rank: '2.5' is not a whole number"),
        ({"rank": True}, "'True' is not a whole number"),
        ({"rank": [1]}, "c.toml: invalid value for rank"),
        ({"lr": float("inf")}, "'inf' is not a number above 0"),
        ({"full": 3}, "c.toml: invalid value for full"),
        ({"way": "left"}, 'c.toml: invalid value "left" for way. Choose from: "up"'),
        ({"splits": ["x"]}, "c.toml: splits takes 2 values, not 1"),
        ({"files": []}, "c.toml: files takes at least 1 values, not 0"),
        ({"rank": {"x": 1}}, "c.toml: 'rank' is a table"),
    ],
)
def test_wrong_settings_of_a_file(values, message):
    with pytest.raises(UsageError) as error:
        read_file(Settings, values, "c.toml")
    assert message in str(error.value)


def test_files_that_are_no_toml(tmp_path):
    (tmp_path / "c.toml").write_text("rank = = 3")
    with pytest.raises(UsageError, match=r"c.toml is no TOML: .*line 1"):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")


def test_a_template_has_every_default_and_reads_back():
    text = template(Settings, 'task = "x"', leave_out=frozenset({"resume"}))
    values = tomllib.loads(text)
    assert values.pop("task") == "x"
    found = read_file(Settings, values, "t.toml")
    assert Settings(**found) == Settings()
    wanted = {
        n: o.default for n, o in options_of(Settings).items() if o.default is not None
    }
    assert found == {n: v for n, v in wanted.items() if n != "resume"}
    for line in ("# lr = 1.0  # rate", '# files = ["..."]  # files', "\n# training\n"):
        assert line in text
    # What is commented out is of the right kind too.
    uncommented = tomllib.loads(
        "\n".join(x.removeprefix("# ") for x in text.splitlines() if " = " in x)
    )
    del uncommented["task"]
    assert uncommented.keys() == options_of(Settings).keys() - {"resume"}
    read_file(Settings, uncommented, "t.toml")


def test_help_is_in_groups_own_options_first(capsys):
    with pytest.raises(SystemExit) as stop:
        read_words(
            Settings, ["--help"], program="prog", about="About.\n\nSo:\n\n  An example."
        )
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: prog [OPTIONS]\n\nAbout.\n\nSo:\n\n  An example.\n")
    places = [
        text.index(f"\n{name}:\n") for name in ("data", "training", "run", "more")
    ]
    assert places == sorted(places)
    for line in (
        "--files FILE...", "--splits A B", "--way up|down", "--rank N ", "--full ",
        "kind; one of encoder, decoder, both of it",
    ):  # fmt: skip
        assert line in text
    assert max(map(len, text.splitlines())) <= 80


def test_an_option_with_another_default_stays_in_its_group():
    @dataclasses.dataclass(kw_only=True)
    class Base:
        size: int = option(3, "how large (3)", group="training")
        parts: int = option(1, "how many (1)")

    @dataclasses.dataclass(kw_only=True)
    class Own(Base):
        size: int = option(5, "how large (5)", group="training")
        word: str = option("a", "a word (a)", group="own")

    lines = template(Own).splitlines()
    assert [line.partition("  #")[0] for line in lines if line] == [
        "# own", 'word = "a"', "# training", "size = 5", "parts = 1",
    ]  # fmt: skip


def test_the_lines_of_a_scripts_header_stay_as_they_are(capsys):
    line = "    python script.py --with " + "long " * 12 + "words"
    with pytest.raises(SystemExit):
        read_words(Settings, ["--help"], about=f"About.\n\nSo:\n\n{line}")
    assert line in capsys.readouterr().out.splitlines()


def test_help_of_the_console_imports_no_jax():
    code = (
        "import sys; from jlora import cli; cli.main(['--help']); "
        "cli.main(['train', '--help']); "
        "sys.exit(bool({'jax', 'optax', 'orbax', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
