"""The training loop: progress, validation, the best adapter, stopping, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _batches import Batches
from _options import ADAPTER, STATE, Settings
from _report import Metrics
from tqdm import tqdm

import jlora
from jlora import checkpoint
from jlora.models import shift_right
from jlora.train import (
    TrainState,
    evaluate,
    linear_cross_entropy,
    make_eval_step,
    make_train_step,
)

EPOCHS = 3.0  # unless --epochs or --steps say otherwise
LOG_EVERY = 10  # steps

Tree = Any
Arrays = dict[str, np.ndarray]


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was asked to stop, and saved; the message says where."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with the state.

    Attributes:
      step: updates made, and with it the place in the data's order.
      seconds: time spent on training so far, validation included.
      best_loss: the lowest validation loss.
      best_step: where it was.
      loss, labels: the sum of the losses since the last line of the log, and of how
        many labels.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    loss: float = 0.0
    labels: float = 0.0


def loss_fn(model: Any, params: Tree, batch: Arrays, key: Any = None) -> Any:
    """Return the sum of the labels' losses, and their number.

    The logits are never made as a whole: they are the largest array of the step.
    """
    labels = batch["labels"]
    hidden, kernel = model.apply(
        {"params": params},
        batch["input_ids"],
        batch["attention_mask"],
        shift_right(labels, model.config),
        method="features",
    )
    return linear_cross_entropy(hidden, kernel, labels)


def total_steps(s: Settings, epoch: int) -> int:
    """Return the number of steps to make, with so many an epoch."""
    if s.steps is not None:
        return s.steps
    return max(1, round((s.epochs or EPOCHS) * epoch))


def learning_rate(s: Settings, total: int) -> optax.Schedule:
    """Return the schedule: a linear warm-up, then constant, linear or cosine."""
    warmup = min(s.warmup, total // 2)
    peak, rest = s.learning_rate, max(1, total - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[s.schedule]
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])


class Meter:
    """Tokens a second since the last reading."""

    def __init__(self) -> None:
        self.tokens, self.since = 0, time.perf_counter()

    def add(self, batch: Arrays) -> None:
        """Count a batch's tokens, sources and targets, without padding."""
        self.tokens += int(batch["attention_mask"].sum() + (batch["labels"] >= 0).sum())

    def read(self) -> float:
        """Return the rate, and begin anew."""
        now = time.perf_counter()
        rate = self.tokens / (now - self.since)
        self.tokens, self.since = 0, now
        return rate


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM; a second one interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield seen
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)


class Loop:
    """A run's training, from the first step or from where it stopped."""

    def __init__(
        self,
        s: Settings,
        model: Any,
        tree: Tree,
        train: Batches,
        valid: Batches,
        metrics: Metrics,
    ) -> None:
        self.s, self.train, self.valid, self.metrics = s, train, valid, metrics
        self.total = total_steps(s, len(train))
        schedule = learning_rate(s, self.total)
        tx = optax.adamw(schedule, weight_decay=s.weight_decay)
        loss = partial(loss_fn, model)
        self.step = make_train_step(
            loss,
            tx,
            accumulate=s.accumulate,
            clip_norm=s.clip or None,
            hooks=lambda info: {"learning_rate": schedule(info.step)},
        )
        self.valid_step = make_eval_step(lambda p, batch: {"loss": loss(p, batch)})
        self.state = TrainState.create(tree, tx, jax.random.key(s.seed))
        self.progress = Progress()
        self.pending: list[dict[str, Any]] = []

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.s.folder

    def resume(self) -> None:
        """Go back to the last saved state; drop what was logged after it."""
        self.state, data = checkpoint.restore_state(self.folder / STATE, self.state)
        self.progress = Progress(**data)
        self.metrics.cut(self.progress.step)

    def save(self) -> None:
        """Save what resuming needs."""
        self.collect()
        data = dataclasses.asdict(self.progress)
        checkpoint.save_state(self.folder / STATE, self.state, data_position=data)

    def run(self) -> None:
        """Train to the last step.

        Raises:
          Interrupted: a signal came; the state is saved.
        """
        p = self.progress
        if p.step == 0:
            self.validate()
        every = self.s.eval_every or len(self.train)
        batches = islice(self.train.stream(p.step), self.total - p.step)
        bar = tqdm(total=self.total, initial=p.step, desc="train", unit="step")
        with stop_signals() as stopped, bar:
            clock, meter = time.perf_counter(), Meter()
            for batch in batches:
                self.state, out = self.step(self.state, batch)
                self.pending.append(out)
                p.step += 1
                meter.add(batch)
                bar.update()
                last = p.step == self.total
                if p.step % LOG_EVERY == 0 or last:
                    self.log(out["learning_rate"], meter.read(), bar)
                if p.step % every == 0 or last:
                    self.validate()
                    meter = Meter()  # validation is not counted as training
                if stopped or p.step % every == 0 or last:
                    now = time.perf_counter()
                    p.seconds, clock = p.seconds + now - clock, now
                    self.save()
                if stopped and not last:
                    raise Interrupted(f"step {p.step} of {self.total}")

    def collect(self) -> None:
        """Read the metrics of the steps that were only dispatched so far."""
        p = self.progress
        for out in self.pending:
            loss, labels = float(out["loss"]), float(out["weight"])
            if out["nonfinite"]:
                raise jlora.NonFiniteError(
                    f"up to step {p.step}: the loss is {loss}, the gradient's norm "
                    f"{float(out['grad_norm'])}.\nTry a lower --lr, or --precision "
                    "float32."
                )
            p.loss, p.labels = p.loss + loss * labels, p.labels + labels
        self.pending.clear()

    def log(self, learning_rate: Any, rate: float, bar: tqdm) -> None:
        """Write the mean loss since the last line, and show it on the bar."""
        self.collect()
        p = self.progress
        loss = p.loss / p.labels
        p.loss = p.labels = 0.0
        self.metrics.write(
            "train",
            step=p.step,
            loss=loss,
            learning_rate=float(learning_rate),
            tokens_per_second=round(rate),
        )
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")

    def validate(self) -> None:
        """Measure the loss on the validation pairs, and keep the best adapter."""
        p = self.progress
        batches = map(self.valid.arrays, self.valid.plan())
        loss = evaluate(self.valid_step, self.state, batches)["loss"]
        epoch = p.step / len(self.train)
        self.metrics.write("valid", step=p.step, epoch=round(epoch, 3), loss=loss)
        tqdm.write(f"step {p.step} (epoch {epoch:.2f}): validation loss {loss:.4f}")
        if loss < p.best_loss:
            p.best_loss, p.best_step = loss, p.step
            checkpoint.save_adapter(
                self.folder / ADAPTER, self.state.params, overwrite=True
            )

    def best(self, params: Tree) -> Tree:
        """Put the best adapter, read from its file, onto the plain parameters."""
        return checkpoint.load_adapter(self.folder / ADAPTER, params)
