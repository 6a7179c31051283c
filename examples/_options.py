"""The options of flan_t5_translate.py, and the folder that a run writes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from _data import direction

from jlora import DataError

SETTINGS = "settings.json"  # its presence marks a folder as a run
ADAPTER = "adapter"  # the best one, by validation loss
STATE = "state"  # what resuming needs
MERGED = "merged"  # a Hugging Face folder
METRICS = "metrics.jsonl"
PLOT = "loss.png"
REPORT = "report.md"
WRITTEN = (ADAPTER, STATE, MERGED, METRICS, PLOT, REPORT, SETTINGS)
RUNS = Path("runs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for; the parser's help says what each means."""

    model: str | None
    dataset: str | None
    config: str | None
    splits: list[str]
    train: list[str] | None
    valid: list[str] | None
    test: list[str] | None
    direction: str
    train_size: int | None
    valid_size: int
    test_size: int
    skip_empty: bool
    max_source_length: int
    max_target_length: int
    rank: int
    alpha: float | None
    targets: list[str]
    dropout: float
    full: bool
    batch_size: int
    accumulate: int
    epochs: float | None
    steps: int | None
    lr: float | None
    schedule: str
    warmup: int
    weight_decay: float
    clip: float
    precision: str
    buckets: int
    eval_every: int | None
    eval_batch_size: int
    beams: int
    seed: int
    output: str | None
    resume: bool
    overwrite: bool

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        assert self.output is not None, "filled in by read_settings"
        return Path(self.output)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate; adapters stand a higher one than whole kernels."""
        return self.lr if self.lr is not None else 1e-3 if self.full else 3e-3


class Parser(argparse.ArgumentParser):
    """A parser that raises what the rest of the script raises."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise DataError(f"{message}.\nSee --help.")


def _number(kind: type, least: float, open_: bool = False) -> Callable[[str], Any]:
    """A parser of numbers that are at least so large, or larger."""

    def parse(text: str) -> Any:
        name = "a whole number" if kind is int else "a number"
        bound = f"{'above' if open_ else 'at least'} {least:g}"
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        enough = value > least if open_ else value >= least
        if not (enough and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bound}")
        return value

    return parse


COUNT = _number(int, 1)
NATURAL = _number(int, 0)
POSITIVE = _number(float, 0, open_=True)
AMOUNT = _number(float, 0)


def parser(description: str) -> Parser:
    """Return the parser of the command line."""
    p = Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument_group("model and data").add_argument
    add("--model", metavar="DIR|NAME", help="folder or hub name (embedded tiny T5)")
    add("--dataset", metavar="DIR|NAME", help="dataset: folder or hub name")
    add("--config", help="the dataset's configuration, such as de-en")
    add(
        "--splits",
        nargs=3,
        default=["train", "validation", "test"],
        metavar=("TRAIN", "VALID", "TEST"),
        help="the dataset's splits (train validation test)",
    )
    for name in ("train", "valid", "test"):
        add(
            f"--{name}",
            nargs="+",
            metavar="FILE",
            help="FILE.de FILE.en (or .gz), or one table: parquet, jsonl, csv, tsv",
        )
    add("--direction", default="de-en", help="de-en or en-de (%(default)s)")
    add("--train-size", type=COUNT, help="train on so many pairs (all)")
    add("--valid-size", type=COUNT, default=500, help="pairs for the loss (500)")
    add("--test-size", type=COUNT, default=500, help="pairs for BLEU, the first (500)")
    add(
        "--skip-empty",
        action="store_true",
        help="leave out pairs with an empty side (--dataset always does)",
    )
    add("--max-source-length", type=COUNT, default=128, help="tokens (128)")
    add("--max-target-length", type=COUNT, default=128, help="tokens (128)")

    add = p.add_argument_group("adapter").add_argument
    add("--rank", type=COUNT, default=8, help="r (8)")
    add("--alpha", type=POSITIVE, help="the scale is alpha/r (2r)")
    add(
        "--targets",
        nargs="+",
        default=["query", "value"],
        help="names of layers, or all-linear (query value)",
    )
    add("--dropout", type=AMOUNT, default=0.0, help="of the adapters' inputs (0)")
    add("--full", action="store_true", help="train every weight, for comparison")

    add = p.add_argument_group("training").add_argument
    add("--batch-size", type=COUNT, default=32, help="pairs a step (32)")
    add("--accumulate", type=COUNT, default=1, help="parts a batch is cut into (1)")
    add("--epochs", type=POSITIVE, help="passes over the training pairs (3)")
    add("--steps", type=COUNT, help="optimiser steps, instead of --epochs")
    add("--lr", type=POSITIVE, help="peak learning rate (3e-3; 1e-3 with --full)")
    add(
        "--schedule",
        choices=("cosine", "linear", "constant"),
        default="cosine",
        help="how the rate falls to 0 after the warm-up (cosine)",
    )
    add("--warmup", type=NATURAL, default=20, help="steps of warm-up (20)")
    add("--weight-decay", type=AMOUNT, default=0.0, help="AdamW's (0)")
    add("--clip", type=AMOUNT, default=1.0, help="gradient norm; 0 is off (1)")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the model computes in; adapters stay float32 (float32)",
    )
    add("--buckets", type=COUNT, default=3, help="shapes of batches; more pad less (3)")
    add("--seed", type=NATURAL, default=0, help="adapters, data order, dropout (0)")

    add = p.add_argument_group("evaluation").add_argument
    add("--eval-every", type=COUNT, help="steps between validations (an epoch)")
    add("--eval-batch-size", type=COUNT, default=64, help="(64)")
    add("--beams", type=COUNT, default=1, help="1 is greedy (1)")

    add = p.add_argument_group("run").add_argument
    add("--output", metavar="DIR", help=f"(the first free {RUNS}/translate-N)")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--overwrite", action="store_true", help="replace the run in --output")
    return p  # fmt: skip


