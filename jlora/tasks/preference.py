"""Preference training: of two answers to a prompt the one that is chosen gains (DPO).

The reference that DPO measures against is the model before training: the frozen base
without its adapter, in the same step and the same memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import data, train
from jlora._processes import is_first, on_host
from jlora.tasks._chats import (
    ASKED,
    Answers,
    ChatOptions,
    Measure,
    Prompts,
    answers_part,
    padding_of,
    prepared,
    score_rows,
    scores_part,
    use_of,
)
from jlora.tasks._devices import beside
from jlora.tasks._losses import Batch, Loss
from jlora.tasks._options import Loaded, refuse
from jlora.tasks._reports import model_name
from jlora.train import AnswerScores, option

Tree = Any
SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(ChatOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    lr: float | None = option(None, "peak rate (1e-5)", above=0)
    loss: str = option(
        "sigmoid", "DPO's, IPO's, or SLiC's hinge (sigmoid)",
        choices=("sigmoid", "ipo", "hinge"), group="preference")
    beta: float = option(
        0.1, "how strongly the model is held to the reference (0.1)", above=0)
    label_smoothing: float = option(
        0.0, "share of pairs taken to be labelled the wrong way round; for sigmoid "
        "(0)", least=0,
        below=0.5)
    sft_weight: float | None = option(
        None, "RPO: the weight of the chosen answer's own loss (0)", least=0)
    precompute: bool = option(
        False, "run the reference once, before training, not in each step")
    # fmt: on

    usual_lr: ClassVar[float] = 1e-5

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        refuse({
            "--label-smoothing is of --loss sigmoid": (
                self.label_smoothing and self.loss != "sigmoid"
            ),
            "--full leaves no frozen model to compare with: add --precompute": (
                self.full and not self.precompute
            ),
        })  # fmt: skip


def answer_scores(
    model: Any, params: Tree, batch: Batch, *, mean: bool = False
) -> AnswerScores:
    """Return the log-probabilities of both answers, in one pass over the model.

    Args:
      model: a decoder of `jlora.models`.
      params: its parameters, as the function that is transformed has them.
      batch: `chosen_input_ids`, `chosen_attention_mask` and `chosen_labels`, `[B, T]`,
        and the same of `rejected`, `[B, S]`.
      mean: take means over an answer's tokens, not sums.
    """
    ids, mask, labels = (
        _both([batch[f"{side}_{name}"] for side in SIDES], fill)
        for name, fill in (
            ("input_ids", 0),
            ("attention_mask", 0),
            ("labels", data.IGNORED),
        )
    )
    hidden, kernel = model.apply({"params": params}, ids, mask, method="features")
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=data.IGNORED)
    scores = jnp.sum(train.linear_log_probs(hidden, kernel, labels), axis=1)  # [2B]
    if mean:
        scores = scores / jnp.maximum(jnp.sum(labels >= 0, axis=1), 1)
    return AnswerScores(*jnp.split(scores, 2))


def _both(sides: list[Any], fill: int) -> Any:
    """The two sides behind one another, of one length, `[2B, T]`."""
    length = max(x.shape[1] for x in sides)
    longer = [
        jnp.pad(
            jnp.asarray(x), ((0, 0), (0, length - x.shape[1])), constant_values=fill
        )
        for x in sides
    ]
    return jnp.concatenate(longer)


def preference_loss(
    model: Any,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: train.PreferenceKind = "sigmoid",
    sft_weight: float = 0.0,
) -> Loss:
    """Return the loss of preferences, with metrics: see `jlora.train.dpo_loss`.

    DPO makes both answers less likely, the rejected one more so, and the model forgets
    what they say where it goes on for long. The loss of the chosen answer itself,
    beside it, holds that up.

    Args:
      model: a decoder of `jlora.models`.
      beta: how dear it is to leave the reference.
      label_smoothing: share of pairs that may be labelled the wrong way round.
      kind: `"sigmoid"` (DPO), `"ipo"` or `"hinge"`.
      sft_weight: of the chosen answer's mean loss a token, which is added.

    Returns:
      `loss_fn(params, batch, key)` of batches as `answer_scores` takes them. The
      reference is the model without its adapters, or what the batch holds of it:
      `chosen_reference` and `rejected_reference`, `[B]`.

    Source: the term of `sft_weight` is RPO's, Pang et al. 2024, arXiv:2404.19733.
    """
    mean = kind == "ipo"

    def loss_fn(params: Tree, batch: Batch, key: Any) -> Any:
        policy = answer_scores(model, params, batch, mean=mean)
        if "chosen_reference" in batch:
            reference = AnswerScores(*(batch[f"{side}_reference"] for side in SIDES))
        else:
            frozen = jlora.without_adapters(params)
            reference = answer_scores(model, frozen, batch, mean=mean)
        # Batches are filled up with pairs without labels.
        counts = jnp.any(jnp.asarray(batch["chosen_labels"]) >= 0, axis=1)
        (total, count), metrics = train.dpo_loss(
            policy,
            reference,
            counts,
            beta=beta,
            label_smoothing=label_smoothing,
            kind=kind,
        )
        if sft_weight:
            tokens = jnp.sum(jnp.asarray(batch["chosen_labels"])[:, 1:] >= 0, axis=1)
            scores = policy.chosen if mean else policy.chosen / jnp.maximum(tokens, 1)
            nll = -jnp.sum(jnp.where(counts, scores, 0))
            total, metrics = total + sft_weight * nll, {**metrics, "sft": (nll, count)}
        return (total, count), metrics

    return loss_fn


class Preferences:
    """Pairs of answers in batches, and which of them a model prefers.

    Args:
      settings: what to read, and how.
      loaded: the model, its parameters and its tokenizer, which gets the template.
      measures: of an answer, by name; their means stand in the report.

    Attributes:
      train, valid: batches, as `answer_scores` takes them.
      remarks: what a user should know of the data, pairs that are left out say.
      loss_fn: the loss, as `jlora.train` takes it.
      count: how many tokens a batch holds.
      prompts: what is held out and answered.
    """

    def __init__(
        self,
        settings: PreferenceSettings,
        loaded: Loaded,
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        self.settings, self._model = settings, loaded.model
        known, s = prepared(settings, loaded), settings
        training, valid = settings.read(data.read_preferences)
        tokens = {
            name: data.tokenise_preferences(
                loaded.tokenizer, pairs, s.max_length, **known
            )
            for name, pairs in (("train", training), ("held out", valid))
        }
        self.remarks = [x for name, t in tokens.items() for x in t.remarks(name)]
        shapes = data.shapes_for([t.columns for t in tokens.values()], s.buckets)
        columns: dict[str, dict[str, Any]] = {
            name: dict(t.columns) for name, t in tokens.items()
        }
        pad, self.count = padding_of(loaded), count_pairs
        if s.precompute:
            for own in columns.values():
                batches = data.Batches(own, shapes, s.eval_batch_size, pad)
                own |= self._references(loaded.params, batches)
        self.train = data.Batches(columns["train"], shapes, s.batch_size, pad, s.seed)
        self.valid = data.Batches(columns["held out"], shapes, s.eval_batch_size, pad)
        self.loss_fn = preference_loss(
            loaded.model,
            beta=s.beta,
            label_smoothing=s.label_smoothing,
            kind=cast(train.PreferenceKind, s.loss),
            sft_weight=s.sft_weight or 0.0,
        )
        wanted = {p.prompt: p.chosen[-1].content for p in valid}
        asked = list(wanted.items())[: s.ask or ASKED]
        self.prompts = Prompts(
            settings,
            loaded,
            [prompt for prompt, _ in asked],
            [answer for _, answer in asked],
            measures or {},
        )
        self._measure = train.make_eval_step(self._metrics, mesh=settings.device_mesh)

    def _references(self, params: Tree, batches: data.Batches) -> dict[str, np.ndarray]:
        """What the model says before training, a number for each answer."""
        mean = self.settings.loss == "ipo"
        scores = jax.jit(
            jlora.lora(lambda p, b: answer_scores(self._model, p, b, mean=mean))
        )
        rows: list[Any] = batches.collect(
            lambda batch: list(
                np.stack(
                    [on_host(x) for x in scores(params, beside(params, batch))], axis=1
                )
            ),
            title="reference" if is_first() else None,
        )
        both = np.array(rows, np.float32)
        return {f"{side}_reference": both[:, n] for n, side in enumerate(SIDES)}

    def _metrics(self, params: Tree, batch: Batch) -> dict[str, Any]:
        (loss, metrics) = self.loss_fn(params, batch, None)
        scores = answer_scores(self._model, params, batch, mean=True)
        counts = jnp.any(jnp.asarray(batch["chosen_labels"]) >= 0, axis=1)
        likelier = jnp.sum(counts & (scores.chosen > scores.rejected))
        return {"loss": loss, LIKELIER: (likelier, jnp.sum(counts)), **metrics}

    def answer(self, when: str, params: Tree, folder: train.RunFolder) -> Answers:
        """Measure what is preferred of what is held out, and answer its prompts.

        Args:
          when: `"before"` or `"after"` training.
          params: the parameters.
          folder: of the run.
        """
        found = train.evaluate(self._measure, params, self.settings.part(self.valid))
        texts, scores = self.prompts.answer(when, params, folder)
        named = {shown: found[name] for name, shown in SHOWN.items()}
        return Answers({**named, **scores}, texts)

    def scores(self, answers: Answers) -> dict[str, dict[str, float]]:
        """Return the numbers of what was held out, by name."""
        return {"held out": answers.scores}

    def report(
        self,
        folder: train.RunFolder,
        facts: Mapping[str, str],
        before: Answers,
        after: Answers,
        parameters: jlora.Summary,
    ) -> None:
        """Write the plots and the report, and print the gist of it.

        Args:
          folder: of the run.
          facts: lines on training.
          before: how the model answered before it.
          after: how it answers after.
          parameters: what was trained.
        """
        shares = (LIKELIER, SHOWN["accuracy"], *self.prompts.measures)
        rows = score_rows(before.scores, after.scores, shares)
        scores = [("held out", "before", "after"), *rows]
        chosen = self.prompts.samples(before.texts, after.texts)
        use = use_of(folder.merged, chosen[0][0], self.settings.max_new_tokens)
        document = scores_part(
            self.settings, folder, facts, scores, "preferences", FIGURES, self.remarks,
            f"loss of preferences ({self.settings.loss})",
        )  # fmt: skip
        rewards = folder.outputs / "rewards.png"
        if folder.writes:
            plot_rewards(
                folder.metrics,
                rewards,
                f"{model_name(self.settings.model)}: preferences",
            )
        document.text(f"![rewards]({rewards.relative_to(folder.path)})")
        answers_part(
            document,
            folder,
            facts,
            scores,
            chosen,
            "preferred in the data",
            use,
            parameters,
        )


def count_pairs(batch: Batch) -> int:
    """Return the tokens of both answers and their prompts, without padding."""
    return int(sum(batch[f"{side}_attention_mask"].sum() for side in SIDES))


def plot_rewards(metrics: train.MetricsLog, path: Path, title: str = "") -> None:
    """Draw the rewards of held-out answers, and how often the chosen one's is higher.

    Args:
      metrics: the log of a run.
      path: the picture to write.
      title: its title.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = metrics.rows("valid")
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for side, colour in zip(SIDES, ("C0", "C3"), strict=True):
        values = [row[f"reward_{side}"] for row in rows]
        left.plot(steps, values, "o-", color=colour, markersize=4, label=side)
    left.axhline(0, color="0.6", linewidth=1)
    left.set(title="what an answer gained on the reference", ylabel="reward")
    left.legend()
    shares = [row["accuracy"] for row in rows]
    right.plot(steps, shares, "o-", color="C2", markersize=4)
    right.set(title="chosen above rejected", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


#: A score of `Preferences.answer`.
LIKELIER = "chosen is likelier than rejected"
SHOWN = {
    "loss": "loss",
    LIKELIER: LIKELIER,
    "accuracy": "chosen gained more than rejected",
    "margin": "margin of rewards",
}
FIGURES = """\
An answer's reward is beta times log p of it, less that of the reference: the model
before training, so at first all are 0. The loss wants the chosen answer's reward above
the rejected one's. Which is likelier is told by mean log p a token, so that it is not
the shorter one. The adapter of the lowest loss is kept; `after` speaks of it."""
