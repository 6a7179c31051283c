"""A whole sweep: a queue of jobs through the slots of a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jlora._errors import OptionError
from jlora._files import PathLike
from jlora.sweep._folder import SweepFolder
from jlora.sweep._jobs import Job, check_jobs
from jlora.sweep._loop import BankLoop
from jlora.sweep._plan import Adapt, Optimizer, Plan, adamw
from jlora.sweep._progress import Progress
from jlora.sweep._queue import Queue
from jlora.sweep._results import Result, Results
from jlora.sweep._rules import Rule
from jlora.sweep._settings import STEP_OPTIONS, Settings
from jlora.sweep._streams import Filler, Source
from jlora.train._gradients import LossFn
from jlora.train._loop import stop_signals

Tree = Any


def run(
    loss_fn: LossFn,
    params: Tree,
    jobs: Iterable[Job],
    batches: Any = None,
    *,
    steps: int | None = None,
    slots: int | None = None,
    optimizer: Optimizer = adamw,
    valid: Any = None,
    eval_every: int | None = None,
    stop: Rule | Sequence[Rule] = (),
    fill: Mapping[str, Any] | None = None,
    folder: PathLike | None = None,
    resume: bool = False,
    save_every: int | None = None,
    on_result: Callable[[Result], None] | None = None,
    memory_limit: int | None = None,
    adapt: Adapt | None = None,
    progress: str | None = None,
    **options: Any,
) -> Results:
    """Train many adapters on one base, in one compiled step.

    Each job ends as it would in a run of its own with `jlora.train.make_train_step`,
    whatever else is trained beside it. A job that ends, is stopped or fails makes room
    for the next one, and nothing is compiled for it.

    Args:
      loss_fn: `(params, batch, key)`, written for plain parameters, as of
        `jlora.train.make_train_step`; validation passes None for the key.
      params: the base.
      jobs: what to train. Those after the first `slots` wait for a place.
      batches: a stream of batches for all; or a function of a job that makes its
        stream; None takes each job's `data`. A stream is a list of batches, which is
        gone through again and again; something with a method `stream(step)`, such as
        `jlora.data.Batches`; or, of one job, a function from a step's number to the
        batches from there on. Where that fails, the job fails alone.
      steps: updates of jobs that do not say.
      slots: adapters trained at a time; None takes all.
      optimizer: makes an optimiser of a job's numbers, see `Plan`.
      valid: batches to validate on, for all; or a function of a job that returns its.
      eval_every: steps of a job between values; None takes a tenth of its steps. A
        value is the loss over `valid`, or without it the mean training loss since the
        last value.
      stop: rules that stop jobs early, such as `Halving`.
      fill: brings batches of unlike shapes to one: what stands behind a job's own items
        in each leaf, by name, `{"input_ids": 0, "labels": -100}`. The loss must count
        nothing of it. Without, jobs with batches of another shape are trained after
        the others, in a bank of their own.
      folder: where adapters, results and states are saved.
      resume: go on with what is in the folder.
      save_every: steps between the savings of states; a sweep that is interrupted
        saves them in any case.
      on_result: called with each result when its job ends, to export it say.
      memory_limit: bytes that a step may take; more slots than that allows are computed
        group by group. Measuring costs two compilations.
      adapt: makes a job's tree, `(params, job) -> tree`, in the place of `Job.lorafy`.
      progress: the title of a progress bar over the steps of all jobs; None shows none.
      **options: of the step (`accumulate`, `clip_norm`, `compute_dtype`, `cast_batch`,
        `hooks`, `mesh`, `on_missing`), and what all jobs share of `jlora.lorafy`
        (`targets`, `train`, `dora`, ...).

    Returns:
      The results, in the order of the jobs.

    Raises:
      OptionError: jobs or options that cannot be.
      LoraError: what `jlora.lorafy` refuses, with the job's name.
      Interrupted: Ctrl-C or SIGTERM; with a folder, the states are saved.

    >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((batch["x"] @ params["query"]["kernel"] - batch["y"]) ** 2)
    >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
    >>> jobs = jlora.sweep.grid(rank=[1, 2], learning_rate=[1e-2, 1e-1])
    >>> results = run(loss_fn, params, jobs, [batch], steps=5, targets=["query"])
    >>> results.best.name
    'rank=2,learning_rate=0.1'
    """
    found = check_jobs(jobs)
    for job in found:
        if job.steps is None and steps is None:
            raise OptionError(
                f"the job {job.name!r} says no steps, and the sweep none."
            )
    for name, number in {"steps": steps, "slots": slots, "eval_every": eval_every,
                         "save_every": save_every}.items():  # fmt: skip
        if number is not None and (not isinstance(number, int) or number < 1):
            raise OptionError(f"{name}={number!r}: expected a whole number, or None.")
    of_step = {n: options.pop(n) for n in STEP_OPTIONS if n in options}
    settings = Settings(
        loss_fn, steps, min(slots or len(found), len(found)), eval_every,
        (stop,) if callable(stop) else tuple(stop), save_every, on_result,
        memory_limit, optimizer, of_step,
    )  # fmt: skip
    plan = Plan(params, found, optimizer, adapt=adapt, **options)
    place = None if folder is None else SweepFolder(folder, found, resume)
    sources = Source(batches), None if valid is None else Source(valid)
    bar = Progress(progress, sum(map(settings.steps_of, found)))
    queue = Queue(settings, plan, sources, Filler(fill), place, bar)
    try:
        return _run(settings, plan, queue)
    finally:
        bar.close()


def _run(settings: Settings, plan: Plan, queue: Queue) -> Results:
    """One bank after another, of jobs whose batches fit beside each other."""
    began, compilations = time.perf_counter(), 0
    folder, before = queue.folder, 0.0 if queue.folder is None else queue.folder.seconds
    seconds = lambda: before + time.perf_counter() - began  # noqa: E731
    with stop_signals() as stopped:
        while queue:
            members = queue.members(settings.slots)
            if members:
                bank = BankLoop(settings, plan, queue, members)
                try:
                    bank.run(stopped)
                finally:
                    if folder is not None:
                        folder.save_seconds(seconds())
                compilations += bank.compilations
            queue.next_bank()
    rows = [queue.results[job.name] for job in plan.jobs]
    took = seconds() if folder is None else folder.seconds
    return Results(rows, took, compilations)
