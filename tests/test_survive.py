"""What a run survives: damage, full disks, signals, numbers that are none."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fit import StopAt, Stream, fit, loss_fn, params, rows, same

import jlora
from jlora import checkpoint, train

HERE = Path(__file__).parent


def states(folder):
    return sorted(p.name for p in (folder / "state").iterdir() if p.name[0] != ".")


def moving(state):
    return state.step, state.trainable, state.opt_state


def data_file(folder):
    """The largest file of a state's arrays."""
    files = [p for p in (folder / "arrays").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


# -- damaged states --------------------------------------------------------------------


def flip(place):
    file = data_file(place)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(bytes(data))


def cut(place):
    file = data_file(place)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def undescribed(place):
    shutil.rmtree(place / "config")


def misdescribed(place):
    (place / "config" / "metadata").write_text("{}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run."""
    return fit(tmp_path_factory.mktemp("whole") / "run", eval_every=4)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in its middle."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(train.Interrupted):
        fit(run, eval_every=4, callbacks=[StopAt(13)])
    return run


@pytest.mark.parametrize("damage", [flip, cut, undescribed, misdescribed])
def test_a_damaged_last_state_gives_way_to_the_one_before(
    tmp_path, damage, undisturbed, stopped
):
    run, want = tmp_path / "run", undisturbed
    shutil.copytree(stopped, run)
    first, last = states(run)
    damage(run / "state" / last)
    with pytest.warns(jlora.JloraWarning) as warned:
        got = fit(run, resume=True, eval_every=4)
    said = str(warned[0].message)
    assert str(run / "state" / last) in said
    lost = int(last) - int(first)
    assert f"state of step {first} is restored instead; {lost} steps" in said
    same(moving(got.state), moving(want.state))
    same(got.params, want.params)
    assert states(run) == [f"{last}.damaged", "20", "24"]
    assert [r["step"] for r in rows(run, "valid")] == [*range(0, 25, 4)]


def test_where_all_states_are_damaged_each_is_named(tmp_path):
    run = tmp_path / "run"
    fit(run, 8, eval_every=4)
    for name in states(run):
        flip(run / "state" / name)
    with pytest.raises(jlora.CheckpointError, match=r"(?s)no state in .*/8'.*/4'"):
        fit(run, 12, resume=True)


def test_another_base_is_no_damage(tmp_path):
    run = tmp_path / "run"
    fit(run, 8, eval_every=4)
    with checkpoint.Checkpoints(run / "state") as kept:
        other = jax.tree.map(lambda x: x + 1, {"dense": {"kernel": jnp.ones((3, 2))}})
        tree = jlora.lorafy(other, 1, ["dense"])
        state = train.TrainState.create(tree, train_tx(), jax.random.key(0))
        with pytest.raises(jlora.CheckpointError, match="on another base"):
            kept.restore(state)


def train_tx():
    import optax

    return optax.adam(0.1)


def test_what_was_killed_in_its_first_save_begins_again(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    want = fit(whole, 12)
    with pytest.raises(KeyError):
        fit(run, 12, callbacks=[Fail(KeyError(), at=1)])
    (run / "state" / "2.orbax-checkpoint-tmp-1").mkdir(parents=True)
    got = fit(run, 12, resume=True)
    same(moving(got.state), moving(want.state))
    assert len(rows(run, "valid")) == len(rows(whole, "valid"))


# -- which are kept --------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    rate = lambda step: jnp.where(step < 8, 0.1, -0.3)
    import optax

    with train.RunFolder.claim(tmp_path / "run", {}) as run:
        train.fit(
            loss_fn, params(), optax.adam(rate), Stream(), run, steps=20,
            valid=[{"x": np.ones((4, 3), np.float32), "y": np.ones((4, 2), np.float32)},
                   Stream().batch(3)],
            eval_every=4, keep=1, keep_best=1,
        )  # fmt: skip
    losses = {
        r["step"]: r["loss"] for r in rows(tmp_path / "run", "valid") if r["step"]
    }
    best = min(losses, key=losses.get)
    assert best != 20
    assert states(tmp_path / "run") == sorted([str(best), "20"])


def test_bad_policies(tmp_path):
    with pytest.raises(jlora.OptionError, match="keep_best=1 keeps states by their"):
        fit(tmp_path / "a", valid=None, keep_best=1)
    with pytest.raises(jlora.CheckpointError, match="keep_last=0"):
        fit(tmp_path / "b", keep=0)
    with pytest.raises(jlora.OptionError, match="patience=0"):
        fit(tmp_path / "c", patience=0)


class Fail(train.Callback):
    """Raises an error at a step."""

    def __init__(self, error, at):
        self.error, self.at = error, at

    def on_step(self, loop, step, metrics):
        if step == self.at:
            raise self.error


# -- saving in the background ----------------------------------------------------------


def test_a_step_that_donates_its_state_leaves_what_is_saved(tmp_path):
    """Written while the next steps reuse the memory."""
    import optax

    tree = jlora.lorafy({"w": jnp.ones((256, 256))}, 64, ["w"], key=jax.random.key(2))
    tx = optax.adam(0.1)
    state = train.TrainState.create(tree, tx, jax.random.key(0))
    loss = lambda p, batch, key: jnp.mean((batch @ p["w"] - 3) ** 2)
    step, x = train.make_train_step(loss, tx), np.eye(256, dtype=np.float32)
    want = {}
    with checkpoint.Checkpoints(tmp_path / "s", keep_last=9, background=True) as kept:
        for n in range(1, 4):
            state, _ = step(state, x)
            want[n] = jax.tree.map(np.array, (state.trainable, state.opt_state))
            kept.save(state)
            for _ in range(2):  # while it is written
                state, _ = step(state, x)
            state = train.TrainState(
                jnp.int32(n), state.trainable, state.frozen, state.opt_state, state.key
            )
        for n, values in want.items():
            got, _ = kept.restore(state, step=n)
            same((got.trainable, got.opt_state), values)


def test_an_error_in_the_background_is_raised_at_the_next_step(tmp_path, capfd):
    run, went_on = tmp_path / "run", []

    class Break(train.Callback):
        def on_step(self, loop, step, metrics):
            went_on.append(step)
            if step == 7:
                while not (run / "state" / "4").is_dir():
                    time.sleep(0.01)
                file_limit(2000)

    try:
        with pytest.raises(jlora.CheckpointError, match="could not be saved") as error:
            fit_large(run, callbacks=[Break()])
    finally:
        file_limit(None)
    assert str(error.value) == (
        f"step 8 could not be saved in '{run}/state': the file would be larger than a "
        "limit allows.\nEarlier checkpoints are as they were. See to space and "
        f"permissions.\nThen go on with:\n  {resume_command(run)}"
    )
    assert capfd.readouterr().err.count("Traceback") == 0
    assert states(run) == ["4"]
    assert not list((run / "state").glob("*tmp*"))
    fit_large(run, resume=True)
    whole = tmp_path / "whole"
    fit_large(whole)
    assert states(run) == states(whole) == ["12", "16"]
    one, two = (json_of(f / "state" / "16") for f in (run, whole))
    assert one["arrays"] == two["arrays"]


def resume_command(run):
    with train.RunFolder.resume(run) as folder:
        return folder.resume_command


def json_of(place):
    return json.loads((place / "config" / "metadata").read_text())


def file_limit(size):
    """No file may become larger: a quota, for this process alone."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def fit_large(folder, resume=False, **options):
    """A state of some kilobytes."""
    import optax

    tree = jlora.lorafy({"w": jnp.ones((31, 29))}, 16, ["w"], key=jax.random.key(2))
    loss = lambda p, batch, key: jnp.mean(
        (batch["x"] @ jnp.ones((3, 31)) @ p["w"]) ** 2
    )
    claim = train.RunFolder.resume if resume else train.RunFolder.claim
    with claim(folder, {}) as run:
        return train.fit(
            loss, tree, optax.adam(0.1), Stream(), run, steps=16, eval_every=4,
            valid=None, log_every=100, **options,
        )  # fmt: skip


# -- signals ---------------------------------------------------------------------------


class Signal(train.Callback):
    """Asks to stop at a step, as a scheduler does."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step(self, loop, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), self.number)


class Settings(train.RunSettings):
    """Of a script."""


def script(folder, callbacks):
    return train.command_line(
        Settings, lambda settings: fit(folder, eval_every=8, callbacks=callbacks), []
    )


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, 0, "Stopped by SIGTERM and saved after step 6 of 24. To"),
        (signal.SIGINT, 130, "Stopped and saved after step 6 of 24. To continue:"),
    ],
)
def test_a_script_that_is_preempted_saves_and_exits_with_0(
    tmp_path, capsys, number, status, said
):
    run = tmp_path / "run"
    assert script(run, [Signal(5, number)]) == status
    assert said in capsys.readouterr().out
    assert states(run) == ["6"]


