"""A task from its settings to its report: what `jlora train CONFIG.toml` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jlora
from jlora import data, models
from jlora._processes import one_voice
from jlora._programs import kept_in
from jlora.tasks._options import Loaded
from jlora.tasks.chat import Chat, ChatSettings
from jlora.tasks.classification import Classification, ClassificationSettings
from jlora.tasks.data_to_text import DataToText, DataToTextSettings
from jlora.tasks.preference import Preferences, PreferenceSettings
from jlora.tasks.translation import Translation, TranslationSettings
from jlora.train import Fit, RunFolder

Tree = Any


class Task(Protocol):
    """What `run` asks of a task; `Translation` is one.

    Attributes:
      valid: batches.
      loss_fn: the loss, as `jlora.train` takes it.
      count: how many tokens a batch holds.
      remarks: what a user should know of the data.
    """

    valid: data.Batches
    loss_fn: Callable[..., Any]
    count: Callable[..., int]
    remarks: list[str]

    @property
    def train(self) -> data.Batches | data.Streaming:
        """Batches to train on."""

    def answer(self, when: str, params: Tree, folder: RunFolder) -> Any:
        """Return what the model makes of the tests, `"before"` or `"after"`."""

    def report(
        self,
        folder: RunFolder,
        facts: Any,
        before: Any,
        after: Any,
        parameters: Any,
    ) -> None:
        """Write the report, and print its gist."""


class Kind(NamedTuple):
    """A kind of task that a configuration file may name.

    Attributes:
      summary: a line of help.
      settings: its settings, a dataclass of options.
      make: `(settings, loaded) -> Task`.
    """

    summary: str
    settings: type[Any]
    make: Callable[[Any, Loaded], Task]


#: The tasks of `jlora train`, by the word that a settings file names.
KINDS: dict[str, Kind] = {
    "translate": Kind(
        "a T5 on pairs of sentences, measured by BLEU",
        TranslationSettings,
        Translation,
    ),
    "describe": Kind(
        "a GPT-2 on meanings and texts, measured as the E2E challenge does",
        DataToTextSettings,
        DataToText,
    ),
    "chat": Kind(
        "a language model on conversations: supervised fine-tuning", ChatSettings, Chat
    ),
    "preference": Kind(
        "a language model on answers of which one is preferred: DPO",
        PreferenceSettings,
        Preferences,
    ),
    "classify": Kind(
        "a BERT or RoBERTa on sentences or pairs, measured as GLUE does",
        ClassificationSettings,
        Classification,
    ),
}


def run(name: str, settings: Any) -> None:
    """Load, train, compare, merge, save, report.

    Args:
      name: one of `KINDS`.
      settings: of that kind.

    Of several processes all make this call, and the first writes and prints.

    Raises:
      LoraError: settings, data or a model that are not in order.
      Interrupted: the run was asked to stop, and saved.
    """
    with one_voice():
        _run(name, settings)


def _run(name: str, settings: Any) -> None:
    began = time.perf_counter()
    loaded, tree, task = started(name, settings)
    summary = jlora.summary(tree)
    print(summary, *(f"note: {remark}" for remark in task.remarks), sep="\n")
    with settings.claim(name) as folder:
        before, fit, after = trained(settings, task, tree, folder, loaded.params)
        models.save(
            loaded.model, jlora.merge(fit.params), folder.merged, overwrite=True
        )
        facts = {
            **facts_of(settings, summary, fit),
            "whole run": f"{time.perf_counter() - began:.0f} s",
        }

        if folder.writes:
            loaded.tokenizer.save_pretrained(folder.merged)
        task.report(folder, facts, before, after, summary)


def started(name: str, settings: Any) -> tuple[Loaded, Tree, Any]:
    """Return a kind's model, the tree with adapters, and the task."""
    kind = KINDS[name]
    loaded = settings.load(settings.model)
    tree = settings.adapt(loaded.params, settings.key)
    return loaded, tree, kind.make(settings, loaded)


def trained(
    settings: Any, task: Any, tree: Tree, folder: RunFolder, base: Tree
) -> tuple[Any, Fit, Any]:
    """Train; return the answers before, what training came to, the answers after."""
    before = task.answer("before", tree, folder)
    fit = settings.fit(
        task.loss_fn,
        tree,
        task.train,
        folder,
        task.valid,
        count=task.count,
        base=base,
    )
    return before, fit, task.answer("after", fit.params, folder)


def facts_of(settings: Any, summary: jlora.Summary, fit: Fit) -> dict[str, str]:
    """Return what was trained and what it came to, in lines for a report."""
    return {
        "trained": settings.what_is_trained,
        "parameters": f"{summary.trainable:,} ({summary.fraction:.2%} of "
        f"{summary.total:,})",
        **settings.device_facts(fit.params),
        **fit.facts(),
        **_programs(),
    }


def _programs() -> dict[str, str]:
    folder = kept_in()
    if folder is None:
        return {}
    return {"compiled programs": f"kept in {folder} for the next run"}
