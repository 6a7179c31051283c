r"""Teach a T5 to translate what it does not know yet, with LoRA.

What it shows: the whole of a fine-tuning run with jlora. Low-rank adapters on the query
and value projections (`jlora.lorafy`), training of them alone with validation,
interruption and resumption (`jlora.train.fit`), BLEU before and after, the adapter as a
small file, and the merged model as a Hugging Face folder.

On what: without arguments, on a T5 of 1.2 M parameters and a small corpus of German and
English that come with this file. The model translates sentences about home and garden
well and hardly any about ships and travel; the adapter teaches it those.

How long: a minute on two CPU cores, no connection needed. BLEU on sentences of travel
that it never saw rises from 21 to 61.

    python examples/flan_t5_translate.py

The same code trains on your own text, or on the hub's models and datasets:

    python examples/flan_t5_translate.py --model google/flan-t5-small \
        --dataset wmt/wmt16 --config de-en --train-size 100000 --rank 16 --alpha 32
    python examples/flan_t5_translate.py --model DIR --direction en-cs \
        --train train.en.gz train.cs.gz --targets all-linear
    python examples/flan_t5_translate.py --model DIR --train corpus.parquet --full

Ctrl-C saves and prints the command that continues; --help lists all options. Needs
`pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jlora
from jlora import data, models, tasks, train

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "tiny-t5-de-en"
CODES = ("de", "en")
TRAVEL = str(ASSETS / "corpus" / "travel.train.de")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedSettings(tasks.TranslationSettings):
    """Those of any translation; without a model or text, the embedded ones."""

    @property
    def test_names(self) -> tuple[str, str]:
        """What reports call the two tests."""
        is_embedded = (self.train or [""])[0] == TRAVEL
        return ("travel", "home") if is_embedded else super().test_names

    def with_embedded(self) -> Self:
        """Put the embedded model, and text, where there is none."""
        own = (self.train, self.dataset, self.valid, self.test, self.keep)
        settings = self
        if not self.model and not any(own):
            names = {"train": "travel.train", "valid": "travel.valid",
                     "test": "travel.test", "keep": "home.test"}  # fmt: skip
            files = {
                split: [str(ASSETS / "corpus" / f"{name}.{code}") for code in CODES]
                for split, name in names.items()
            }
            settings = dataclasses.replace(settings, **files)
        return dataclasses.replace(settings, model=self.model or str(EMBEDDED))

    def check(self) -> None:
        """Refuse what does not go together."""
        settings, languages = self.with_embedded(), data.direction(self.direction)
        is_embedded = settings.train != self.train
        tasks.refuse({
            "the embedded corpus is German and English: another --direction needs "
            "--train": is_embedded and {*languages} != {*CODES},
        })  # fmt: skip
        super(EmbeddedSettings, settings).check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(EmbeddedSettings):
    """The same, and what this script does besides."""

    compare: bool = train.option(
        False, "train LoRA and every weight, side by side", group="comparison"
    )


def run(s: Settings) -> None:
    """Load, adapt, train, compare, merge, save, report."""
    s, began = s.with_embedded(), time.perf_counter()
    if s.compare:  # compare_full_vs_lora.py compares more
        with s.claim("compare") as folder:
            tasks.compare("translate", s, folder, ["full", "LoRA"])
        return
    model, params, tokenizer = loaded = s.load(s.model)  # jlora.models.load
    tree = s.adapt(params, s.key)  # jlora.lorafy(params, rank, targets, alpha=alpha)
    summary = jlora.summary(tree)
    task = tasks.Translation(s, loaded)  # text to tokens, to batches of few shapes
    print(summary, *(f"note: {remark}" for remark in task.remarks), sep="\n")

    with s.claim("translate") as folder:
        before = task.answer("before", tree, folder)
        fit = s.fit(  # jlora.train.fit with optax.adamw
            task.loss_fn, tree, task.train, folder, task.valid, count=task.count,
            base=params,
        )  # fmt: skip
        after = task.answer("after", fit.params, folder)

        merged = jlora.merge(fit.params)  # a plain tree again
        models.save(model, merged, folder.merged, overwrite=True)
        if folder.writes:  # of several processes the first
            tokenizer.save_pretrained(folder.merged)
        batch = next(iter(next(iter(task.tests.values()))))
        same = task.translate(merged, batch) == task.translate(fit.params, batch)
        facts = {
            **tasks.facts_of(s, summary, fit),
            "merged model": "translates a batch as the unmerged does, in " + s.products
            if same
            else "some translations differ from the unmerged model's by rounding, in "
            + s.products,
            "whole script": f"{time.perf_counter() - began:.0f} s",
        }
        task.report(folder, facts, before, after, summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return train.command_line(Settings, run, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
