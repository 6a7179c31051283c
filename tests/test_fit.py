"""A run in one call: its log, validation, best adapter, interruption, resumption."""

import json
import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tools import compilations

import jlora
from jlora import checkpoint, data, train
from jlora.train import _ahead, _fit

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)
Y = X @ RNG.normal(size=(3, 2)).astype(np.float32)


class Stream:
    """Batches of a small regression; their order follows from the step alone."""

    def __init__(self, sizes=(4,)):
        self.sizes = sizes

    def __len__(self):
        return 10

    def batch(self, step):
        rows = np.random.default_rng(step).integers(
            0, 40, self.sizes[step % len(self.sizes)]
        )
        return {"x": X[rows], "y": Y[rows]}

    def stream(self, step):
        while True:
            yield self.batch(step)
            step += 1


VALID = [{"x": X[:20], "y": Y[:20]}, {"x": X[20:], "y": Y[20:]}]


def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["dense"]["kernel"] - batch["y"]) ** 2)


def params():
    tree = {"dense": {"kernel": jnp.ones((3, 2))}}
    return jlora.lorafy(tree, 1, ["dense"], key=jax.random.key(1))


def fit(
    folder, steps=24, resume=False, loss=loss_fn, sizes=(4,), valid=VALID, **options
):
    claim = train.RunFolder.resume if resume else train.RunFolder.claim
    with claim(folder, {"seed": 1}) as run:
        rate = optax.constant_schedule(0.1)
        options = {"learning_rate": rate, "log_every": 10, **options}
        return train.fit(
            loss, params(), optax.adam(0.1), Stream(sizes), run,
            steps=steps, valid=valid, count=lambda b: len(b["x"]), unit="rows", **options,
        )  # fmt: skip


def rows(folder, event):
    return train.MetricsLog(folder / "metrics.jsonl").rows(event)


def same(one, two):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_learns_logs_and_keeps_the_best(tmp_path):
    run = tmp_path / "run"
    result = fit(run, eval_every=8)
    valid = rows(run, "valid")
    assert [row["step"] for row in valid] == [0, 8, 16, 24]
    best = min(valid, key=lambda row: row["loss"])
    assert result.best_loss == best["loss"] < 0.5 * valid[0]["loss"]
    assert result.best_step == best["step"]
    assert result.first_loss == valid[0]["loss"]
    logged = rows(run, "train")
    assert [row["step"] for row in logged] == [10, 20, 24]
    assert all(row["rows_per_second"] > 0 for row in logged)
    assert all(row["learning_rate"] == pytest.approx(0.1) for row in logged)
    kept = checkpoint.load_adapter(
        run / "adapter", {"dense": {"kernel": jnp.ones((3, 2))}}
    )
    same(kept, result.params)
    assert result.steps == 24
    assert result.epoch == 10
    assert 0 < result.step_seconds < result.seconds
    assert "24 steps (2.40 epochs)" in result.facts()["training"]
    assert result.compilations == 1
    assert max(map(len, (run / "metrics.jsonl").read_text().splitlines())) < 200


def test_the_best_is_kept_though_later_ones_are_worse(tmp_path):
    rate = lambda step: jnp.where(step < 8, 0.1, -0.3)
    with train.RunFolder.claim(tmp_path / "run", {}) as run:
        result = train.fit(
            loss_fn, params(), optax.adam(rate), Stream(), run,
            steps=16, valid=VALID, eval_every=4,
        )  # fmt: skip
    assert result.best_step == 8
    measured = train.evaluate(
        train.make_eval_step(lambda p, b: {"loss": loss_fn(p, b, None)}),
        result.params,
        VALID,
    )
    assert measured["loss"] == pytest.approx(result.best_loss)


def test_the_mean_loss_of_the_log_is_that_of_its_steps(tmp_path):
    losses = []

    class Collect(train.Callback):
        def on_step(self, loop, step, metrics):
            assert step == len(losses) + 1
            losses.append(metrics["loss"])

    fit(tmp_path / "run", 20, callbacks=[Collect()])
    for row in rows(tmp_path / "run", "train"):
        mean = np.mean(losses[row["step"] - 10 : row["step"]])
        assert row["loss"] == pytest.approx(mean, rel=1e-5)


def test_validation_comes_ten_times_in_a_short_run(tmp_path):
    fit(tmp_path / "run", 20)
    assert [row["step"] for row in rows(tmp_path / "run", "valid")] == [
        *range(0, 21, 2)
    ]
    fit(tmp_path / "long", 150)  # once an epoch of 10 steps
    assert len(rows(tmp_path / "long", "valid")) == 16


