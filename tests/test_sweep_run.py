"""Queues of jobs: slots, early ends, failures, folders, resumption."""

import csv
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sweep import TARGETS, D, V, logits, make_batch

import jlora
import jlora.train as jt
from jlora import checkpoint, sweep


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(5), 3)
    normal = lambda k, *shape: jax.random.normal(k, shape) * 0.3
    return {
        "query": {"kernel": normal(keys[0], D, 11), "bias": jnp.zeros(11)},
        "value": {"kernel": normal(keys[1], 11, D)},
        "head": {"kernel": normal(keys[2], D, V)},
    }


def loss_fn(p, batch, key):
    return jt.cross_entropy(logits(p, batch["x"]), batch["y"])


def stream(seed, bad=None, short=None):
    """A stream with bad ids at one step, or one that ends."""

    def batches(step):
        while short is None or step < short:
            batch = make_batch(step, seed)
            if step == bad:
                batch["y"][0, 0] = V
            yield batch
            step += 1

    return batches


def open_data(job):
    if job.data == "missing":
        return open("/does/not/exist")
    return stream(**job.data)


def start(params, job):
    tree = job.lorafy(params, targets=TARGETS)
    return jt.TrainState.create(tree, sweep.adamw(job), job.key)


@functools.cache
def step_of(name):
    """The step of a run of its own, which several tests make."""
    (job,) = (job for job in QUEUE if job.name == name)
    return jt.make_train_step(loss_fn, sweep.adamw(job))


def alone(params, job, steps):
    state, step = start(params, job), step_of(job.name)
    feed, losses = stream(**job.data)(0), []
    for _ in range(steps):
        state, metrics = step(state, next(feed))
        losses.append(float(metrics["loss"]))
    return state, losses


QUEUE = [
    sweep.Job(name="a", rank=2, steps=5, data={"seed": 0}),
    sweep.Job(name="missing", rank=3, data="missing"),
    sweep.Job(name="b", rank=1, steps=3, seed=1, data={"seed": 1}, dropout=0.2),
    sweep.Job(name="bad", rank=2, data={"seed": 2, "bad": 2}),
    sweep.Job(name="short", rank=2, data={"seed": 2, "short": 4}),
    sweep.Job(name="c", rank=4, steps=6, seed=2, learning_rate=1e-2, data={"seed": 3}),
    sweep.Job(name="worst", rank=2, learning_rate=1e38, data={"seed": 4}),
    sweep.Job(name="d", rank=3, steps=4, seed=3, data={"seed": 5}),
]


def run(params, jobs=QUEUE, batches=open_data, **options):
    options = {"steps": 8, "slots": 2, "targets": TARGETS, **options}
    return sweep.run(loss_fn, params, jobs, batches, **options)


@pytest.fixture(scope="module")
def queued(params, tmp_path_factory):
    folder, seen = tmp_path_factory.mktemp("sweep") / "sweep", []
    with pytest.MonkeyPatch.context() as patch:
        read = []
        prints = functools.partial(counted, read, checkpoint.fingerprint)
        patch.setattr(checkpoint, "fingerprint", prints)
        patch.setattr("jlora.checkpoint._states.fingerprint", prints)
        patch.setattr("jlora.checkpoint._adapters.fingerprint", prints)
        results = run(params, folder=folder, on_result=lambda r: seen.append(r.name))
    assert len(read) == 1  # all jobs have one base
    return results, folder, seen


def counted(calls, function, *args):
    calls.append(args)
    return function(*args)


def test_a_queue_goes_through_the_slots(params, queued):
    results, _, seen = queued
    assert [r.name for r in results] == [job.name for job in QUEUE]
    assert sorted(seen) == sorted(job.name for job in QUEUE)
    told = {r.name: (r.status, r.steps) for r in results}
    assert told == {
        "a": ("done", 5), "missing": ("failed", 0), "b": ("done", 3),
        "bad": ("failed", 2), "short": ("failed", 4), "c": ("done", 6),
        "worst": ("diverged", told["worst"][1]), "d": ("done", 4),
    }  # fmt: skip
    assert results.compilations == 1
    for name in ("b", "c"):  # that came in later; each is compiled
        state, losses = alone(params, results[name].job, results[name].steps)
        np.testing.assert_allclose(results[name].losses, losses, atol=1e-5, rtol=0)
        pairs = zip(
            jax.tree.leaves(results[name].state.trainable),
            jax.tree.leaves(state.trainable),
            strict=True,
        )
        assert all(np.allclose(x, y, atol=1e-5) for x, y in pairs)


def test_errors_are_kept_with_their_jobs(queued):
    results, _, _ = queued
    assert isinstance(results["missing"].error, FileNotFoundError)
    assert isinstance(results["bad"].error, jlora.DataError)
    assert f"{V}" in results["bad"].reason
    assert "ended after 4 batches" in results["short"].reason
    assert "gradient's norm" in results["worst"].reason
    leaves = jax.tree.leaves(results["worst"].state.trainable)
    assert all(np.isfinite(x).all() for x in leaves)
    with pytest.raises(jlora.OptionError, match="no adapter: it is failed"):
        _ = results["missing"].params


