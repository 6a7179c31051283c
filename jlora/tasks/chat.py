"""Supervised fine-tuning on conversations: the assistant's answers are learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jlora
from jlora import data, train
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
from jlora.tasks._losses import causal_loss
from jlora.tasks._options import Loaded, count_tokens, refuse
from jlora.tasks._streams import packed_remark, stream_refusals, streamed
from jlora.train import option

Tree = Any
Talks = list[data.Conversation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatSettings(ChatOptions):
    """What was asked for; the defaults stand in brackets."""

    # fmt: off
    answers: str = option(
        "all", "which of the assistant's messages are learned (all)",
        choices=("all", "last"))
    pack: bool = option(
        False, "put several conversations in a row of --max-length; a batch counts "
        "rows")
    streaming: bool = option(
        False, "read --train (tables) during training; it need not fit in memory")
    workers: int = option(
        0, "processes that tokenise what is streamed (0: this one)", least=0,
        extends=True)
    # fmt: on

    def check(self) -> None:
        """Refuse options that do not go together."""
        super().check()
        refuse(stream_refusals(self, "train", "valid"))


class Chat:
    """Conversations in batches, and how a model answers.

    Args:
      settings: what to read, and how.
      loaded: the model, its parameters and its tokenizer, which gets the template.
      measures: of an answer, by name; their means stand in the report.

    Attributes:
      train, valid: batches of `input_ids`, `attention_mask` and `labels`; packed ones
        have `segment_ids`.
      remarks: what a user should know of the data, conversations that are cut say.
      loss_fn: the loss, as `jlora.train` takes it.
      count: how many tokens a batch holds.
      prompts: what is held out and answered.
    """

    def __init__(
        self,
        settings: ChatSettings,
        loaded: Loaded,
        measures: Mapping[str, Measure] | None = None,
    ) -> None:
        self.settings, self.remarks = settings, list[str]()
        self._known = prepared(settings, loaded)
        training, valid = settings.read(data.read_conversations)
        splits = {"train": training} if training else {}
        columns = {
            name: self._columns(name, talks, loaded.tokenizer)
            for name, talks in {**splits, "held out": valid}.items()
        }
        shapes = data.shapes_for(list(columns.values()), settings.buckets)
        if settings.pack:
            shapes = [(settings.max_length,) * 3]
        pad, s = padding_of(loaded), settings
        self.train: data.Batches | data.Streaming
        if s.streaming:
            self.train = streamed(s, self._encode(loaded.tokenizer), s.max_length, pad)
        else:
            own = columns["train"]
            self.train = data.Batches(own, shapes, s.batch_size, pad, s.seed)
        self.valid = data.Batches(columns["held out"], shapes, s.eval_batch_size, pad)
        self.loss_fn, self.count = causal_loss(loaded.model), count_tokens
        self.prompts = prompts_of(settings, loaded, valid, measures or {})
        self._measure = train.make_eval_step(
            lambda params, batch: {"loss": self.loss_fn(params, batch, None)},
            mesh=settings.device_mesh,
        )

    @property
    def _answers(self) -> Literal["all", "last"]:
        return "last" if self.settings.answers == "last" else "all"

    def _encode(self, tokenizer: Any) -> data.EncodeChats:
        return data.EncodeChats(
            tokenizer, self.settings.max_length, self._answers, **self._known
        )

    def _columns(self, name: str, talks: Talks, tokenizer: Any) -> dict[str, Any]:
        s = self.settings
        tokens = data.tokenise_chats(
            tokenizer,
            talks,
            s.max_length,
            answers=self._answers,
            **self._known,
        )
        self.remarks.extend(tokens.remarks(name))
        if not s.pack:
            return tokens.columns
        packed = data.pack(tokens.columns, s.max_length)
        kept = f"{name}: {len(tokens.kept):,} conversations"
        self.remarks.append(packed_remark(kept, packed))
        return packed.columns

    def answer(self, when: str, params: Tree, folder: train.RunFolder) -> Answers:
        """Measure the loss of what is held out, and answer its prompts.

        Args:
          when: `"before"` or `"after"` training.
          params: the parameters.
          folder: of the run.
        """
        valid = self.settings.part(self.valid)
        loss = train.evaluate(self._measure, params, valid)["loss"]
        texts, scores = self.prompts.answer(when, params, folder)
        return Answers({"loss": loss, "perplexity": math.exp(loss), **scores}, texts)

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
        """Write the plot and the report, and print the gist of it.

        Args:
          folder: of the run.
          facts: lines on training.
          before: how the model answered before it.
          after: how it answers after.
          parameters: what was trained.
        """
        rows = score_rows(before.scores, after.scores, self.prompts.measures)
        scores = [("held out", "before", "after"), *rows]
        chosen = self.prompts.samples(before.texts, after.texts)
        use = use_of(folder.merged, chosen[0][0], self.settings.max_new_tokens)
        document = scores_part(
            self.settings, folder, facts, scores, "conversations", FIGURES, self.remarks
        )
        answers_part(
            document,
            folder,
            facts,
            scores,
            chosen,
            "in the data",
            use,
            parameters,
        )


def prompts_of(
    settings: ChatOptions,
    loaded: Loaded,
    talks: Talks,
    measures: Mapping[str, Measure],
) -> Prompts:
    """Return what stands before the last answer of some conversations."""
    prompts, wanted = [], []
    for talk in talks[: settings.ask or ASKED]:
        last = max(n for n, m in enumerate(talk.messages) if m.role == "assistant")
        if last:
            prompts.append(talk.messages[:last])
            wanted.append(talk.messages[last].content)
    return Prompts(settings, loaded, prompts, wanted, measures)


FIGURES = """\
The loss is the mean of -log p of a token of the assistant's answers, given all before
it; e to its power is the perplexity. The adapter of the lowest loss is kept; `after`
speaks of it. Answers are greedy."""