class StopAt(train.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, loop, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [1, 9, 16])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, at, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    want = fit(whole, eval_every=8)
    with pytest.raises(
        train.Interrupted, match=r"step \d+ of 24. To continue:"
    ) as stop:
        fit(stopped, eval_every=8, callbacks=[StopAt(at)])
    assert f"--output {stopped} --resume" in str(stop.value)
    (stopped / "metrics.jsonl").open("a").write(
        '{"event": "train", "step": 23, "loss": 1.0}\n{"event": "tr'
    )
    got = fit(stopped, resume=True, eval_every=8)
    same(got.state.trainable, want.state.trainable)
    same(got.params, want.params)
    assert (got.first_loss, got.best_loss) == (want.first_loss, want.best_loss)
    for event in ("train", "valid"):
        losses = [
            [(r["step"], r["loss"]) for r in rows(f, event)] for f in (whole, stopped)
        ]
        assert losses[0] == losses[1]


def test_a_run_is_extended(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(run, 12, eval_every=6)
    again = fit(run, 12, resume=True, eval_every=6)
    assert again.steps == 12
    got, want = fit(run, 24, resume=True, eval_every=6), fit(whole, 24, eval_every=6)
    same(got.params, want.params)
    assert [row["step"] for row in rows(run, "valid")] == [0, 6, 12, 18, 24]
    with pytest.raises(jlora.OptionError, match="has made 24 steps already"):
        fit(run, 12, resume=True)


def test_without_validation_the_last_adapter_is_kept(tmp_path):
    result = fit(tmp_path / "run", 7, valid=None)
    assert math.isnan(result.best_loss)
    assert result.best_step == 7
    same(result.params, result.state.params)
    assert "validation loss" not in result.facts()


def nan_in_validation(params, batch, key):
    loss = loss_fn(params, batch, key)
    return loss if batch["x"].shape[0] == 4 else loss * jnp.nan


def test_a_validation_loss_of_nan_loses_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.warns(jlora.JloraWarning) as warned:
        result = fit(run, 12, loss=nan_in_validation, eval_every=6)
    said = [str(w.message) for w in warned]
    assert sum("validation loss is nan" in text for text in said) == 3
    assert "kept is that of the last step, 12" in said[-1]
    same(result.params, result.state.params)
    assert [row["loss"] for row in rows(run, "valid")] == [None] * 3
    assert json.loads((run / "settings.json").read_text()) == {"seed": 1}
    train.plot_losses(train.MetricsLog(run / "metrics.jsonl"), run / "loss.png")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_loss_of_nan_stops_and_says_what_is_kept(tmp_path):
    def loss(params, batch, key):
        value = loss_fn(params, batch, key)
        training = batch["x"].shape[0] == 4
        return jnp.where(training & (value < 0.5), jnp.nan, value)

    run = tmp_path / "run"
    with pytest.raises(jlora.NonFiniteError) as error:
        fit(run, 100, loss=loss, eval_every=2)
    assert "the loss is nan" in str(error.value)
    assert f"kept in {run / 'adapter'}" in str(error.value)
    assert (run / "adapter").is_dir()


def test_the_bar_moves_at_every_step_and_says_what_is_compiled(tmp_path, monkeypatch):
    import tqdm

    seen = []

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            seen.append(n)
            super().update(n)

        def set_postfix_str(self, s="", refresh=True):
            if s.isalpha():
                seen.append(s)
            super().set_postfix_str(s, refresh)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    result = fit(tmp_path / "run", 6, sizes=(4, 4, 5))
    assert [n for n in seen if n == 1] == [1] * 6
    assert seen.count("compiling") == 2 == result.compilations
    assert seen[0] == "compiling"
    assert seen.count("validating") == 6
    assert seen[-1] == "saving"


def test_a_second_signal_interrupts_at_once():
    from jlora.train._loop import stop_signals

    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_there_are_no_signals(tmp_path):
    import threading

    results = []
    thread = threading.Thread(target=lambda: results.append(fit(tmp_path / "run", 3)))
    thread.start()
    thread.join()
    assert results[0].steps == 3


def test_metrics_of_a_loss_are_validated_too(tmp_path):
    def loss(params, batch, key):
        value = loss_fn(params, batch, key)
        return value, {"root": jnp.sqrt(value)}

    fit(tmp_path / "run", 4, loss=loss, eval_every=4)
    assert all("root" in row for row in rows(tmp_path / "run", "valid"))


def test_schedules():
    for decay, want in [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)]:
        rate = train.warmup_schedule(1.0, 12, warmup=4, decay=decay)
        got = [float(rate(step)) for step in (0, 2, 4, 8)]
        np.testing.assert_allclose(got, [0, 0.5, 1, want], rtol=1e-6)
    assert float(train.warmup_schedule(1.0, 2, warmup=20)(1)) == 1.0
    with pytest.raises(jlora.OptionError, match="decay='step': expected one of"):
        train.warmup_schedule(1.0, 12, decay="step")