def test_a_sweep_that_cannot_be_gone_on_with_says_so(capsys):
    from jlora.cli._common import end_by

    with pytest.raises(SystemExit) as end:
        end_by(train.Interrupted("2 jobs were under way", signal.SIGTERM, saved=False))
    assert end.value.code == 143
    said = "jlora: stopped by SIGTERM after 2 jobs were under way\n"
    assert capsys.readouterr().err == said
    assert train.Interrupted("x").saying("y").status == 130


def test_a_signal_while_validating_is_not_kept_waiting(tmp_path, undisturbed):
    """The validation is made up for when the run goes on."""
    run, looked_at = tmp_path / "run", []

    class Slow:
        def __iter__(self):
            from test_fit import VALID

            for batch in VALID:
                looked_at.append(len(rows(run, "valid")))
                if looked_at.count(2) == 1:  # the third validation, of step 8
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    with pytest.raises(train.Interrupted, match="step 8 of 24") as stop:
        fit(run, eval_every=4, valid=Slow())
    assert (stop.value.signal, stop.value.status) == (signal.SIGTERM, 0)
    assert [r["step"] for r in rows(run, "valid")] == [0, 4]
    got = fit(run, resume=True, eval_every=4)
    assert [r["step"] for r in rows(run, "valid")] == [*range(0, 25, 4)]
    same(got.params, undisturbed.params)
    assert got.best_step == undisturbed.best_step


