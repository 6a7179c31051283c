"""Generated tokens a second: adapted, merged, and PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks._cases import Case
from benchmarks._choice import cases, contenders, described
from benchmarks._race import Entry, race

CPU = (("t5-small-8x64", 8, None), ("gpt2-4x128", 8, None))
GPU = (("t5-base-32x512", 8, None),)
OWN = ("jlora", "merged")
COLUMNS = ("case", "contender", "beams", "tokens_per_s", "median_ms", "to_merged",
           "to_peft", "error")  # fmt: skip


def main(options: Any) -> list[_results.Row]:
    """Measure, print a table, save."""
    rows, about = [], {}
    for one in cases(options, CPU, GPU):
        for beams in options.beams:
            tokens = min(options.tokens, 4) if options.quick else options.tokens
            names = contenders(options, (*OWN, "PEFT"))
            result = race([_entry(one, n, beams, tokens) for n in names], options)
            about |= result.about
            for name in names:
                median = result.median(name)
                made = one.batch * tokens
                rows.append(
                    {
                        **described(one),
                        "contender": name,
                        "beams": beams,
                        "tokens_per_s": None if median is None else 1e3 * made / median,
                        "median_ms": median,
                        "to_merged": result.ratio(name, "merged"),
                        "to_peft": result.ratio(name, "PEFT"),
                        "error": result.errors.get(name),
                    }
                )
    print(_results.table(rows, COLUMNS))
    _results.save(options, about, rows)
    return rows


def _entry(one: Case, name: str, beams: int, tokens: int) -> Entry:
    arguments = {"case": dataclasses.asdict(one), "beams": beams, "tokens": tokens}
    if name == "PEFT":
        maker = "benchmarks._peers_torch:Generation"
        return Entry(name, maker, arguments, name)
    merged = name == "merged"
    return Entry(
        name, "benchmarks.generate:Generation", {**arguments, "merged": merged}
    )


class Generation:
    """jlora's generation, adapters live or folded in."""

    def __init__(
        self, case: Mapping[str, Any], beams: int, tokens: int, merged: bool
    ) -> None:
        import jlora
        from benchmarks._workload import workload

        self.work = workload(case)
        tree = self.work.lorafied()
        self.params = jlora.merge(tree) if merged else tree
        self.transform = None if merged else jlora.lora
        self.settings = {
            "num_beams": beams,
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
        }
        self.step()
        self.facts = {"tokens": tokens * self.work.case.batch}

    def step(self) -> None:
        """Generate once."""
        from jlora import models

        tokens = models.generate(
            self.work.model,
            self.params,
            self.work.batch["input_ids"],
            transform=self.transform,
            **self.settings,
        )
        tokens.block_until_ready()
