"""Generated tokens a second: adapted, merged, and PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.cases import Case, cases
from benchmarks.race import Contender, Rows, race

CPU = (Case("t5-small-8x64"), Case("gpt2-4x128"))
GPU = (Case("t5-base-32x512"),)
NAMES = ("jlora", "merged", "PEFT")
COLUMNS = ("case", "contender", "beams", "tokens_per_s", "median_ms", "to_merged",
           "to_peft", "error")  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each case and number of beams."""
    tokens = min(options.tokens, 4) if options.quick else options.tokens
    names = options.contenders or NAMES
    for one in cases(options, *(GPU if options.gpu else CPU)):
        for beams in options.beams:
            arguments = {"case": one.json, "beams": beams, "tokens": tokens}
            result = race([_entry(name, arguments) for name in names], options)
            rows = result.rows({"case": one.title, "beams": beams}, names)
            for row in rows:
                made = one.batch * tokens
                row["tokens_per_s"] = result.rate(row["contender"], made)
            yield rows, result.about


def _entry(name: str, arguments: Mapping[str, Any]) -> Contender:
    if name == "PEFT":
        return Contender(name, "benchmarks.torch_steps:generation", arguments, name)
    return Contender(
        name, "benchmarks.generate:generation", {**arguments, "kind": name}
    )


def generation(case: Mapping[str, Any], beams: int, tokens: int, kind: str) -> Any:
    """Generation with adapters live or folded in; runs in a worker."""
    import jlora
    from benchmarks.work import workload
    from jlora import models

    work = workload(Case(**case))
    params = work.lorafied(work.params)
    settings: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    if kind == "merged":
        params = jlora.merge(params)
    else:
        settings["transform"] = jlora.lora
    ids = work.batch["input_ids"]

    def step() -> Any:
        return models.generate(work.model, params, ids, num_beams=beams, **settings)

    return step, {}