def test_a_signal_before_the_first_step(tmp_path):
    run = tmp_path / "run"

    class Early(train.Callback):
        def on_start(self, loop):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Interrupted, match="step 0 of 24"):
        fit(run, valid=None, callbacks=[Early()])
    assert fit(run, resume=True, valid=None).steps == 24


def test_a_long_save_says_what_is_left_of_a_run_that_is_ended(tmp_path, capsys):
    save = train.Save(tmp_path / "state", 4, grace=0.0)

    waited = []

    class Slow:
        def save(self, *args, **kwargs):
            pass

        def wait(self, seconds=None):
            waited.append(seconds)
            return seconds is None

    class At12:
        position, state = 12, None
        announce = saved = lambda *_: {}

    (tmp_path / "state" / "8").mkdir(parents=True)
    (tmp_path / "state" / "12.orbax-checkpoint-tmp").mkdir()
    save._checkpoints = Slow()
    save.on_stop(At12())
    assert waited == [0.0, None]
    assert "still saving step 12 after 0 s; if the process is ended before it is done, " \
        "the run goes on from step 8" in capsys.readouterr().out  # fmt: skip


def test_repeated_sigterms_do_not_interrupt_saving():
    from jlora.train._loop import stop_signals

    with stop_signals() as stopped:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped == [signal.SIGTERM] * 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# -- losses that are none, and losses that jump ----------------------------------------


def broken(at, value=np.nan, of="loss"):
    """A loss that is no number on the batches of some steps, or whose gradient is."""
    keys = jnp.asarray([Stream().batch(step - 1)["x"].sum() for step in at])

    def loss(params, batch, key):
        good = loss_fn(params, batch, key)
        is_bad = jnp.isclose(batch["x"].sum(), keys).any() & (batch["x"].shape[0] == 4)
        if of == "loss":
            return jnp.where(is_bad, value, good)
        zero = jnp.sum(params["dense"]["kernel"] * 0)
        return good + jnp.sqrt(jnp.where(is_bad, zero, 1.0))

    return loss


