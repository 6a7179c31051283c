"""Translating held-out sentences, and scoring them with BLEU."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import sacrebleu
from _batches import Batches
from _data import Pair
from tqdm import tqdm

import jlora
from jlora import models


@dataclasses.dataclass(frozen=True)
class Translator:
    """A model with its tokenizer, ready to decode.

    Attributes:
      model: from `jlora.models.load`.
      tokenizer: from `transformers`.
      longest: the most tokens of a translation.
      beams: 1 is greedy search.
    """

    model: Any
    tokenizer: Any
    longest: int
    beams: int = 1

    def tokens(self, params: Any, arrays: dict[str, np.ndarray]) -> jax.Array:
        """Decode a batch; `params` may carry adapters or not."""
        return models.generate(
            self.model,
            params,
            arrays["input_ids"],
            arrays["attention_mask"],
            max_new_tokens=self.longest,
            num_beams=self.beams,
            transform=jlora.lora,
        )

    def translate(self, params: Any, batches: Batches, title: str) -> list[str]:
        """Translate every example, in their order."""
        out = [""] * len(batches.encoded.sources)
        for batch in tqdm(batches.plan(), desc=title, unit="batch", leave=False):
            tokens = np.asarray(self.tokens(params, batches.arrays(batch)))
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(batch.rows, texts, strict=False):
                out[row] = text.strip()
        return out


@dataclasses.dataclass(frozen=True)
class Score:
    """How well some sentences were translated.

    Attributes:
      bleu: sacrebleu's corpus BLEU, 13a tokenisation, mixed case.
      seconds: what decoding took, compilation included.
      outputs: the translations.
    """

    bleu: float
    seconds: float
    outputs: list[str]


def score(
    translator: Translator,
    params: Any,
    batches: Batches,
    pairs: list[Pair],
    title: str,
) -> Score:
    """Translate held-out pairs and compare with their targets."""
    start = time.perf_counter()
    outputs = translator.translate(params, batches, title)
    seconds = time.perf_counter() - start
    bleu = sacrebleu.corpus_bleu(outputs, [[pair.target for pair in pairs]]).score
    return Score(bleu, seconds, outputs)
