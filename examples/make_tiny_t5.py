"""Make the tiny German-English T5 that `flan_t5_translate.py` starts from.

A T5 v1.1 of 1.2 M parameters is trained from scratch on the text in `assets/corpus`, so
that it translates the domain `home` well and `travel` hardly: of `travel` it has read
sentences of each language with gaps to fill, and looked up single words, but it has
never seen a sentence beside its translation. That is what LoRA adds.

    python examples/make_tiny_t5.py --output DIR            # 8 minutes on two CPU cores
    python examples/make_tiny_t5.py --output DIR --steps 20 # a trial

The tokenizer is the one in `assets/tiny-t5-de-en`; its README says how that was made.
The checkpoint there was made by an earlier form of this script, from the same sentences
in another order: what this one makes is of the same quality, not of the same bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu

import jlora
from jlora import data, models, train

ASSETS = Path(__file__).parent / "assets"
TOKENIZER = ASSETS / "tiny-t5-de-en"
CORPUS = ASSETS / "corpus"
GAP = "_"
PROMPT, REVERSE = (data.direction(way).prompt for way in ("de-en", "en-de"))
CONFIG = models.T5Config(
    vocab_size=1460,
    d_model=128,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,  # the corpus is too large to learn by heart
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)


def tasks(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Yield what the encoder reads and the decoder writes: all that is taught."""
    base = CORPUS / "base"
    files = [base / f"home.train.{code}.gz" for code in ("de", "en")]
    pairs = data.read_pairs(files, "de-en")
    yield from ((PROMPT + pair.source, pair.target) for pair in pairs[:24_000])
    yield from ((REVERSE + pair.target, pair.source) for pair in pairs[24_000:])
    # Of `travel` no sentence is beside its translation.
    for code, language in (("de", "German"), ("en", "English")):
        for sentence in data.read_lines(base / f"travel.{code}.gz"):
            words = [GAP if rng.random() < 0.25 else word for word in sentence.split()]
            yield f"fill the gaps in {language}: " + " ".join(words), sentence
    words = data.read_pairs(base / "words.tsv", "de-en")
    for i in rng.integers(len(words), size=10_000):
        yield "look up in English: " + words[i].source, words[i].target


def batches(tokenizer: Any, size: int) -> data.Batches:
    """Return the tasks in batches of six shapes."""
    read, write = zip(*tasks(np.random.default_rng(0)), strict=True)
    columns = {
        "input_ids": data.tokenise(tokenizer, read, 64).rows,
        "labels": data.tokenise(tokenizer, write, 64).rows,
    }
    shapes = data.shapes_for([columns], 6)
    return data.Batches(columns, shapes, size, CONFIG.pad_token_id, seed=0)


def bleu(model: Any, params: Any, tokenizer: Any, domain: str) -> float:
    """Return greedy BLEU of German to English on held-out sentences."""
    files = [CORPUS / f"{domain}.test.{code}" for code in ("de", "en")]
    sources, targets = zip(*data.read_pairs(files, "de-en"), strict=True)
    ids = data.tokenise(tokenizer, sources, 64, prefix=PROMPT).rows
    test = {"input_ids": ids}
    test = data.Batches(test, data.shapes_for([test], 1), 100, CONFIG.pad_token_id)

    def translate(batch: dict[str, np.ndarray]) -> list[str]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = models.generate(model, params, ids, mask, max_new_tokens=32)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return sacrebleu.corpus_bleu(test.collect(translate), [list(targets)]).score


def main() -> None:
    """Train, measure and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    tokenizer = data.load_tokenizer(TOKENIZER)
    stream = batches(tokenizer, args.batch).stream()
    model = models.T5(CONFIG)
    params = model.init(jax.random.key(0), *[jnp.ones((1, 4), jnp.int32)] * 3)["params"]

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        fed = models.shift_right(batch["labels"], CONFIG)
        read, mask = batch["input_ids"], batch["attention_mask"]
        logits = model.apply({"params": params}, read, mask, fed)
        return train.cross_entropy(logits, batch["labels"])

    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, min(200, args.steps // 2), args.steps, args.rate / 50
    )
    tx = optax.adamw(rate, b2=0.99, weight_decay=0.01)
    # Every leaf is trained, from scratch: the same step as for adapters.
    tree = jax.tree.map(jlora.Full, params)
    state = train.TrainState.create(tree, tx)
    step = train.make_train_step(loss_fn, tx, clip_norm=1.0)
    for i in range(1, args.steps + 1):
        state, metrics = step(state, next(stream))
        if i % 250 == 0 or i == args.steps:
            print(f"step {i:5d}  loss {float(metrics['loss']):.3f}", flush=True)

    params = jlora.merge(state.params)
    models.save(model, params, args.output, overwrite=True, tokenizer_from=TOKENIZER)
    for domain in ("home", "travel"):
        print(f"BLEU on {domain}: {bleu(model, params, tokenizer, domain):.1f}")


if __name__ == "__main__":
    main()
