"""Runs over a table of settings: together in one compiled step where that can be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optax

import jlora
from jlora import checkpoint, data, models, optim, sweep, tasks, train
from jlora._errors import NonFiniteError, OptionError
from jlora.train._command import TASK

# What runs in one step may differ in; runs that differ in more are steps of their own.
TOGETHER = frozenset({"rank", "alpha", "lr", "weight_decay"})
# Bases that a whole bank cannot share.
_SHIFTING = ("pissa", "olora")
_OWN = {field.name for kind in (tasks.AdapterOptions, tasks.TrainingOptions)
        for field in dataclasses.fields(kind)}  # fmt: skip
ALLOWED = frozenset(_OWN) - {
    *("output", "resume", "overwrite", "log_to", "eval_every", "eval_batch_size"),
    # Of the model, which is loaded once, and of where it lies.
    *("quantize", "precision", "mesh", "layout", "uneven"),
}

Values = Mapping[str, Any]


class Row(NamedTuple):
    """One run.

    Attributes:
      name: its name, and its folder's.
      values: the settings that it has of its own.
      loss: the validation loss after its last step; None if it diverged.
      steps: updates made.
      seconds: its share of the time.
      together: how many runs shared its step.
    """

    name: str
    values: Values
    loss: float | None
    steps: int
    seconds: float
    together: int


@dataclasses.dataclass(frozen=True)
class Member:
    """One combination: its name, what it changes, and the settings that makes."""

    name: str
    values: Values
    settings: Any

    @property
    def alone(self) -> str | None:
        """Why it cannot share a step; None if it can."""
        s = self.settings
        if s.full:
            return "every weight is trained"
        if s.quantize:
            return "its base is quantised"
        return "its start shifts the base" if s.init in _SHIFTING else None


def members_of(settings: Any, table: Mapping[str, Sequence[Any]]) -> list[Member]:
    """Return every combination of a table's values.

    Raises:
      OptionError: settings that do not go together.
    """
    found = []
    for values in itertools.product(*table.values()):
        own = dict(zip(table, values, strict=True))
        name = ",".join(f"{key}={_word(value)}" for key, value in own.items())
        if "steps" in own:
            own["epochs"] = None
        changed = dataclasses.replace(settings, **own)
        try:
            changed.check()
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None
        found.append(Member(name, own, changed))
    return found


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def groups_of(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members that share a step, and those that stand alone."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        shared = {k: v for k, v in member.values.items() if k not in TOGETHER}
        own = member.name if member.alone else ""
        found.setdefault((own, json.dumps(shared, sort_keys=True)), []).append(member)
    return list(found.values())


def run(task: str, settings: Any, table: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Train every combination, and keep the best adapter as a run.

    Returns:
      The runs, the best first.

    Raises:
      LoraError: settings or data that are not in order.
      Interrupted: the sweep was asked to stop.
      NonFiniteError: no run came to a finite loss.
    """
    settings.check_alone("a sweep")
    kind, members = tasks.KINDS[task], members_of(settings, table)
    loaded = settings.load(settings.model)
    kept = {TASK: task, **dataclasses.asdict(settings)}
    rows: list[Row] = []
    best: tuple[float, Any, Member] | None = None
    with train.RunFolder.claim(
        settings.output, kept, name="sweep", overwrite=settings.overwrite
    ) as folder:
        for group in groups_of(members):
            made = _together if group[0].alone is None else _alone
            for row, tree, member in made(kind, loaded, group, folder):
                rows.append(row)
                if row.loss is not None and (best is None or row.loss < best[0]):
                    best = row.loss, tree, member
        if best is None:
            raise NonFiniteError("no run ended with a finite loss.\nTry lower rates.")
        checkpoint.save_adapter(folder.adapter, best[1])
        models.save(loaded.model, jlora.merge(best[1]), folder.merged)
        loaded.tokenizer.save_pretrained(folder.merged)
        folder.settings = {TASK: task, **dataclasses.asdict(best[2].settings)}
        folder.save_settings()
        rows.sort(key=lambda row: (row.loss is None, row.loss))
        out = json.dumps([row._asdict() for row in rows], indent=2)
        (folder.path / "results.json").write_text(out + "\n", encoding="utf-8")
        print(
            f"{folder.path}: the best adapter and model, and results.json",
            file=sys.stderr,
        )
    return rows


