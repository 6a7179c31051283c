"""Batches ahead of the step: the same ones, in order, and no step that waits."""

import itertools
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stream_rows
from test_fit import VALID, loss_fn, params, same
from test_fit import Stream as Numbered

import jlora
from jlora import data, train
from jlora.train._prefetch import Placed, Prefetched


def test_the_thread_is_ahead_and_no_further():
    made, wanted = [], threading.Semaphore(0)

    def source():
        for i in itertools.count():
            made.append(i)
            wanted.release()
            yield np.full(2, i)

    batches = Prefetched(source(), jax.device_put, ahead=2, most=7)
    for _ in range(3):  # two wait in the queue, one in the thread's hand
        assert wanted.acquire(timeout=20)
    assert not wanted.acquire(timeout=0.2)
    got = list(batches)
    assert made == list(range(7))
    assert all(isinstance(b, Placed) and isinstance(b.device, jax.Array) for b in got)
    assert [int(b.host[0]) for b in got] == [int(b.device[0]) for b in got] == made
    batches.close()
    assert not batches._thread.is_alive()


def test_no_step_waits_where_batches_are_quicker():
    ready = threading.Semaphore(0)

    def source():
        for i in itertools.count():
            yield np.full(2, i)
            ready.release()  # it is in the queue

    batches = Prefetched(source(), None, ahead=2, most=50)
    taken = iter(batches)
    assert ready.acquire(timeout=20)
    next(taken)
    for _ in range(48):
        assert ready.acquire(timeout=20)
        next(taken)
    assert batches.waits == 0


def test_steps_that_wait_are_counted():
    asked = threading.Event()

    def source():
        asked.wait()
        for i in range(5):
            while late.waits < i:  # asked for before it is made
                time.sleep(0.001)
            yield np.full(2, i)

    late = Prefetched(source(), None, ahead=2, most=5)
    threading.Timer(0.05, asked.set).start()
    assert len(list(late)) == 5
    assert late.waits == 4
    assert late.seconds > 0.01


def test_what_goes_wrong_is_raised_at_its_batch():
    def source():
        yield {"x": np.ones(2)}
        yield {"x": "text"}

    batches = iter(Prefetched(source(), jax.device_put, ahead=2, most=9))
    next(batches)
    with pytest.raises(jlora.DataError, match="'x': text"):
        next(batches)


def test_a_source_that_ends():
    assert len(list(Prefetched(iter([np.ones(1)] * 3), None, ahead=2, most=9))) == 3


def test_closed_while_it_is_ahead():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield np.ones(1)
        finally:
            closed.set()

    batches = Prefetched(source(), None, ahead=2, most=10**9)
    next(iter(batches))
    batches.close()
    assert closed.is_set()


def fit(folder, stream, loss=loss_fn, steps=24, resume=False, **options):
    claim = train.RunFolder.resume if resume else train.RunFolder.claim
    with claim(folder, {"seed": 1}) as run:
        return train.fit(
            loss, params(), optax.adam(0.1), stream, run, steps=steps, **options
        )


def moved(result):
    return result.state.trainable, result.state.opt_state, result.state.step


def test_a_run_is_the_same_with_and_without(tmp_path):
    ahead = fit(tmp_path / "a", Numbered((4, 3)), valid=VALID)
    between = fit(tmp_path / "b", Numbered((4, 3)), valid=VALID, prefetch=0)
    same(moved(ahead), moved(between))
    assert ahead.compilations == between.compilations == 2
    assert "beside the first waited" in ahead.facts()["data"]
    rows = train.MetricsLog(tmp_path / "a" / "metrics.jsonl").rows("train")
    assert all(row["data_wait"] >= 0 for row in rows)


def test_ids_are_checked_in_every_batch(tmp_path):
    """They lie on the device by then, and are looked at on the host."""

    class Late(Numbered):
        def batch(self, step):
            return {"ids": np.array([0, 1, 2 if step < 5 else 7])}

    def by_id(params, batch, key):
        return jnp.mean(params["dense"]["kernel"][batch["ids"]] ** 2)

    with pytest.raises(jlora.DataError, match="'ids'"):
        fit(tmp_path / "run", Late(), by_id)


# --------------------------------------------------------------- streams with a place


def text_loss(params, batch, key):
    ids = jnp.asarray(batch["input_ids"], jnp.float32)
    x = jnp.stack([ids.mean(1), ids.max(1), ids.min(1)], 1) / 50
    return jnp.mean((x @ params["dense"]["kernel"] - 0.3) ** 2)


def streaming(folder, **options):
    for i, lines in enumerate((stream_rows.texts(17), stream_rows.texts(23, 1, 17))):
        (folder / f"{i}.txt").write_text("\n".join(lines))
    files = data.stream_files(str(folder / "*.txt"))
    memory = data.in_memory({"text": stream_rows.texts(9, 3)})
    return data.Streaming(
        [files, memory],
        stream_rows.encode,
        size=4,
        shapes=[(4, 4), (8, 8)],
        weights=[3, 1],
        window=3,
        seed=3,
        **options,
    )


class StopAt(train.Callback):
    """Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, loop, step, metrics):
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_and_on_with_a_stream(tmp_path, workers):
    whole = fit(tmp_path / "whole", streaming(tmp_path), text_loss)
    stream = streaming(tmp_path, workers=workers)
    for number, stop in enumerate((7, 16)):
        with pytest.raises(train.Interrupted, match=rf"step ({stop}|{stop + 1}) of 24"):
            fit(
                tmp_path / "cut",
                stream,
                text_loss,
                resume=number > 0,
                callbacks=[StopAt(stop)],
            )
    parts = fit(tmp_path / "cut", stream, text_loss, resume=True)
    same(moved(parts), moved(whole))
    assert parts.steps == 24
    assert parts.epoch is None
    assert "24 steps in" in parts.facts()["training"]
    assert parts.compilations <= 2
    assert not [t for t in threading.enumerate() if t.name == "jlora-prefetch"]


def test_batches_are_put_on_a_mesh_ahead(tmp_path):
    mesh = jlora.sharding.make_mesh("data=2", devices=jax.devices()[:2])

    def lay(folder, **options):
        return fit(tmp_path / folder, Numbered(), mesh=mesh, steps=6, **options)

    one, two = lay("ahead"), lay("between", prefetch=0)
    same(moved(one), moved(two))
    assert one.compilations == two.compilations
    step = train.make_train_step(loss_fn, optax.adam(0.1), mesh=mesh)
    placed = step.place(Numbered().batch(0))["x"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    assert len(placed.sharding.device_set) == 2


def test_a_stream_that_ends_early(tmp_path):
    class Finite(Numbered):
        def stream(self, step):
            return itertools.islice(super().stream(step), 5)

    with pytest.raises(jlora.DataError, match="ended after step 5 of 24"):
        fit(tmp_path / "run", Finite())
