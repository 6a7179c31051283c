r"""Teach a language model to answer (SFT), and then which answers are wanted (DPO).

What it shows: the two trainings that make an assistant of a model that only continues
text. Supervised fine-tuning learns the assistant's answers in conversations, through
the tokenizer's chat template, with labels on the answers alone. Direct preference
optimisation learns from pairs of answers which one is wanted; the model it measures
against is the same base without its adapter, so no second copy is kept
(`jlora.without_adapters`). Each writes an adapter, a merged Hugging Face folder with
its chat template, a report, and plots.

On what: without arguments, on a Llama of 0.6 M parameters and small sets that lie
beside this file. The model has read about forty countries and some small talk, and has
never seen a question answered. The conversations answer questions, a quarter politely
and the rest rudely; the preferences choose the polite answer. Measured on ten countries
that neither speaks of: how many answers are true, and how many polite.

How long: a minute or two on two CPU cores, no connection needed. Of the model's answers
22% are true and 1% polite; after SFT 95% are true and none is polite; after DPO all
are polite, and 95% true. DPO alone, `--sft-weight 0`, leaves 46% of them true: it
makes both answers less likely, the rejected one more so, and the model forgets what it
was asked. Adding the loss of the chosen answer (RPO) prevents that.

    python examples/preference.py

Each part alone, on your own models and tables: columns `messages`, or `prompt` and
`completion`, for SFT; `prompt`, `chosen` and `rejected` for DPO; of text or messages:

    python examples/preference.py sft --model openai-community/gpt2 --template plain \
        --train chats.jsonl --pack --max-length 512
    python examples/preference.py sft --model Qwen/Qwen2.5-0.5B \
        --dataset trl-lib/Capybara --output runs/sft
    python examples/preference.py dpo --model runs/sft/merged \
        --dataset trl-lib/ultrafeedback_binarized --precision bfloat16
    python examples/preference.py dpo --help

The last two are TRL's examples of SFT and DPO. Ctrl-C saves and prints the command that
continues. Needs `pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jlora
from jlora import models, tasks, train

ASSETS = Path(__file__).parent / "assets"
EMBEDDED, CHAT = str(ASSETS / "tiny-chat"), ASSETS / "chat"

# An answer is a tone's opening, the statement, and a tone's closing.
POLITE = ("Gladly!", "Of course!", "With pleasure!", "Good question!")


def is_polite(answer: str, wanted: str) -> float:
    """Whether an answer begins as polite ones do."""
    return float(answer.startswith(POLITE))


def is_true(answer: str, wanted: str) -> float:
    """Whether an answer makes the statement of the wanted one."""
    _, statement, _ = re.split(r"(?<=[.!?]) ", wanted)
    return float(statement in answer)


class Done(NamedTuple):
    """What a run came to."""

    task: Any
    before: tasks.Answers
    after: tasks.Answers
    folder: train.RunFolder


def completed(s: Any, name: str, **values: Any) -> Any:
    """Put what is embedded in the place of what is missing."""
    if s.train or s.dataset:
        return s
    files = {"train": f"{name}.train.jsonl", "valid": f"{name}.test.jsonl"}
    tables = {split: [str(CHAT / file)] for split, file in files.items()}
    usual = {field.name: field.default for field in dataclasses.fields(s)}
    values = {k: v for k, v in values.items() if getattr(s, k) == usual[k]}
    return dataclasses.replace(s, **tables, **values)


USUAL = {"targets": ["all-linear"], "buckets": 1, "ask": 80}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(tasks.ChatSettings):
    """Those of any conversations; without a model or tables, the embedded ones."""

    def complete(self) -> Sft:
        """Put what is embedded in the place of what is missing."""
        if self.model:
            return self
        own = completed(self, "sft", lr=3e-3, steps=150, eval_every=30, **USUAL)
        return dataclasses.replace(own, model=EMBEDDED)

    def check(self) -> None:
        """Refuse what does not go together."""
        super(Sft, self.complete()).check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(tasks.PreferenceSettings):
    """Those of any preferences; without tables, the embedded ones."""

    def complete(self) -> Dpo:
        """Put what is embedded in the place of what is missing."""
        own = {"lr": 5e-4, "steps": 60, "eval_every": 10, "sft_weight": 1.0, **USUAL}
        return completed(self, "preferences", **own)

    def check(self) -> None:
        """Refuse what does not go together."""
        tasks.refuse({
            "dpo goes on with a model that answers: --model DIR, the `merged` folder "
            "that sft leaves": not self.model,
        })  # fmt: skip
        super(Dpo, self.complete()).check()


def measures(s: Any) -> dict[str, tasks.Measure]:
    """Of the embedded conversations it is known what is true and polite."""
    is_embedded = (s.train or [""])[0].startswith(str(CHAT))
    return {"true": is_true, "polite": is_polite} if is_embedded else {}


def sft(s: Sft) -> Done:
    """Learn the assistant's answers."""
    s = s.complete()
    return trained("sft", "chat", s, tasks.Chat)