Made = Iterator[tuple[Row, Any, Member]]


def _together(kind: Any, loaded: Any, group: list[Member], folder: Any) -> Made:
    """Train a group in one compiled step."""
    began, s = time.perf_counter(), dataclasses.replace(group[0].settings, buckets=1)
    task = kind.make(s, loaded)
    epoch = len(task.train) if isinstance(task.train, data.Batches) else 0
    steps = s.number_of_steps(epoch)
    unit = train.warmup_schedule(1.0, steps, warmup=s.warmup, decay=s.schedule)
    own = {member.name: member for member in group}
    jobs = [
        sweep.Job(
            name=member.name, learning_rate=member.settings.lr or 3e-3, steps=steps,
            weight_decay=member.settings.weight_decay, seed=s.seed,
            rank=member.settings.rank or 8,
            alpha=member.settings.alpha or 2.0 * (member.settings.rank or 8),
        )
        for member in group
    ]  # fmt: skip

    def optimizer(hp: Any) -> optax.GradientTransformation:
        tx = optax.adamw(
            lambda count: hp.learning_rate * unit(count), weight_decay=hp.weight_decay
        )
        return tx if s.lr_ratio == 1 else optax.chain(tx, optim.lora_plus(s.lr_ratio))

    results = sweep.run(
        task.loss_fn, loaded.params, jobs, task.train, optimizer=optimizer,
        adapt=lambda params, job: own[job.name].settings.adapt(params, s.key),
        valid=task.valid, eval_every=steps, accumulate=s.accumulate,
        clip_norm=s.clip or None, mesh=s.device_mesh,
        progress=f"{len(jobs)} runs in one step",
    )  # fmt: skip
    each = (time.perf_counter() - began) / len(jobs)
    for result in results:
        member = own[result.name]
        loss = result.value if result.status == "done" else None
        row = Row(member.name, member.values, loss, result.steps, each, len(jobs))
        yield row, None if loss is None else result.params, member


def _alone(kind: Any, loaded: Any, group: list[Member], folder: Any) -> Made:
    """Train runs one by one, each in a folder of its own."""
    for member in group:
        print(f"{member.name}: by itself, for {member.alone}", file=sys.stderr)
        began, s = time.perf_counter(), member.settings
        task = kind.make(s, loaded)
        place = folder.path / "runs" / member.name
        kept = dataclasses.asdict(s)
        with train.RunFolder.claim(place, kept) as own:
            tree = s.adapt(loaded.params, s.key)
            try:
                fit = s.fit(task.loss_fn, tree, task.train, own, task.valid)
            except NonFiniteError as error:
                print(f"{member.name}: {error}", file=sys.stderr)
                yield Row(member.name, member.values, None, 0, 0.0, 1), None, member
                continue
            loss = own.metrics.rows("valid")[-1]["loss"]
        seconds = time.perf_counter() - began
        yield (
            Row(member.name, member.values, loss, fit.steps, seconds, 1),
            fit.state.params,
            member,
        )


def check_table(table: Any, source: str) -> dict[str, list[Any]]:
    """Return the table of lists that a file's `[sweep]` is.

    Raises:
      OptionError: it is none, or of settings that cannot be swept.
    """
    if not isinstance(table, Mapping) or not table:
        raise OptionError(
            f"{source} has no table of what to vary.\nAdd one: [sweep], and lines such "
            "as rank = [1, 4, 16]."
        )
    found = {key.replace("-", "_"): value for key, value in table.items()}
    for key, value in found.items():
        if key not in ALLOWED:
            raise OptionError(
                f"{source}: [sweep] cannot vary {key!r}.\nIt varies how a model is "
                f"adapted and trained: {', '.join(sorted(ALLOWED))}."
            )
        if not isinstance(value, list) or not value:
            raise OptionError(f"{source}: [sweep] {key} is no list of values.")
    return found