def test_results_print_and_save(queued, tmp_path):
    results, folder, _ = queued
    text = str(results)
    assert "missing failed: FileNotFoundError" in text
    assert "learning_rate" in text.splitlines()[0]
    assert "8 jobs" in text
    for name in ("r.json", "r.jsonl", "r.csv"):
        results.save(tmp_path / name)
    assert len(json.loads((tmp_path / "r.json").read_text())["jobs"]) == 8
    rows = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["history"] == [list(x) for x in results[0].history]
    with open(tmp_path / "r.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [job.name for job in QUEUE]
    assert float(table[0]["loss"]) == results[0].loss
    with pytest.raises(jlora.OptionError, match="saved as"):
        results.save(tmp_path / "r.txt")
    assert results.best.name in "abcd"
    assert [r.name for r in results[:2]] == ["a", "missing"]


def test_adapters_are_saved_alone_at_their_own_rank(params, queued, tmp_path):
    import jlora.peft

    results, folder, _ = queued
    for name in ("b", "c"):
        tree = checkpoint.load_adapter(folder / name / "adapter", params)
        own = results[name].params
        assert jax.tree.structure(tree) == jax.tree.structure(own)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(own), strict=True):
            np.testing.assert_array_equal(x, y)
        assert checkpoint.load_metadata(folder / name / "adapter")["name"] == name
        jlora.peft.save(tmp_path / name, own)
        assert jlora.peft.read_config(tmp_path / name)["r"] == own["query"]["kernel"].adapters[""].rank  # fmt: skip
        again = jlora.peft.load(tmp_path / name, params)
        a, b = (t["value"]["kernel"].adapters[""] for t in (again, own))
        np.testing.assert_array_equal(a.a, b.a)
        np.testing.assert_array_equal(a.b, b.b)
        assert jnp.abs(b.b).min() > 0


def test_a_finished_job_goes_on_in_a_run_of_its_own(params, queued):
    results, folder, _ = queued
    job = results["c"].job
    state, _ = checkpoint.restore_state(folder / "c" / "end", start(params, job))
    assert int(state.step) == 6
    state, _ = step_of("c")(state, make_batch(6, 3))
    want, _ = alone(params, job, 7)
    pairs = zip(jax.tree.leaves(state.trainable), jax.tree.leaves(want.trainable), strict=True)  # fmt: skip
    assert all(np.allclose(x, y, atol=1e-5) for x, y in pairs)


def test_an_interrupted_sweep_goes_on_bit_for_bit(params, queued, tmp_path):
    results, done, _ = queued

    def stop_at(job):
        def batches(step):
            for n, batch in enumerate(stream(**job.data)(step), step):
                if job.name == "c" and n == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

        return batches if job.data != "missing" else open_data(job)

    with pytest.raises(jt.Interrupted, match="resume=True"):
        run(params, folder=tmp_path / "s", batches=stop_at)
    assert (tmp_path / "s" / "c" / "state").exists()
    with pytest.raises(jlora.CheckpointError, match="holds a sweep already"):
        run(params, folder=tmp_path / "s")
    again = run(params, folder=tmp_path / "s", resume=True)
    assert [(r.name, r.status, r.steps) for r in again] == [
        (r.name, r.status, r.steps) for r in results
    ]
    for one, two in zip(again, results, strict=True):
        np.testing.assert_array_equal(one.losses, two.losses)
        assert one.history == two.history
        leaves = (jax.tree.leaves(r.state) for r in (one, two))
        for x, y in zip(*leaves, strict=True):
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(x, y)
    assert not (tmp_path / "s" / "c" / "state").exists()
    other = [sweep.Job(name="a", rank=1, data={"seed": 0})]
    with pytest.raises(jlora.CheckpointError, match="the job 'a' in"):
        run(params, other, folder=tmp_path / "s", resume=True)


# -- one stream, validation, rules -----------------------------------------------------


def test_halving_on_one_stream(params, capsys):
    jobs = sweep.grid(rank=[2], learning_rate=[1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0])
    train = [make_batch(i) for i in range(3)]
    valid = train[:2]
    results = run(
        params, jobs, train, slots=None, steps=9, eval_every=1, valid=valid,
        stop=sweep.Halving(first=2, factor=2), progress="rates",
    )  # fmt: skip
    *_, last = capsys.readouterr().err.strip().split("\r")
    assert last.startswith("rates: 100%")
    assert " 54/54 " in last  # steps that jobs do without are over too
    told = sorted(r.steps for r in results)
    assert told == [2, 2, 2, 4, 4, 9]
    assert results.compilations == 1
    at_two = {r.name: dict(r.history)[2] for r in results}
    kept = sorted(at_two, key=at_two.get)[:3]
    assert {r.name for r in results if r.steps > 2} == {*kept}
    best = results.best
    assert best.status == "done"
    measure = jt.make_eval_step(lambda p, b: {"loss": loss_fn(p, b, None)})
    want = jt.evaluate(measure, best.params, valid)["loss"]
    assert abs(best.value - want) < 1e-5
    assert "halving: " in min(results, key=lambda r: r.steps).reason


