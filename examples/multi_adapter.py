"""Two adapters on one base: trained, switched, mixed, merged, exported to PEFT.

On the T5 of 1.2 M parameters that comes with the examples, which translates German
sentences of the domain `home` well but hardly those of `travel`, one adapter learns
`travel` and another learns to write in lower case. They are switched without compiling
again, added, mixed with weights, compressed, merged, and written as a folder that PEFT
reads. Half a minute on two cores:

    python examples/multi_adapter.py --output runs/adapters
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import jlora.peft
from jlora import data, models, train

ASSETS = Path(__file__).parent / "assets"
CORPUS = ASSETS / "corpus"
LONGEST = 40  # tokens of a sentence


def read(stem: str, suffix: str = "") -> list[data.Pair]:
    """Read German sentences of the embedded corpus beside English ones."""
    files = [CORPUS / f"{stem}.{code}{suffix}" for code in ("de", "en")]
    return data.read_pairs(files, "de-en")


def batches(tokenizer: Any, pairs: list[data.Pair], *, lower: bool) -> data.Batches:
    """Make batches of one shape; with `lower` the English is in lower case."""
    sources = [pair.source for pair in pairs]
    targets = [pair.target.lower() if lower else pair.target for pair in pairs]
    prompt = data.direction("de-en").prompt
    columns = {
        "input_ids": data.tokenise(tokenizer, sources, LONGEST, prefix=prompt).rows,
        "labels": data.tokenise(tokenizer, targets, LONGEST).rows,
    }
    shapes = data.shapes_for([columns], 1)
    return data.Batches(columns, shapes, 32, tokenizer.pad_token_id, seed=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--steps", type=int, default=120, help="of each adapter (120)")
    args = parser.parse_args(argv)
    model, base = models.load(ASSETS / "tiny-t5-de-en")
    tokenizer = data.load_tokenizer(ASSETS / "tiny-t5-de-en")

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        write = models.shift_right(batch["labels"], model.config)
        texts = batch["input_ids"], batch["attention_mask"]
        logits = model.apply({"params": params}, *texts, write)
        return train.cross_entropy(logits, batch["labels"])

    # Train two adapters, by one compiled step: they differ in numbers alone.
    texts = {
        "travel": batches(tokenizer, read("travel.train")[:1024], lower=False),
        "lower": batches(tokenizer, read("base/home.train", ".gz")[:1024], lower=True),
    }
    tx = optax.adam(1e-2)
    step = train.make_train_step(loss_fn, tx)
    adapters: Any = base
    for number, (name, batch_source) in enumerate(texts.items()):
        key = jax.random.key(number)
        fresh = jlora.lorafy(base, 8, "all-linear", exclude=["lm_head"], key=key)
        state = train.TrainState.create(fresh, tx, key)
        epochs = itertools.chain.from_iterable(itertools.repeat(batch_source))
        for batch in itertools.islice(epochs, args.steps):
            state, metrics = step(state, batch)
        print(f"{name}: loss {float(metrics['loss']):.3f} after {args.steps} steps")
        adapters = jlora.add(adapters, name, state.params)
    print(adapters)

    # Switch, disable, add, mix: each is a tree that the same functions take.
    both = {"travel": 1.0, "lower": 0.7}
    small, report = jlora.weighted(adapters, both, "svd", rank=8, report=True)
    print(f"\ncompressed to rank 8, {max(k.lost for k in report):.0%} lost at most")
    adapters = jlora.add(adapters, "both", small)
    trees = {
        "base": jlora.disable(adapters).params,
        "travel": jlora.activate(adapters, "travel").params,
        "lower": jlora.activate(adapters, "lower").params,
        "active together": jlora.activate(adapters, ["travel", "lower"]).params,
        "mixed": jlora.weighted(adapters, both),
        "mixed, rank 8": adapters["both"],
    }
    pairs = read("travel.test")[:2]
    source = [data.direction("de-en").prompt + pair.source for pair in pairs]
    inputs = tokenizer(source, return_tensors="np", padding=True)
    for pair in pairs:
        print(f"\n{pair.source}\n  {'reference':16} {pair.target}")
        for name, tree in trees.items():
            tokens = models.generate(
                model, tree, **inputs, max_new_tokens=LONGEST, transform=jlora.lora
            )
            text = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            print(f"  {name:16} {text[pairs.index(pair)]}")

    # Leave a merged model, and folders for PEFT: one, and of several each by its name.
    models.save(model, jlora.merge(adapters["both"]), args.output / "merged")
    for name in adapters.names:
        jlora.peft.save(
            args.output / "peft", adapters[name], model=model, adapter=name,
            task_type="SEQ_2_SEQ_LM", overwrite=True,
        )  # fmt: skip
    print(f"\nwritten: {args.output / 'merged'}, {args.output / 'peft'}")


if __name__ == "__main__":
    main()
