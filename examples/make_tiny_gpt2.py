"""Make the tiny GPT-2 that `nlg_e2e.py` starts from.

A GPT-2 of half a million parameters is trained from scratch on the corpus in
`assets/places`: it describes places to eat from what is to be said of them, and has
read texts about places to stay without ever seeing what they are made from. That is
what LoRA adds.

    python examples/make_tiny_gpt2.py --output DIR             # a quarter of an hour
    python examples/make_tiny_gpt2.py --output DIR --steps 20  # a trial

Its tokenizer is a byte-level BPE of 800 pieces, learned from the same text. The corpus
is written by `make_places.py`.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tokenizers
import transformers

import jlora
from jlora import data, metrics, models, tasks, train

PLACES = Path(__file__).parent / "assets" / "places"
END = "<|endoftext|>"
CONFIG = models.GPT2Config(
    vocab_size=800,
    n_positions=192,
    n_embd=128,
    n_layer=2,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def make_tokenizer(texts: list[str]) -> Any:
    """Learn a tokenizer of GPT-2's kind."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=CONFIG.vocab_size, special_tokens=[END], show_progress=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONFIG.n_positions,
    )


def main() -> None:
    """Train, measure and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    known = tasks.read_meanings([PLACES / "eat.train.csv.gz"])
    table = data.read_table(PLACES / "stay.texts.csv.gz")
    pairs = [(place.prompt, text) for place in known for text in place.references]
    pairs += [("", text) for text in table.text("ref")]  # nothing is asked for
    tokenizer = make_tokenizer([" ".join(pair) for pair in pairs])
    columns, _ = tasks.say_columns(tokenizer, pairs, CONFIG)
    shapes = data.shapes_for([columns], 4)
    batches = data.Batches(columns, shapes, args.batch, 0, seed=0)

    model = models.GPT2(CONFIG)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, min(200, args.steps // 2), args.steps, args.rate / 50
    )
    tx = optax.adamw(rate, b2=0.99, weight_decay=0.01)
    # Every leaf is trained, from scratch: the same step as for adapters.
    state = train.TrainState.create(jax.tree.map(jlora.Full, params), tx)
    step = train.make_train_step(tasks.causal_loss(model), tx, clip_norm=1.0)
    stream = batches.stream()
    for i in range(1, args.steps + 1):
        state, numbers = step(state, next(stream))
        if i % 100 == 0 or i == args.steps:
            print(f"step {i:5d}  loss {float(numbers['loss']):.3f}", flush=True)

    params = jlora.merge(state.params)
    models.save(model, params, args.output, overwrite=True)
    tokenizer.save_pretrained(args.output)
    for domain in ("eat", "stay"):
        places = tasks.read_meanings([PLACES / f"{domain}.test.csv"])
        prompts = [place.prompt for place in places]
        rows = {"input_ids": data.tokenise(tokenizer, prompts, 128).rows}
        test = data.Batches(rows, data.shapes_for([rows], 1), 20, 0)
        answer = tasks.Generator(model, tokenizer, 64)
        said = test.collect(functools.partial(answer, params))
        score = metrics.bleu(said, [place.references for place in places])
        print(f"BLEU on {domain}: {score:.1f}")


if __name__ == "__main__":
    main()
