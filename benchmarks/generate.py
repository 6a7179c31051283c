"""Generated tokens a second: adapted, merged, and PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Row, Rows, chosen, race

CPU = (Case("t5-small-8x64"), Case("gpt2-4x128"))
GPU = (Case("t5-base-32x512"),)
CONTENDERS: dict[str, tuple[str, str, Row]] = {
    "jlora": ("jax", "generate:generation", {"merged": False}),
    "merged": ("jax", "generate:generation", {"merged": True}),
    "PEFT": ("PEFT", "torch_steps:generation", {}),
}
COLUMNS = ("case", "contender", "beams", "tokens_per_s", "median_ms", "to_merged",
           "to_peft", "error")  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case and number of beams."""
    tokens = min(options.tokens, 4) if options.quick else options.tokens
    names = options.contenders or [*CONTENDERS]
    for one in cases(options, *(GPU if options.gpu else CPU)):
        for beams in options.beams:
            arguments = {"case": one.json, "beams": beams, "tokens": tokens}
            result = race(chosen(CONTENDERS, names, **arguments), options)
            rows = result.rows({"case": one.title, "beams": beams}, names)
            for row in rows:
                made = one.batch * tokens
                row["tokens_per_s"] = result.rate(row["contender"], made)
            yield rows, result.about


def generation(case: Mapping[str, Any], beams: int, tokens: int, merged: bool) -> Any:
    """Generation with adapters live or folded in; runs in a worker."""
    import jlora
    from benchmarks.work import workload
    from jlora import models

    work = workload(Case(**case))
    params = work.lorafied(work.params)
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    if merged:
        params = jlora.merge(params)
    else:
        settings["transform"] = jlora.lora
    ids = work.batch["input_ids"]

    def step() -> Any:
        return models.generate(work.model, params, ids, num_beams=beams, **settings)

    return step, {}
