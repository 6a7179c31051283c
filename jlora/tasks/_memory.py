"""What a training step takes, by XLA's account."""

from __future__ import annotations

from typing import Any

from jlora import train
from jlora.tasks._losses import Batch, Loss

Tree = Any


def step_memory(
    loss_fn: Loss, tree: Tree, tx: Any, batch: Batch, **options: Any
) -> dict[str, int] | None:
    """Return what a training step takes, in bytes, as XLA says of the program.

    Args:
      loss_fn: the loss.
      tree: a lorafied tree.
      tx: the optimiser.
      batch: one batch.
      **options: those of `jlora.train.make_train_step`.

    Returns:
      `arguments`: parameters, optimiser's state and batch; `temporaries`: what it needs
      while it runs. None where the device's compiler does not say.
    """
    state = train.TrainState.create(tree, tx)
    lowered = train.make_train_step(loss_fn, tx, **options).lower(state, batch)
    found = lowered.compile().memory_analysis()
    return found and {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