def test_rules_are_functions_of_what_was_measured():
    def result(name, values, status="running", losses=()):
        history = [(n + 1, v) for n, v in enumerate(values)]
        losses = np.array(losses, np.float32)
        return sweep.Result(
            sweep.Job(name=name), status, history=history, losses=losses
        )

    flat, falling = result("flat", [3, 1, 1, 1]), result("falling", [3, 2, 1, 0.5])
    assert sweep.Plateau(2)([flat, falling]).keys() == {"flat"}
    assert sweep.Plateau(3)([flat, falling]).keys() == set()
    rising = result("rising", [1.0, 2.5])
    broken = result("broken", [1.0, float("nan")])
    ended = result("ended", [1.0, 9.0], "done")
    assert sweep.Rising(2)([rising, broken, ended, flat]).keys() == {"rising", "broken"}
    at_once = result("at once", [8.0], losses=[3.0, 9.0])  # from the first step on
    assert sweep.Rising(2)([at_once]) == {"at once": "rising: 8, and 3 at best"}
    assert sweep.Rising(3)([at_once]) == {}
    halving = sweep.Halving(first=2, factor=2)
    rungs = [result(n, [9, v]) for n, v in (("x", 3), ("y", 1), ("z", float("nan")), ("w", 2))]  # fmt: skip
    assert halving(rungs).keys() == {"x", "z"}
    assert halving(rungs[:1]) == {}  # the first to come waits for nobody
    late = result("late", [9, 9, 9])  # its rung was at step 2
    assert halving([*rungs, late]).keys() == {"x", "z"}
    with pytest.raises(jlora.OptionError, match="factor"):
        sweep.Halving(first=2, factor=1)


def test_batches_of_unlike_shapes(params):
    def sized(rows):
        def batches(step):
            for batch in stream(rows)(step):
                yield {k: v[:rows] for k, v in batch.items()}

        return batches

    jobs = sweep.paired(name=["two", "three"], data=[2, 3], rank=2)
    apart = run(params, jobs, lambda job: sized(job.data), slots=2, steps=3)
    assert apart.compilations == 2
    fill = {"x": 0.0, "y": -100}
    filled = run(params, jobs, lambda job: sized(job.data), slots=2, steps=3, fill=fill)
    assert filled.compilations == 1
    for one, two in zip(apart, filled, strict=True):
        np.testing.assert_allclose(one.losses, two.losses, atol=1e-5, rtol=0)

    def growing(job):
        return [{k: v[: 2 + n] for k, v in make_batch(n).items()} for n in range(2)]

    (result,) = run(params, jobs[:1], growing, steps=3)
    assert result.status == "failed"
    assert "fill=" in result.reason


def test_what_run_refuses(params):
    job = sweep.Job(name="x", rank=2)
    with pytest.raises(jlora.OptionError, match="says no steps"):
        run(params, [job], [make_batch(0)], steps=None)
    with pytest.raises(jlora.OptionError, match="slots=0"):
        run(params, [job], [make_batch(0)], slots=0)
    with pytest.raises(jlora.OptionError, match="cannot begin anew"):
        run(params, [job], iter([make_batch(0)]))
    with pytest.raises(jlora.OptionError, match="did you mean targets"):
        run(params, [job], [make_batch(0)], target=["query"])
    with pytest.raises(jlora.OptionError, match="cannot name a folder"):
        run(params, [sweep.Job(name="../x", rank=2)], [make_batch(0)], folder="s")
    assert "no data" in run(params, [job], None)[0].reason


# -- memory ----------------------------------------------------------------------------


def test_the_account_predicts_xlas(params):
    from jlora.sweep import _memory

    jobs = sweep.grid(rank=[1, 4], learning_rate=[1e-3, 1e-2])
    plan = sweep.Plan(params, jobs, targets=TARGETS)
    bank, batch = plan.bank(jobs), jax.tree.map(lambda x: np.stack([x] * 4), make_batch(0))  # fmt: skip
    account = sweep.account(sweep.sweep_step(loss_fn), bank, batch)
    for slots, group in ((24, None), (24, 6)):
        step = sweep.sweep_step(loss_fn, group=group)
        shapes = _memory.resized(bank, slots)
        given = _memory.sized(batch, slots)
        found = _memory.peak_of(step.lower(shapes, given).compile())
        assert abs(account.peak(slots, group) / found - 1) < 0.1
    assert account.group(24, account.peak(24)) is None
    assert account.group(24, account.peak(24) - 1) == 12
    with pytest.raises(jlora.OptionError, match="even one at a time"):
        account.group(24, account.base)
