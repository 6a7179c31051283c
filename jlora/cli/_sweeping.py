"""Runs over a table of settings: together in one compiled step where that can be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora import checkpoint, data, init, models, sweep, tasks, train
from jlora._errors import NonFiniteError, OptionError
from jlora._options import options_of
from jlora.train import Interrupted
from jlora.train._run import SWEEP

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
      name: its name.
      values: the settings that it has of its own.
      loss: the validation loss after its last step; None if it diverged.
      steps: updates made.
      seconds: its share of the time.
      together: how many runs shared its step.
      adapter: the folder of its adapter; None if it diverged.
    """

    name: str
    values: Values
    loss: float | None
    steps: int
    seconds: float
    together: int
    adapter: str | None

    @property
    def order(self) -> float:
        """The loss; of a run that diverged more than any."""
        return math.inf if self.loss is None else self.loss


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
      OptionError: settings that do not go together, or two runs that are one.
    """
    options = options_of(type(settings))
    others = {n: o.own["replaces"] for n, o in options.items() if o.own["replaces"]}
    excluded = [n for n, other in others.items() if {n, other} <= table.keys()]
    if excluded:
        raise OptionError(
            f"[sweep] varies {excluded[0]} and {others[excluded[0]]}, which exclude "
            "each other.\nLeave one of them out."
        )
    found: dict[str, Member] = {}
    for values in itertools.product(*table.values()):
        own = dict(zip(table, values, strict=True))
        said = ",".join(f"{key}={_word(value)}" for key, value in own.items())
        name = re.sub(r"[^\w=,.+-]+", "_", said)  # of a folder, too
        pairs = [*others.items(), *((b, a) for a, b in others.items())]
        unsaid = {other: None for given, other in pairs if given in own}
        changed = dataclasses.replace(settings, **{**unsaid, **own})
        try:
            changed.check()
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None
        if name in found:
            raise OptionError(f"[sweep] has two runs {name}.\nLeave one of them out.")
        found[name] = Member(name, own, changed)
    return list(found.values())


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

    With `settings.resume` what has ended is read, and what is under way goes on.

    Returns:
      The runs, the best first.

    Raises:
      LoraError: settings or data that are not in order.
      Interrupted: the sweep was asked to stop.
      NonFiniteError: no run came to a finite loss.
    """
    settings.check_alone("a sweep")
    members = members_of(settings, table)
    loaded = settings.load(settings.model)
    ended: list[_Ended] = []
    with settings.claim("sweep", task, **{SWEEP: table}) as folder:
        folder.state.mkdir(exist_ok=True)  # there is something to go on with
        for number, group in enumerate(groups_of(members), 1):
            part = _Part(task, loaded, group, folder)
            try:
                own = part.alone() if group[0].alone else part.together(number)
                ended += own
            except Interrupted as said:
                done = f"{len(ended)} of {len(members)} runs"
                again = f"{done}. To continue:\n  {folder.resume_command}"
                raise said.saying(again) from None
            for lost in [x for x in ended if x is not _best(ended)]:
                lost.tree = None  # one is held at a time
        best = _best(ended)
        if best is None:
            raise NonFiniteError("no run ended with a finite loss.\nTry lower rates.")
        checkpoint.save_adapter(folder.adapter, best.tree, overwrite=True)
        merged = jlora.merge(best.tree)
        models.save(loaded.model, merged, folder.merged, overwrite=True)
        loaded.tokenizer.save_pretrained(folder.merged)
        folder.settings = best.member.settings.kept(task, **{SWEEP: table})
        folder.save_settings()
        rows = [x.row for x in ended]
        rows.sort(key=lambda row: row.order)
        out = json.dumps([row._asdict() for row in rows], indent=2)
        (folder.path / "results.json").write_text(out + "\n", encoding="utf-8")
        print(
            f"{folder.path}: the best adapter and model, and results.json",
            file=sys.stderr,
        )
    return rows


@dataclasses.dataclass
class _Ended:
    """A run that has ended, and its lorafied tree, while that may be the best."""

    member: Member
    row: Row
    tree: Any


def _best(ended: Sequence[_Ended]) -> _Ended | None:
    best = min(ended, key=lambda x: x.row.order, default=None)
    return None if best is None or best.row.order == math.inf else best


