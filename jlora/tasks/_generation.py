"""What a model says to a test, in files that a resumed run finds again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jlora
from jlora import data, models, sharding
from jlora._processes import is_first, on_first, on_host
from jlora.tasks._devices import beside
from jlora.train._step import on_mesh

Tree = Any
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Generator:
    """A model that answers in text; `params` may carry adapters or not.

    Attributes:
      model: of `jlora.models`.
      tokenizer: its tokenizer.
      max_new_tokens: the longest answer.
      settings: more of `jlora.models.generate`'s, `num_beams` say.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Tree, batch: Batch) -> list[str]:
        """Answer a batch of prompts, `input_ids` and `attention_mask` of `[B, S]`."""
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with on_mesh(sharding.mesh_of(params)):
            tokens = models.generate(
                self.model,
                params,
                **beside(params, prompts),
                max_new_tokens=self.max_new_tokens,
                transform=jlora.lora,
                **self.settings,
            )
        texts = self.tokenizer.batch_decode(on_host(tokens), skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def to_file(
        self,
        params: Tree,
        batches: data.Batches,
        file: Path,
        *,
        keep: bool = False,
        title: str | None = None,
    ) -> list[str]:
        """Answer every example, a line each, in their order.

        Args:
          params: the parameters.
          batches: prompts.
          file: to write; its folder is made.
          keep: take the lines that are there, where they are as many as the examples.
          title: of a progress bar; None shows none.

        Returns:
          The lines. Of several processes each has all of them, and the first writes.
        """
        if keep and on_first(f"reading {file}", lambda: _is_whole(file, batches)):
            return data.read_lines(file)
        lines = batches.collect(
            functools.partial(self, params), title=title if is_first() else None
        )

        def write() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

        on_first(f"writing {file}", write)
        return lines


def _is_whole(file: Path, batches: data.Batches) -> bool:
    return file.exists() and len(data.read_lines(file)) == batches.examples
