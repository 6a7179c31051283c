r"""Full fine-tuning, LoRA, DoRA and QLoRA on one task, side by side.

What it shows: what an adapter costs in quality and what it saves, measured in one run
with equal data, order and steps. Quality on what was learnt and on what should not be
forgotten, trained parameters, time of a step, memory at its peak, megabytes on disk: a
table, a chart, and advice whose numbers are this run's.

On what: without arguments, the translation of flan_t5_translate.py, a T5 of 1.2 M
parameters and a small corpus of German and English that come with this file.

How long: two to three minutes on two CPU cores, no connection needed.

    python examples/compare_full_vs_lora.py
    python examples/compare_full_vs_lora.py --methods full LoRA --rank 4 --steps 200

Other models and text are those of flan_t5_translate.py, by the same options:

    python examples/compare_full_vs_lora.py --model google/flan-t5-small \
        --dataset wmt/wmt16 --config de-en --train-size 100000 --targets all-linear

Needs `pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the embedded corpus's settings

import flan_t5_translate

from jlora import tasks, train
from jlora.train import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flan_t5_translate.EmbeddedSettings):
    """Those of the translation example, and what to compare."""

    methods: list[str] = option(
        [*tasks.METHODS], "what to compare (all)", choices=tuple(tasks.METHODS),
        group="comparison")  # fmt: skip

    def check(self) -> None:
        """Refuse what the methods say already."""
        super().check()
        tasks.refuse({
            "--methods says what is trained; leave --full, --dora and --quantize out": (
                self.full or self.dora or self.quantize
            ),
            "--resume: a comparison is not resumed; its runs are": self.resume,
        })  # fmt: skip


def run(s: Settings) -> None:
    """Train by each method, then say what the figures mean."""
    with s.claim("compare") as folder:
        tasks.compare("translate", s.with_embedded(), folder, s.methods)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return train.command_line(Settings, run, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