def test_reports_escape_and_tables_align(tmp_path):
    report = train.Report("Title").table(["a|b", "c"], [["x\ny", 1]]).items([])
    assert "| a\\|b | c |" in str(report)
    assert "| x y | 1 |" in str(report)
    report.write(tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == f"{report}\n"
    assert {"command", "versions", "machine", "device", "peak memory"} <= {
        *train.machine()
    }


def shifted_fit(folder, original, **options):
    tree = jlora.lorafy(original, 1, ["dense"], init="pissa")
    claim = train.RunFolder.resume if folder.exists() else train.RunFolder.claim
    with claim(folder, {}) as run:
        return train.fit(
            loss_fn, tree, optax.adam(0.1), Stream(), run,
            steps=12, valid=VALID, eval_every=12, **options,
        )  # fmt: skip


def test_an_adapter_of_a_shifted_base_loads_on_the_original(tmp_path):
    original = {"dense": {"kernel": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)}}
    got = shifted_fit(tmp_path / "run", original, base=original)
    assert got.best_step == 12
    kept = checkpoint.load_adapter(tmp_path / "run/adapter", original)
    assert kept["dense"]["kernel"].adapters[""].rank == 2
    same(kept, got.params)
    want = jlora.merge(got.state.params)["dense"]["kernel"]
    merged = jlora.merge(kept)["dense"]["kernel"]
    np.testing.assert_allclose(merged, want, atol=1e-5)
    assert jnp.abs(merged - original["dense"]["kernel"]).max() > 0.1
    again = shifted_fit(tmp_path / "run", original, base=original)  # it has ended
    same(again.params, got.params)
    # Without the original it is of the shifted kernels, and says so.
    alone = shifted_fit(tmp_path / "alone", original)
    assert alone.params["dense"]["kernel"].adapters[""].rank == 1
    with pytest.raises(jlora.CheckpointError, match=r"jlora\.init\.unshift\(tree"):
        checkpoint.load_adapter(tmp_path / "alone/adapter", original)
    shifted = jlora.lorafy(original, 1, ["dense"], init="pissa")
    same(
        checkpoint.load_adapter(
            tmp_path / "alone/adapter", jlora.without_adapters(shifted)
        ),
        alone.params,
    )


# -- programs compiled before they are called -----------------------------------------


def of_two_shapes(loss=loss_fn, **options):
    """A run over batches whose rows are padded to one of two lengths."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, 7, n).astype(np.int32) for n in (3, 8) * 8]
    columns = {"input_ids": rows, "target": rng.normal(size=16).astype(np.float32)}
    batches = {
        name: data.Batches(columns, [(4,), (8,)], 4, 0, seed)
        for name, seed in (("train", 1), ("valid", None))
    }

    def count_and_loss(params, batch, key):
        ids = batch["input_ids"]
        x = jnp.stack([jnp.sum(ids == n, 1) for n in (1, 2, 3)], 1) / ids.shape[1]
        return loss(params, {"x": x, "y": batch["target"][:, None]}, key)

    def run(folder):
        with train.RunFolder.claim(folder, {}) as place:
            return train.fit(
                count_and_loss, params(), optax.adam(0.1), batches["train"], place,
                steps=6, valid=batches["valid"], eval_every=3, **options,
            )  # fmt: skip

    return run


def test_programs_compiled_ahead_change_nothing_and_are_those_called(
    tmp_path, monkeypatch
):
    threads = []

    made = _ahead.Ahead._compile

    def noted(*args):
        made(*args)
        threads.append(threading.current_thread().name)

    monkeypatch.setattr(_ahead.Ahead, "_compile", noted)
    found, programs = {}, {}

    def run(ahead):
        found[ahead] = of_two_shapes(compile_ahead=ahead)(tmp_path / f"{ahead}")

    for ahead in (False, True):
        jax.clear_caches()
        programs[ahead] = compilations(run, (ahead,))
    same(found[False].params, found[True].params)
    assert found[False].best_loss == found[True].best_loss
    assert found[False].compilations == found[True].compilations == 2
    assert programs[False] == programs[True]
    assert [name.startswith("jlora-compile") for name in threads] == [True] * 4


def test_what_goes_wrong_ahead_is_raised_by_the_call(tmp_path):
    def wrong(params, batch, key):
        return jnp.sum(batch["x"] @ params["dense"]["kernel"][:2])

    run = of_two_shapes(wrong, compile_ahead=True)
    with pytest.raises(TypeError, match="dot_general"):
        run(tmp_path / "wrong")


def test_ahead_is_for_one_process_without_a_mesh():
    assert _fit._is_ahead(True, {})
    assert not _fit._is_ahead(False, {})
    assert not _fit._is_ahead(True, {"mesh": jax.make_mesh((1,), ("data",))})
    assert not _fit._is_ahead(True, {"parallel": "pmap"})


def test_settings_of_another_thread_are_seen(monkeypatch):
    """A program made under others than the call's would be made for nothing."""
    asked = []
    with jax.default_matmul_precision("highest"):
        ahead = _ahead.Ahead()
        ahead.add("f", [{"x": np.ones(3)}], asked.append)
        ahead.wait("f", {"x": np.zeros(3)})
        ahead.close()
    assert asked == []
