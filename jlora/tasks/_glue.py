"""The tasks of GLUE: their sentences, their classes, and how their files are laid out.

Source: Wang et al. 2018, arXiv:1804.07461; the TSV files of gluebenchmark.com, and
`nyu-mll/glue` of the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jlora import data
from jlora._errors import DataError
from jlora.tasks._examples import Examples, join, read_examples

HUB = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """A task of GLUE.

    Attributes:
      text: the columns of its one or two texts on the hub, where the label is `label`.
      classes: their names, in the order of their numbers; none for STS-B, whose labels
        are numbers from 0 to 5.
      tsv: the columns of texts and label in GLUE's own files, as their heads say.
      bare: all columns of the files without a head that the task is known by besides.
    """

    text: tuple[str, ...]
    classes: tuple[str, ...]
    tsv: tuple[str, ...]
    bare: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """How many outputs a model has for it."""
        return len(self.classes) or 1


_BOTH = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
#: The eight tasks of the LoRA paper, by the names that `jlora.metrics.GLUE_TASKS` has.
GLUE: Mapping[str, GlueTask] = MappingProxyType(
    {
        "cola": GlueTask(
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("sentence", "label"),
            ("source", "label", "star", "sentence"),
        ),
        "sst2": GlueTask(
            ("sentence",),
            ("negative", "positive"),
            ("sentence", "label"),
            ("sentence", "label"),
        ),
        "mrpc": GlueTask(
            _BOTH,
            ("not_equivalent", "equivalent"),
            ("#1 String", "#2 String", "Quality"),
        ),
        "qqp": GlueTask(
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("question1", "question2", "is_duplicate"),
        ),
        "stsb": GlueTask(_BOTH, (), (*_BOTH, "score"), (*_BOTH, "score")),
        "mnli": GlueTask(
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            (*_BOTH, "gold_label"),
        ),
        "qnli": GlueTask(
            ("question", "sentence"), _ENTAILED, ("question", "sentence", "label")
        ),
        "rte": GlueTask(_BOTH, _ENTAILED, (*_BOTH, "label")),
    }
)
# What the names of a split's files begin with. The labels of GLUE's own tests were
# never published: a model is tested on what GLUE calls its development set.
_STEMS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "in_domain_train"),
    "test": ("dev", "validation", "in_domain_dev"),
}
_HALVES = ("mismatched", "matched")  # MNLI's two tests


def glue_examples(
    task: str, split: str, folder: str | Path | None = None
) -> dict[str, Examples]:
    """Return a split of a task of GLUE.

    Args:
      task: one of `GLUE`.
      split: `"train"`, or `"test"`: GLUE's development set, since it keeps the labels
        of its tests to itself.
      folder: holds a folder for each task, `sst2` or `SST-2` say, with GLUE's own
        TSV files, the hub's Parquet, or tables with the same columns; None takes the
        hub's `nyu-mll/glue`.

    Returns:
      The examples by the split's name; of MNLI's two test halves each by its own.

    Raises:
      DataError: no such files, or others than the task's.
    """
    known = GLUE[task]
    if folder is None:
        return _of_the_hub(task, split)
    place = _folder_of(task, Path(folder).expanduser())
    files = _files(place, split)
    found: dict[str, list[Examples]] = {}
    for file in files:
        half = next((half for half in _HALVES if half in file.name), split)
        found.setdefault(half, []).append(_read(file, known))
    return {name: join(parts) for name, parts in found.items()}


def _of_the_hub(task: str, split: str) -> dict[str, Examples]:
    known, parts = GLUE[task], {split: "validation" if split == "test" else split}
    if task == "mnli" and split == "test":
        parts = {half: f"validation_{half}" for half in reversed(_HALVES)}
    return {
        name: join(
            [
                read_examples(table, known.text, "label", known.classes)
                for table in data.read_dataset(HUB, task, part)
            ]
        )
        for name, part in parts.items()
    }


def _folder_of(task: str, folder: Path) -> Path:
    """Return the task's own folder, however its name is spelled."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of GLUE's tasks.")
    named = sorted(path for path in folder.iterdir() if path.is_dir())
    for path in named:
        if path.name.lower().replace("-", "").replace("_", "") == task:
            return path
    names = ", ".join(path.name for path in named) or "no folder at all"
    raise DataError(
        f"{folder} holds no folder of the task {task}; it holds {names}.\nEach task "
        f"has its own, {task} say, with train.tsv and dev.tsv."
    )


def _files(folder: Path, split: str) -> Sequence[Path]:
    tables = sorted(p for p in folder.iterdir() if p.is_file() and data.is_table(p))
    for stem in _STEMS[split]:
        found = [p for p in tables if p.name.startswith(stem)]
        if found:
            return found
    names = ", ".join(p.name for p in tables) or "no table"
    raise DataError(
        f"{folder} holds {names}, and nothing to {split} with.\nThe names of its "
        f"files begin with {' or '.join(_STEMS[split])}."
    )


def _read(file: Path, task: GlueTask) -> Examples:
    """Read one file, with the hub's columns, GLUE's own, or none that are named."""
    table = _with_head(file, task)
    for columns in ((*task.text, "label"), task.tsv):
        if {*columns} <= {*table.columns}:
            *text, label = columns
            return read_examples(table, text, label, task.classes)
    wanted = " or ".join(", ".join(c) for c in dict.fromkeys(
        [(*task.text, "label"), task.tsv, task.bare]) if c)  # fmt: skip
    raise DataError(
        f"{table.name} has the columns {', '.join(table.columns)}.\nThe task needs "
        f"{wanted}."
    )


def _with_head(file: Path, task: GlueTask) -> data.Table:
    """Return a table whose columns have names; some files of the tasks have no head."""
    if not task.bare or not {".tsv", ".csv"} & {*file.suffixes}:
        return data.read_table(file)
    table = data.read_table(file, columns="numbered")
    first = {table.text(column)[0] for column in table.columns} if len(table) else {}
    has_head = any({*c} <= {*first} for c in ((*task.text, "label"), task.tsv))
    if has_head or len(table.columns) != len(task.bare):
        return data.read_table(file)
    return data.read_table(file, columns=task.bare)
