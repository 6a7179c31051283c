"""A run of jlora on given batches, as the benchmarks of quality compare it."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

from benchmarks.initialise import _device, _versions
from benchmarks.race import Row, curve


def fine_tune(
    tree: Any, loss_fn: Any, optimizer: Any, key: Any, batches: Iterable[Any]
) -> tuple[Any, Row, Row]:
    """Train a lorafied tree; return it, its figures, and what it ran on.

    Args:
      tree: the parameters.
      loss_fn: as `jlora.train` takes it.
      optimizer: of optax.
      key: of the run.
      batches: a step each.
    """
    import jax

    import jlora
    from jlora import checkpoint, train
    from jlora.train._report import size_of

    state = train.TrainState.create(tree, optimizer, key)
    step = train.make_train_step(loss_fn, optimizer, clip_norm=1.0)

    def one(batch: Any) -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    row = curve(one, batches)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_adapter(f"{folder}/adapter", state.params)
        size = size_of(pathlib.Path(folder))
    row |= {"trainable": jlora.summary(tree).trainable, "mbytes": size / 1e6}
    return state.params, row, {"versions": _versions(), "device": _device(jax)}