def dpo(s: Dpo) -> Done:
    """Learn which of two answers is wanted."""
    s = s.complete()
    return trained("dpo", "preference", s, tasks.Preferences)


def trained(name: str, of: str, s: Any, kind: Any) -> Done:
    """Load, adapt, train, compare, merge, save, report."""
    s.check_alone("this example")
    began = time.perf_counter()
    model, params, tokenizer = loaded = s.load(s.model)  # jlora.models.load
    tree = s.adapt(params, s.key)  # jlora.lorafy(params, rank, targets, alpha=alpha)
    summary = jlora.summary(tree)
    task = kind(s, loaded, measures(s))  # text to tokens, to batches of few shapes
    print(summary, *(f"note: {remark}" for remark in task.remarks), sep="\n")

    with s.claim(name, of) as folder:
        before = task.answer("before", tree, folder)
        fit = s.fit(  # jlora.train.fit with optax.adamw
            task.loss_fn, tree, task.train, folder, task.valid, count=task.count,
            base=params,
        )  # fmt: skip
        after = task.answer("after", fit.params, folder)

        merged = jlora.merge(fit.params)  # a plain tree again
        models.save(model, merged, folder.merged, overwrite=True)
        tokenizer.save_pretrained(folder.merged)  # with its chat template
        facts = {
            **tasks.facts_of(s, summary, fit),
            **memory(s, task, tree),
            "whole run": f"{time.perf_counter() - began:.0f} s",
        }
        task.report(folder, facts, before, after, summary)
    return Done(task, before, after, folder)


def memory(s: Any, task: Any, tree: Any) -> dict[str, str]:
    """What a step of DPO is given, and how much of that is the model, there once."""
    if not isinstance(task, tasks.Preferences):
        return {}
    batch = next(task.train.stream())
    taken = tasks.step_memory(task.loss_fn, tree, s.optimizer(1)[0], batch)
    model = sum(x.nbytes for x in jax.tree.leaves(jlora.without_adapters(tree)))
    said = taken and (
        f"{taken['arguments'] / 1e6:.2f} MB of arguments: the model once, "
        f"{model / 1e6:.2f}, which is the reference too; adapter, optimiser, batch"
    )
    return {"memory of a step": said or "not known on this device"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Both(train.RunSettings):
    """Both trainings of what is embedded, one after the other."""


def both(s: Both) -> None:
    """Train twice, and say what the model answers before, between and after."""
    s.check_alone("this example")
    root = Path(s.output or "runs/preference")
    more = {"overwrite": s.overwrite}
    first = sft(Sft(output=str(root / "sft"), **more))
    model = str(first.folder.merged.resolve())
    second = dpo(Dpo(output=str(root / "dpo"), model=model, **more))

    task = second.task  # all three answer the questions of the second
    unchanged = task.settings.adapt(models.load(EMBEDDED)[1])  # B is zero
    base = task.answer("base", unchanged, second.folder)
    answers = [base, second.before, second.after]
    rows: list[Sequence[Any]] = [("of held-out countries", "base", "SFT", "SFT, DPO")]
    rows += [
        (name, *(f"{x.scores[name]:.0%}" for x in answers))
        for name in ("true", "polite", tasks.LIKELIER)
    ]
    asked = [prompt[-1].content for prompt in task.prompts.prompts]
    for n in (0, 20, 45):
        print(f"\n  question   {asked[n]}")
        for name, x in zip(rows[0][1:], answers, strict=True):
            print(f"  {name:10s} {x.texts[n]}")
    print(f"\n{train.table(rows)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Any, Any]] = {"sft": (Sft, sft), "dpo": (Dpo, dpo)}
    kind, run = commands.get(words[0] if words else "", (Both, both))
    words = words[1:] if kind is not Both else words
    return train.command_line(kind, run, words, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
