"""Loss after some steps of AdamW, LoRA+, LoRA-FA and Riemannian AdamW on real text.

Each trains the same factors on the same batches in the same order at each learning
rate, with the same warm-up and cosine. `loss` is the mean over the last tenth of the
steps, `held_out` that of text no step has seen, both a token. `step_mflop`,
`update_mflop` and `update_mb` are what XLA counts of the compiled step and of the
update alone, `state_mb` what the optimiser holds.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.initialise import _device, _schedule, _versions, text
from benchmarks.race import Row, Rows

HELD_OUT = 16  # batches
Make = Callable[[Any, Any], Any]


def _lora_plus(rate: Any, tree: Any) -> Any:
    import optax

    from jlora.optim import lora_plus

    return optax.chain(optax.adamw(rate, weight_decay=0), lora_plus(4))


def _lora_fa(rate: Any, tree: Any) -> Any:
    import optax

    from jlora.optim import lora_fa

    return lora_fa(optax.adamw(rate, weight_decay=0), tree)


def _riemannian(rate: Any, tree: Any) -> Any:
    import optax

    from jlora.optim import riemannian

    return optax.chain(riemannian(), optax.adamw(rate, weight_decay=0))


def _adamw(rate: Any, tree: Any) -> Any:
    import optax

    return optax.adamw(rate, weight_decay=0)


CONTENDERS: dict[str, Make] = {
    "AdamW": _adamw,
    "LoRA+, ratio 4": _lora_plus,
    "LoRA-FA": _lora_fa,
    "Riemannian AdamW": _riemannian,
}
COLUMNS = (
    "case", "lr", "contender", "loss", "held_out", "median_ms", "step_mflop",
    "update_mflop", "update_mb", "state_mb",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each learning rate."""
    import jax

    import jlora
    from jlora import models, train

    model, params = models.load(options.model)
    steps, size = (4, 4) if options.quick else (options.steps, options.batch)
    held = 2 if options.quick else HELD_OUT
    batches, held_out = text(options, model, steps, size, held)
    rank = min(options.rank, 2) if options.quick else options.rank

    def loss(params: Any, batch: Any, key: Any = None) -> Any:
        hidden, kernel = model.apply(
            {"params": params}, batch["input_ids"], batch["attention_mask"],
            models.shift_right(batch["labels"], model.config), method="features",
        )  # fmt: skip
        return train.linear_cross_entropy(hidden, kernel, batch["labels"])

    every = options.layers == ["all-linear"]
    tree = jlora.lorafy(
        params, rank, "all-linear" if every else options.layers, alpha=2 * rank,
        exclude=["lm_head"] if every else (),
    )  # fmt: skip
    title = f"{pathlib.Path(options.model).name}, rank {rank}, {steps} x {size} pairs"
    about = {"jlora": {"versions": _versions(), "device": _device(jax)}}
    for rate in options.rates[: 1 if options.quick else None]:
        rows = []
        for name in options.contenders or [*CONTENDERS]:
            tx = CONTENDERS[name](_schedule(rate, steps), tree)
            row = {"case": title, "lr": rate, "contender": name}
            rows.append(row | _trained(loss, tree, tx, batches, held_out))
        yield rows, about


def _trained(
    loss: Any, tree: Any, tx: Any, batches: list[Any], held_out: list[Any]
) -> Row:
    """What a run comes to, and what its step costs."""
    import jax

    from jlora import train

    state = train.TrainState.create(tree, tx)
    step = train.make_train_step(loss, tx)
    half, whole = state.trainable, step.lower(state, batches[0]).compile()
    update = jax.jit(tx.update).lower(half, state.opt_state, half).compile()
    counted = update.cost_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    losses, times = [], []
    for batch in batches:
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        times.append((time.perf_counter() - begun) * 1e3)
    tail = losses[-max(1, len(losses) // 10) :]
    measure = train.make_eval_step(lambda p, batch: {"loss": loss(p, batch)})
    after = train.evaluate(measure, state.params, held_out)
    return {
        "loss": sum(tail) / len(tail),
        "losses": losses,
        "held_out": after["loss"],
        "median_ms": sorted(times)[len(times) // 2],
        "step_mflop": whole.cost_analysis()["flops"] / 1e6,
        "update_mflop": counted["flops"] / 1e6,
        "update_mb": counted["bytes accessed"] / 1e6,
        "state_mb": held / 1e6,
    }