def read_settings(argv: Sequence[str], description: str) -> Settings:
    """Parse the command line; with --resume, take what is not given from the run.

    Raises:
      DataError: options that are wrong, exclude each other, or differ from the run's;
        a folder with another run, or none to resume.
    """
    p = parser(description)
    settings = _resolved(Settings(**vars(p.parse_args(argv))))
    if settings.resume:
        saved = _saved(settings)
        p.set_defaults(**saved)
        settings = _resolved(Settings(**vars(p.parse_args(argv))))
        _check_same(settings, saved)
    _check(settings)
    if settings.output is None:
        settings = dataclasses.replace(settings, output=str(_free_folder()))
    return settings


def _resolved(s: Settings) -> Settings:
    """Make paths absolute, so that a run can be resumed from any folder."""

    def one(name: str | None) -> str | None:
        # What exists nowhere here may be a name on the hub.
        path = Path(name).expanduser() if name is not None else None
        return str(path.resolve()) if path is not None and path.exists() else name

    files = {
        name: None if paths is None else [one(path) for path in paths]
        for name, paths in (("train", s.train), ("valid", s.valid), ("test", s.test))
    }
    changes: dict[str, Any] = {
        **files,
        "model": one(s.model),
        "dataset": one(s.dataset),
    }
    return dataclasses.replace(s, **changes)


def _saved(settings: Settings) -> dict[str, Any]:
    if settings.output is None or settings.overwrite:
        raise DataError("--resume needs --output DIR, and excludes --overwrite.")
    file = settings.folder / SETTINGS
    if not file.is_file():
        raise DataError(
            f"{settings.folder} holds no run to resume ({SETTINGS} is missing).\n"
            "Start one without --resume."
        )
    if not (settings.folder / STATE).is_dir():
        raise DataError(
            f"the run in {settings.folder} stopped before its first step; nothing was "
            "saved yet.\nStart it again with --overwrite."
        )
    return json.loads(file.read_text())


def _check_same(settings: Settings, saved: dict[str, Any]) -> None:
    now = dataclasses.asdict(settings)
    for name, before in saved.items():
        if now.get(name) != before:
            option = f"--{name.replace('_', '-')}"
            raise DataError(
                f"the run in {settings.folder} has {option} {before}, not "
                f"{now.get(name)}.\nResume with --output and --resume alone, or start "
                "a new run in another folder."
            )


def _check(s: Settings) -> None:
    """Refuse options that do not go together."""
    direction(s.direction)
    if s.dropout >= 1:
        raise DataError(f"--dropout {s.dropout:g}: it is a probability, below 1.")
    if s.steps is not None and s.epochs is not None:
        raise DataError("--steps and --epochs exclude each other.")
    if s.dataset is not None and (s.train or s.valid or s.test):
        raise DataError("--dataset brings its own splits; leave --train etc. out.")
    if s.config is not None and s.dataset is None:
        raise DataError("--config belongs to a --dataset.")
    if s.train is None and (s.valid or s.test):
        raise DataError("--valid and --test need --train.")
    if s.model is not None and s.train is None and s.dataset is None:
        raise DataError("--model needs data: --train FILE.de FILE.en, or --dataset.")
    if s.batch_size % s.accumulate:
        raise DataError(
            f"--batch-size {s.batch_size} does not fall into --accumulate "
            f"{s.accumulate} equal parts."
        )


def _free_folder() -> Path:
    names = (RUNS / f"translate-{n}" for n in itertools.count(1))
    return next(path for path in names if not path.exists())


def claim_folder(settings: Settings) -> None:
    """Make the output folder and write the settings into it.

    Raises:
      DataError: it holds another run, or something else.
    """
    folder = settings.folder
    if settings.resume:
        return
    if (folder / SETTINGS).exists():
        if not settings.overwrite:
            raise DataError(
                f"{folder} holds another run.\nContinue it with --resume, replace it "
                "with --overwrite, or choose another --output."
            )
        _clear(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is no run; choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    kept = dataclasses.asdict(settings)
    for name in ("resume", "overwrite", "output"):
        del kept[name]
    (folder / SETTINGS).write_text(json.dumps(kept, indent=2) + "\n")


def _clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def resume_command(settings: Settings) -> str:
    """Return the command that continues the run."""
    words = ["python", sys.argv[0], "--output", str(settings.folder), "--resume"]
    return shlex.join(words)
