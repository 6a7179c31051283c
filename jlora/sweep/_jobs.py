"""What a sweep trains: jobs, one by one, as a grid, or from a file."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jlora._errors import DataError, LoraError, OptionError
from jlora._files import PathLike, local_path
from jlora._text import listed
from jlora._tree import options
from jlora._tree.initializers import Initializer
from jlora._tree.lorafy import lorafy

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One adapter to be trained: what it has of its own.

    Attributes:
      name: its name, one of its own in a sweep.
      rank: as of `jlora.lorafy`, as are alpha, dropout, init and rslora.
      alpha: None means alpha = rank.
      dropout: probability of dropping an input of the adapters.
      init: how factors start; the base has to stay as it is.
      rslora: scale by alpha/sqrt(r).
      seed: of the factors and of all that is random in training.
      learning_rate: for the optimiser.
      weight_decay: for the optimiser.
      hyper: more numbers for the optimiser, by name.
      steps: how many updates; None is what the sweep says.
      data: what the sweep's `batches` function makes a stream of, a path say; or,
        without such a function, the stream itself.
    """

    name: str
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str | Initializer = "default"
    rslora: bool = False
    seed: int = 0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    hyper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    data: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise OptionError(f"name={self.name!r}: expected a text, one of its own.")
        with _named(self.name):
            options.whole_rank(self.rank)
            options.probability(self.dropout)
            options.flags(rslora=self.rslora)
            if self.alpha is not None:
                options.positive_alpha(self.alpha)
            _check_whole("seed", self.seed, 0)
            if self.steps is not None:
                _check_whole("steps", self.steps, 1)
            if not isinstance(self.hyper, Mapping):
                raise OptionError(f"hyper={self.hyper!r}: expected numbers by name.")
            for name, value in hyper_of(self).items():
                if not _is_real(value) or not math.isfinite(value):
                    raise OptionError(f"{name}={value!r}: expected a finite number.")

    @property
    def key(self) -> jax.Array:
        """The PRNG key of the factors and of the run."""
        return jax.random.key(self.seed)

    def lorafy(self, params: Tree, **shared: Any) -> Tree:
        """The tree that this job trains, at its own rank.

        Args:
          params: the base.
          **shared: more arguments of `jlora.lorafy`, those that all jobs share.
        """
        with _named(self.name):
            return lorafy(
                params, rank=self.rank, alpha=self.alpha, key=self.key,
                dropout=self.dropout, init=self.init, rslora=self.rslora, **shared,
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold of it: fields that are not as they would be anyway.

        Functions are told by their names, and data by what it is if it is no text.
        """
        told = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or value != _default(field):
                plain = isinstance(value, str | int | float | bool | Mapping)
                told[field.name] = value if plain else _brief(value)
        return told


FIELDS = tuple(field.name for field in dataclasses.fields(Job))
ADAPTER_FIELDS = ("rank", "alpha", "dropout", "init", "rslora")


def hyper_of(job: Job) -> dict[str, float]:
    """The numbers that a job's optimiser is made with."""
    own = {"learning_rate": job.learning_rate, "weight_decay": job.weight_decay}
    twice = sorted(own.keys() & job.hyper.keys())
    if twice:
        raise OptionError(f"hyper has {twice}, which are fields of a Job themselves.")
    return {**own, **job.hyper}


class Hyper:
    """An optimiser's numbers, as attributes: floats, or traced scalars in a bank."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._values:
            raise OptionError(
                f"the optimiser asks for hp.{name}, and the jobs have "
                f"{sorted(self._values)}.\nGive it to every job: "
                f"Job(..., hyper={{{name!r}: ...}})."
            )
        return self._values[name]


# -- many ------------------------------------------------------------------------------


def grid(**values: Any) -> list[Job]:
    """Every combination of the values, one job each.

    A list (or tuple) is a choice; anything else is the same for all jobs. Names say
    the choices.

    Args:
      **values: by field of `Job`, or by name of a further number for the optimiser.

    Raises:
      OptionError: an unknown field, an empty list, nothing to choose from.

    >>> [job.name for job in grid(rank=[1, 4], learning_rate=[1e-3, 1e-2], seed=3)][:2]
    ['rank=1,learning_rate=0.001', 'rank=1,learning_rate=0.01']
    """
    choices, rest = _choices("grid", values)
    names = list(choices)
    products = itertools.product(*choices.values())
    return [_job(dict(zip(names, x, strict=True)), rest) for x in products]


def paired(**values: Any) -> list[Job]:
    """A job for each place in the lists, which are equally long.

    Args:
      **values: as for `grid`; a list of `name` names the jobs.

    Raises:
      OptionError: lists of unlike length, or as for `grid`.

    >>> [job.rank for job in paired(rank=[1, 4], learning_rate=[1e-3, 1e-2])]
    [1, 4]
    """
    choices, rest = _choices("paired", values)
    lengths = {name: len(x) for name, x in choices.items()}
    if len(set(lengths.values())) > 1:
        raise OptionError(
            f"jlora.sweep.paired: lists of unlike length, {lengths}.\nGive each a "
            "value for every job; a single value, no list, is the same for all."
        )
    names = list(choices)
    rows = zip(*choices.values(), strict=True)
    return [_job(dict(zip(names, x, strict=True)), rest) for x in rows]


def _choices(function: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    options.refuse_unknown(f"jlora.sweep.{function}", values, FIELDS)
    many = {n: list(x) for n, x in values.items() if isinstance(x, list | tuple)}
    if not many or not all(many.values()):
        raise OptionError(
            f"jlora.sweep.{function}: there is nothing to choose from in "
            f"{dict(values)}.\nGive lists: rank=[1, 4, 16], learning_rate=[1e-3, 1e-2]."
        )
    return many, {n: x for n, x in values.items() if n not in many}


def _job(own: Mapping[str, Any], rest: Mapping[str, Any]) -> Job:
    name = ",".join(f"{n}={_brief(x)}" for n, x in own.items() if n != "name")
    name = "/".join(filter(None, (rest.get("name"), name)))
    return Job(**{**rest, "name": name, **own})


def read_jobs(path: PathLike) -> list[Job]:
    """Read a queue of jobs, one JSON object a line (JSONL).

    Args:
      path: the file; empty lines are passed over.

    Raises:
      DataError: no such file, or a line that is no job; it says which.
    """
    place = local_path(path)
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"the jobs {str(place)!r} cannot be read: {error}.") from error
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise OptionError(f"expected {{...}}, found {line.strip()[:40]}")
            jobs.append(job_of(fields))
        except (ValueError, TypeError) as error:
            raise DataError(f"{place}, line {number}: {error}") from error
    if not jobs:
        raise DataError(f"{place} holds no jobs.")
    return jobs


def job_of(fields: Mapping[str, Any]) -> Job:
    """A job of its fields by name.

    Raises:
      OptionError: a field that a job has not, or none called `name`.
    """
    options.refuse_unknown("a job", fields, FIELDS)
    if "name" not in fields:
        raise OptionError(f"a job without a name: {dict(fields)}.")
    return Job(**fields)


def check_jobs(jobs: Iterable[Job]) -> list[Job]:
    """The jobs, each with a name and the same numbers for the optimiser.

    Raises:
      OptionError: none, something else among them, a name twice, or unlike numbers.
    """
    found: Sequence[Any] = list(jobs)
    strange = [x for x in found if not isinstance(x, Job)]
    if strange or not found:
        what = type(strange[0]).__name__ if strange else "none"
        raise OptionError(f"jobs: expected a list of jlora.sweep.Job, found {what}.")
    counts = collections.Counter(job.name for job in found)
    twice = [f"{name!r}: {n} times" for name, n in counts.items() if n > 1]
    if twice:
        raise OptionError(f"jobs of one name:\n  {listed(twice)}\nName each its own.")
    for job in found:
        if job.hyper.keys() != found[0].hyper.keys():
            raise OptionError(
                f"the job {job.name!r} has hyper {sorted(job.hyper)}, and "
                f"{found[0].name!r} {sorted(found[0].hyper)}.\nOne optimiser is made "
                "for all: give each the same names."
            )
    return list(found)


# -- words -----------------------------------------------------------------------------


class _named:  # noqa: N801 - read as a word
    """Says which job an error is of."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LoraError):
            raise type(error)(f"the job {self.name!r}: {error}") from error


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _check_whole(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise OptionError(f"{name}={value!r}: expected a whole number from {least} on.")


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _brief(value: Any) -> str:
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    plain = isinstance(value, str | int | float | bool | type(None))
    return str(value) if plain else type(value).__name__