@pytest.mark.parametrize(
    ("of", "value", "dtype"),
    [("loss", np.nan, None), ("loss", np.inf, jnp.bfloat16), ("gradient", 0, None)],
)
def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path, of, value, dtype, capsys
):
    run = tmp_path / "run"
    loss = broken([5, 11, 12], value, of)
    got = fit(run, loss=loss, compute_dtype=dtype, cast_batch=False, valid=None)
    assert got.skipped == 3
    assert got.facts()["skipped"].startswith("3 steps with a loss or gradient that is")
    assert np.isfinite(jax.tree.leaves(jlora.merge(got.params))[0]).all()
    assert [r["step"] for r in rows(run, "skipped")] == [5, 11, 12]
    assert all(np.isfinite(r["loss"]) for r in rows(run, "train"))
    assert capsys.readouterr().out.count("is skipped") == 2  # once of those in a row
    # What is skipped is skipped: the state is that of the good steps alone.
    assert int(optax_count(got.state)) == 24 - 3


def optax_count(state):
    import optax

    return optax.tree_utils.tree_get(state.opt_state, "count")


def test_too_many_in_a_row_stop_the_run(tmp_path):
    run, loss = tmp_path / "run", broken([5, 6, 7, 9, 10, 11, 12, 13])
    with pytest.raises(jlora.NonFiniteError, match=r"step 12: .*after 4 such steps in"):
        fit(run, loss=loss, patience=4, valid=None)
    with pytest.raises(jlora.NonFiniteError, match=r"step 13: .*after 5 such steps in"):
        fit(tmp_path / "default", loss=loss, valid=None)
    assert fit(tmp_path / "never", loss=loss, patience=None, valid=None).skipped == 8
    with pytest.raises(jlora.NonFiniteError, match=r"step 5: the loss is nan"):
        fit(tmp_path / "applied", loss=loss, skip_nonfinite=False, valid=None)


def test_the_count_goes_on_in_a_resumed_run(tmp_path):
    run, loss = tmp_path / "run", broken([2, 9, 10, 11, 12, 13])
    with pytest.raises(train.Interrupted):
        fit(run, loss=loss, valid=None, callbacks=[Signal(9)])
    with pytest.raises(jlora.NonFiniteError, match=r"step 13: .*after 5 such steps"):
        fit(run, loss=loss, valid=None, resume=True)
    assert [r["step"] for r in rows(run, "skipped")] == [2, 9, 10, 11, 12]


def watched(losses, **options):
    import types

    log = []
    write = lambda event, **values: log.append((event, values["step"]))
    watch = train.Watch(types.SimpleNamespace(write=write), **options)
    for step, loss in enumerate(losses, 1):
        bad = not np.isfinite(loss)
        watch.on_step(None, step, {"loss": loss, "nonfinite": bad, "grad_norm": 1.0})
    return watch, log


def test_jumps_of_the_loss_are_noted_once_each(capsys):
    rng = np.random.default_rng(0)
    falling = 2 + 3 * np.exp(-np.arange(300) / 50) + rng.normal(0, 0.1, 300)
    assert watched(falling)[1] == []
    falling[100] += 3
    falling[[200, 201, 202]] += 5
    falling[250] = np.nan
    watch, log = watched(falling)
    assert log == [("spike", 101), ("spike", 201), ("skipped", 251)]
    assert watch.spikes == 2
    assert "step 101: the loss jumps to" in capsys.readouterr().out
    # Small batches differ much from each other; that is no spike.
    assert len(watched(rng.lognormal(0, 0.5, 2000))[1]) <= 4
    # A level that stays is a jump once.
    assert watched([1.0] * 60 + [5.0] * 60)[1] == [("spike", 61)]
    assert watched([1.0] * 10 + [50.0])[1] == []  # too little to compare with


def test_a_watch_goes_on_where_it_was():
    losses = [*np.linspace(3, 2, 70), 9.0, 9.0, 2.0, 9.0]
    whole, _ = watched(losses)
    first, _ = watched(losses[:71])
    second = train.Watch(first.metrics)
    second.restore(json.loads(json.dumps(first.saved())))
    for step, loss in enumerate(losses[71:], 72):
        second.on_step(None, step, {"loss": loss, "nonfinite": False, "grad_norm": 1})
    assert second.saved() == whole.saved()


# -- killed ----------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_ends_as_if_it_were_not():
    """The short form of `python tests/kill_anywhere.py --kills 50`."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR")  # half written by what is killed
    done = subprocess.run(
        [sys.executable, HERE / "kill_anywhere.py", "--kills", "3", "--steps", "24"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 kills in" in done.stdout
