"""Seconds to put adapters on the shapes of an 11-billion-parameter T5 (T5-XXL)."""

from __future__ import annotations

from typing import Any

from benchmarks import _results
from benchmarks._cases import T5_XXL, TINY
from benchmarks._race import Entry, race

COLUMNS = ("model", "parameters", "targets", "adapters", "median_s", "error")
TARGETS: dict[str, Any] = {
    "query value": ["query", "value"],
    "all-linear": "all-linear",
}


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    maker = "benchmarks.lorafy:Lorafy"
    entries = [
        Entry(name, maker, {"targets": targets, "quick": options.quick})
        for name, targets in TARGETS.items()
    ]
    result = race(entries, options)
    rows = []
    for name in TARGETS:
        median = result.median(name)
        facts = result.facts.get(name, {})
        seconds = None if median is None else median / 1e3
        rows.append(
            {"model": "t5-xxl", "targets": name, "median_s": seconds, **facts,
             "error": result.errors.get(name)}
        )  # fmt: skip
    print(_results.table(rows, COLUMNS))
    _results.save(options, result.about, rows)
    return rows


class Lorafy:
    """`jlora.lorafy` of a tree of shapes."""

    def __init__(self, targets: Any, quick: bool) -> None:
        import jax
        import jax.numpy as jnp

        from jlora import models

        config = {**T5_XXL, **(TINY["t5"] if quick else {})}
        model = models.T5(models.T5Config.from_dict(config))
        ids = jnp.zeros((1, 1), jnp.int32)
        made = jax.eval_shape(model.init, jax.random.key(0), ids, None, ids)
        self.params, self.targets = made["params"], targets
        trainable = len(jax.tree.leaves(self.step()))
        before = jax.tree.leaves(self.params)
        self.facts = {
            "parameters": sum(x.size for x in before),
            "adapters": (trainable - len(before)) // 3,  # a, b and a scale each
        }

    def step(self) -> Any:
        """Put adapters on once."""
        import jlora

        return jlora.lorafy(self.params, 8, self.targets)
