"""Make the tiny German-English T5 that `flan_t5_translate.py` starts from.

A T5 v1.1 of 1.2 M parameters is trained from scratch on the generated corpus
(`_corpus.py`), so that it translates the domain `home` well and `travel` hardly: of
`travel` it has read sentences of each language with gaps to fill, and looked up single
words, but it has never seen a sentence beside its translation. That is what LoRA adds.

    python examples/make_tiny_t5.py            # 8 minutes on two CPU cores
    python examples/make_tiny_t5.py --steps 20 --output /tmp/tiny   # a trial

Everything is seeded; the checkpoint in `assets/` was made with jax 0.10.2, flax 0.12.8,
optax 0.2.8 and tokenizers 0.23.1. Other versions or machines round otherwise, and give
a checkpoint of the same quality but not the same bits.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
from _corpus import DOMAINS, PROMPT, REVERSE_PROMPT, Pair, glossary, pairs
from jax import Array
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splitting
from tokenizers.processors import TemplateProcessing

from jlora.models import T5, T5Config, generate, save, shift_right

OUTPUT = Path(__file__).parent / "assets" / "tiny-t5-de-en"
SPECIAL = ("<pad>", "</s>", "<unk>")
GAP = "_"
FILL_GERMAN = "fill the gaps in German: "
FILL_ENGLISH = "fill the gaps in English: "
LOOK_UP = "look up in English: "
PROMPTS = (PROMPT, REVERSE_PROMPT, FILL_GERMAN, FILL_ENGLISH, LOOK_UP)
# Unknown words fall apart into these.
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzäöüßABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÜ0123456789!?.,:;'\"()-"
)

Params = Any
Task = tuple[str, str]  # what the encoder reads, what the decoder writes


# ------------------------------------------------------------------------ tokenizer


def make_tokenizer(n: int = 30_000, at_least: int = 5) -> Tokenizer:
    """A Unigram tokenizer: the corpus's word forms and single characters.

    The trainers of `tokenizers` look for pieces that different words share, and would
    cut this corpus's few words in two; so the vocabulary is counted, and its scores
    are the log-frequencies.
    """
    split = re.compile(r"\w+|[^\w\s]")
    sentences = [s for d in DOMAINS for pair in pairs(d, "train", n) for s in pair]
    counts = Counter(piece for s in sentences for piece in split.findall(s))
    for prompt in (*PROMPTS, GAP):
        counts.update(dict.fromkeys(split.findall(prompt), n))
    total = counts.total()
    kept = sorted((-k, w) for w, k in counts.items() if k >= at_least)
    vocab = dict.fromkeys(SPECIAL, 0.0)
    for k, w in kept:
        vocab["▁" + w if re.match(r"\w", w) else w] = float(np.log(-k / total))
    for character in "▁" + CHARACTERS:
        vocab.setdefault(character, -float(np.log(total)))
    tokenizer = Tokenizer(models.Unigram(list(vocab.items()), unk_id=2))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = splitting.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


# ---------------------------------------------------------------------------- tasks


def gapped(sentence: str, rng: np.random.Generator, rate: float = 0.25) -> str:
    """The sentence with some of its words left out."""
    words = sentence.split()
    return " ".join(GAP if rng.random() < rate else word for word in words)


def tasks(rng: np.random.Generator) -> list[Task]:
    """All that the base is taught; no sentence of `travel` with its translation."""
    found = [(PROMPT + p.de, p.en) for p in pairs("home", "train", 24_000, seed=1)]
    for p in pairs("home", "train", 4_000, seed=2):
        found.append((REVERSE_PROMPT + p.en, p.de))
    for p in pairs("travel", "train", 5_000, seed=3):
        found.append((FILL_GERMAN + gapped(p.de, rng), p.de))
    for p in pairs("travel", "train", 6_000, seed=4):
        found.append((FILL_ENGLISH + gapped(p.en, rng), p.en))
    words = [pair for domain in DOMAINS for pair in glossary(domain)]
    for i in rng.integers(len(words), size=10_000):
        found.append((LOOK_UP + words[i].de, words[i].en))
    return found


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Stack token rows to `[B, width]`, filling with zeros (`<pad>`)."""
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def batches(
    tokenizer: Tokenizer, found: list[Task], size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches without end, each of similar lengths; widths are multiples of 8."""
    read = [e.ids for e in tokenizer.encode_batch([task[0] for task in found])]
    write = [e.ids for e in tokenizer.encode_batch([task[1] for task in found])]
    longest = [max(len(a), len(b)) for a, b in zip(read, write, strict=True)]
    widths = -(-np.array(longest) // 8) * 8
    while True:
        order = rng.permutation(len(found))
        order = order[np.argsort(widths[order], kind="stable")]
        starts = np.arange(0, len(order) - size + 1, size)
        for start in rng.permutation(starts):
            rows = order[start : start + size]
            width = int(widths[rows].max())
            yield (
                pad([read[i] for i in rows], width),
                pad([write[i] for i in rows], width),
            )


# ------------------------------------------------------------------------- training


def cross_entropy(model: T5, params: Params, read: Array, write: Array) -> Array:
    """Mean over the target tokens; padding does not count."""
    fed = shift_right(write, model.config)
    logits = model.apply({"params": params}, read, read != 0, fed)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, write)
    return jnp.sum(each, where=write != 0) / jnp.sum(write != 0)


def train(model: T5, stream: Iterator[Any], steps: int, rate: float) -> Params:
    """Train from scratch, all parameters; AdamW, warm-up and cosine."""
    read, write = next(stream)
    params = model.init(jax.random.key(0), read, read != 0, write)["params"]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, min(200, steps // 2), steps, rate / 50
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=0.01),
    )
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, read: Array, write: Array) -> Any:
        loss, grads = jax.value_and_grad(partial(cross_entropy, model))(
            params, read, write
        )
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    start = time.perf_counter()
    for i in range(1, steps + 1):
        params, state, loss = step(params, state, *next(stream))
        if i % 250 == 0 or i == steps:
            seconds = time.perf_counter() - start
            print(f"step {i:5d}  loss {loss:.3f}  {seconds:4.0f} s", flush=True)
    return params


def bleu(model: T5, params: Params, tokenizer: Tokenizer, test: list[Pair]) -> float:
    """Greedy BLEU of German to English."""
    read = [e.ids for e in tokenizer.encode_batch([PROMPT + p.de for p in test])]
    said: list[str] = []
    for i in range(0, len(read), 100):
        ids = pad(read[i : i + 100], 40)
        out = generate(model, params, ids, ids != 0, max_new_tokens=32)
        said += tokenizer.decode_batch(np.asarray(out).tolist())
    return sacrebleu.corpus_bleu(said, [[p.en for p in test]]).score


# --------------------------------------------------------------------------- saving


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files that `transformers.AutoTokenizer` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "backend": "tokenizers",
        "eos_token": "</s>",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train, measure and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    tokenizer = make_tokenizer()
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,  # the corpus is too large to learn by heart
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5(config)
    rng = np.random.default_rng(0)
    stream = batches(tokenizer, tasks(rng), args.batch, rng)
    params = train(model, stream, args.steps, args.rate)

    args.output.mkdir(parents=True, exist_ok=True)
    save(model, params, args.output, overwrite=True)
    write_tokenizer(tokenizer, args.output)
    _write_json(
        args.output / "generation_config.json",
        {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    )
    for domain in DOMAINS:
        score = bleu(model, params, tokenizer, pairs(domain, "test", 500))
        print(f"BLEU on {domain}: {score:.1f}")


if __name__ == "__main__":
    main()