@dataclasses.dataclass(frozen=True)
class _Part:
    """Runs that are trained in one step, or one that is by itself."""

    task: str
    loaded: Any
    group: list[Member]
    folder: train.RunFolder

    def _make(self, settings: Any) -> Any:
        return tasks.KINDS[self.task].make(settings, self.loaded)

    def together(self, number: int) -> list[_Ended]:
        """Train the group in one compiled step.

        Args:
          number: names the folder that its states and adapters lie in.
        """
        place = self.folder.state / f"together-{number}"
        s = dataclasses.replace(self.group[0].settings, buckets=1)
        task, own = self._make(s), {member.name: member for member in self.group}
        epoch = len(task.train) if isinstance(task.train, data.Batches) else 0
        steps = s.number_of_steps(epoch)
        warmup = s.warmup_steps(steps)
        unit = train.warmup_schedule(1.0, steps, warmup=warmup, decay=s.schedule)
        jobs = [
            sweep.Job(
                name=member.name, learning_rate=member.settings.peak, steps=steps,
                weight_decay=member.settings.weight_decay, seed=s.seed,
                rank=member.settings.rank or 8,
                alpha=member.settings.alpha or 2.0 * (member.settings.rank or 8),
            )
            for member in self.group
        ]  # fmt: skip

        def optimizer(hp: Any) -> optax.GradientTransformation:
            return s.adamw(
                lambda count: hp.learning_rate * unit(count), hp.weight_decay
            )

        results = sweep.run(
            task.loss_fn, self.loaded.params, jobs, task.train, optimizer=optimizer,
            adapt=lambda params, job: own[job.name].settings.adapt(params, s.key),
            valid=task.valid, eval_every=steps, accumulate=s.accumulate,
            clip_norm=s.clip or None, mesh=s.device_mesh, folder=place, resume=True,
            progress=f"{len(jobs)} runs in one step",
        )  # fmt: skip
        each = results.seconds / len(jobs)
        return [self._of_job(r, own[r.name], each, place) for r in results]

    def _of_job(
        self, result: sweep.Result, member: Member, seconds: float, place: Path
    ) -> _Ended:
        is_done, adapter = result.status == "done", place / member.name / "adapter"
        row = Row(
            member.name, member.values, result.value if is_done else None, result.steps,
            seconds, len(self.group), str(adapter) if is_done else None,
        )  # fmt: skip
        return _Ended(member, row, result.params if is_done else None)

    def alone(self) -> list[_Ended]:
        """Train one run in a folder of its own; one that has ended is read."""
        (member,) = self.group
        place = self.folder.state / "alone" / member.name
        diverged = place.with_name(f"{member.name}.diverged")
        if diverged.exists():
            return [self._lost(member, diverged.read_text(encoding="utf-8"))]
        print(f"{member.name}: by itself, for {member.alone}", file=sys.stderr)
        task, s = self._make(member.settings), member.settings
        kept = s.kept(self.task)
        begun = (place / "state").is_dir()
        with (
            train.RunFolder.resume(place, kept)
            if begun
            else train.RunFolder.claim(place, kept, overwrite=True)
        ) as own:
            base = self.loaded.params
            tree = s.adapt(base, s.key)
            initial = jax.tree.map(jnp.copy, jlora.split(tree)[0])
            try:
                fit = s.fit(task.loss_fn, tree, task.train, own, task.valid, base=base)
                loss = own.metrics.rows("valid")[-1]["loss"]
                if loss is None:  # as the log has what is not finite
                    raise NonFiniteError("its last validation loss is not finite.")
            except NonFiniteError as error:
                diverged.write_text(str(error), encoding="utf-8")
                return [self._lost(member, str(error))]
        row = Row(
            member.name, member.values, loss, fit.steps, fit.seconds, 1,
            str(own.adapter),
        )  # fmt: skip
        last = init.unshift(fit.state.params, initial, base)
        return [_Ended(member, row, last)]

    @staticmethod
    def _lost(member: Member, why: str) -> _Ended:
        print(f"{member.name}: {why}", file=sys.stderr)
        row = Row(member.name, member.values, None, 0, 0.0, 1, None)
        return _Ended(member, row, None)


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
