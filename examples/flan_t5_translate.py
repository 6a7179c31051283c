r"""Teach a T5 to translate what it does not know yet, with LoRA.

What it shows: the whole of a fine-tuning run with jlora. Low-rank adapters on the query
and value projections (`jlora.lorafy`), training of them alone with validation,
interruption and resumption (`jlora.train.fit`), BLEU before and after, the adapter as a
small file, and the merged model as a Hugging Face folder.

On what: without arguments, on a T5 of 1.2 M parameters and a small corpus of German and
English that lie beside this file. The model translates sentences about home and garden
well and hardly any about ships and travel; the adapter teaches it those.

How long: a minute on two CPU cores, no connection needed. BLEU on sentences of travel
that it never saw rises from 21 to 61.

    python examples/flan_t5_translate.py

The same code trains on your own text, or on the hub's models and datasets:

    python examples/flan_t5_translate.py --model google/flan-t5-small \
        --dataset wmt/wmt16 --config de-en --train-size 100000 --rank 16 --alpha 32
    python examples/flan_t5_translate.py --model DIR --direction en-cs \
        --train train.en.gz train.cs.gz --targets all-linear
    python examples/flan_t5_translate.py --model DIR --train corpus.parquet --full

Ctrl-C saves and prints the command that continues; --help lists all options. Needs
`pip install "jlora[train]"`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu

import jlora
from jlora import data, models, train
from jlora.train import option

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "tiny-t5-de-en"
SAMPLES = 3  # good ones, and as many bad ones

Tree = Any
Arrays = dict[str, np.ndarray]


# ----------------------------------------------------------------------------- settings


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(train.RunSettings):
    """What was asked for; the defaults stand in brackets."""

    model: str | None = option(
        None, "folder or hub name (embedded tiny T5)", path=True,
        group="model and data", metavar="DIR|NAME")
    dataset: str | None = option(
        None, "dataset: folder or hub name", path=True, metavar="DIR|NAME")
    config: str | None = option(None, "the dataset's configuration, such as de-en")
    splits: list[str] = option(
        ["train", "validation", "test"], "its splits (train validation test)",
        count=3, metavar=("TRAIN", "VALID", "TEST"))
    train: list[str] | None = option(
        None, "FILE.de FILE.en, or tables: parquet, jsonl, json, csv, tsv; or .gz",
        path=True, metavar="FILE")
    valid: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    test: list[str] | None = option(
        None, "the same (a part of --train)", path=True, metavar="FILE")
    keep: list[str] | None = option(
        None, "the same: a test of what should not be forgotten", path=True,
        metavar="FILE")
    direction: str = option("de-en", "two languages, such as en-cs (de-en)")
    prompt: str | None = option(None, "before each source (translate X to Y: )")
    train_size: int | None = option(None, "train on so many pairs (all)", least=1)
    valid_size: int = option(500, "pairs for the loss (500)", least=1)
    test_size: int = option(500, "pairs for BLEU, the first (500)", least=1)
    skip_empty: bool = option(False, "leave out pairs of which a side is empty")
    max_source_length: int = option(128, "tokens; longer texts are cut (128)", least=2)
    max_target_length: int = option(128, "tokens; longer texts are cut (128)", least=2)

    rank: int | None = option(None, "r (8)", least=1, group="adapter")
    alpha: float | None = option(None, "the scale is alpha/r (2r)", above=0)
    targets: list[str] | None = option(
        None, "names of layers, or all-linear (query value)")
    dropout: float = option(0.0, "of the adapters' inputs (0)", least=0, below=1)
    full: bool = option(False, "train every weight instead, for comparison")

    batch_size: int = option(32, "pairs a step (32)", least=1, group="training")
    accumulate: int = option(1, "parts a batch is cut into (1)", least=1)
    epochs: float | None = option(
        None, "passes over the training pairs (3)", above=0, extends=True,
        replaces="steps")
    steps: int | None = option(
        None, "steps, instead of --epochs", least=1, extends=True, replaces="epochs")
    lr: float | None = option(None, "peak rate (3e-3; 1e-3 with --full)", above=0)
    schedule: str = option(
        "cosine", "how the rate falls to 0 (cosine)",
        choices=("cosine", "linear", "constant"))
    warmup: int = option(20, "steps in which it rises (20)", least=0)
    weight_decay: float = option(0.0, "AdamW's (0)", least=0)
    clip: float = option(1.0, "the gradient's norm; 0 is off (1)", least=0)
    precision: str = option(
        "float32", "what the model computes in; adapters stay float32 (float32)",
        choices=("float32", "bfloat16"))
    buckets: int = option(3, "shapes of batches; more pad less (3)", least=1)
    seed: int = option(0, "of adapters, data order and dropout (0)", least=0)

    eval_every: int | None = option(
        None, "steps between validations (a tenth of the run, or an epoch)", least=1,
        group="evaluation")
    eval_batch_size: int = option(64, "pairs (64)", least=1)
    beams: int = option(1, "1 is greedy (1)", least=1)
    # fmt: on

    def check(self) -> None:
        """Refuse options that do not go together."""
        data.direction(self.direction)
        own = self.train or self.dataset
        lora = (self.rank, self.alpha, self.targets, self.dropout or None)
        faults = {
            "--full trains every weight: --rank, --alpha, --targets and --dropout are "
            "an adapter's": self.full and any(x is not None for x in lora),
            "--dataset brings its own splits; leave --train, --valid and --test out": (
                self.dataset and (self.train or self.valid or self.test)
            ),
            "--config belongs to a --dataset": self.config and not self.dataset,
            "--valid, --test and --keep need --train or --dataset": (
                not own and (self.valid or self.test or self.keep)
            ),
            "--model needs data: --train FILE.de FILE.en, or --dataset": (
                self.model and not own
            ),
            "the embedded corpus is German and English: another --direction needs "
            "--train": not own and self.direction not in ("de-en", "en-de"),
            f"--batch-size {self.batch_size} does not fall into --accumulate "
            f"{self.accumulate} equal parts": self.batch_size % self.accumulate,
        }
        for said, is_wrong in faults.items():
            if is_wrong:
                raise jlora.OptionError(f"{said}.\nSee --help.")

    @property
    def what_is_trained(self) -> str:
        """A line for the report."""
        if self.full:
            return "every weight"
        names = " ".join(self.targets or ["query", "value"])
        return f"adapters of rank {self.rank or 8} on {names}"

    @property
    def prefix(self) -> str:
        """What the model reads before each source."""
        if self.prompt is not None:
            return self.prompt
        return data.direction(self.direction).prompt


# ------------------------------------------------------------------------------- model


def load_model(s: Settings) -> tuple[Any, Tree, Any]:
    """Load the model, its parameters and its tokenizer."""
    source, precision = s.model or EMBEDDED, jnp.dtype(s.precision)
    # Whole kernels are trained in float32, whatever the model computes in.
    dtype = jnp.float32 if s.full else precision
    model, params = models.load(source, dtype, compute_dtype=precision)
    return model, params, data.load_tokenizer(source)


def adapt(params: Tree, s: Settings) -> Tree:
    """Put adapters on the targets; with --full every weight is trained instead."""
    if s.full:
        return jax.tree.map(jlora.Full, params)
    rank, targets = s.rank or 8, s.targets or ["query", "value"]
    all_linear = targets == ["all-linear"]
    return jlora.lorafy(
        params,
        rank,
        "all-linear" if all_linear else targets,
        alpha=s.alpha or 2 * rank,
        key=jax.random.key(s.seed),
        # As PEFT has it, "all linear layers" leaves the head out, where it is its own.
        exclude=[name for name in ("lm_head",) if all_linear and name in params],
        dropout=s.dropout,
    )


def make_loss(model: Any) -> Any:
    """Return the loss: the sum of the labels' losses, and their number."""

    def loss_fn(params: Tree, batch: Arrays, key: Any) -> Any:
        # The logits are never made as a whole: they are the largest array of the step.
        hidden, kernel = model.apply(
            {"params": params},
            batch["input_ids"],
            batch["attention_mask"],
            models.shift_right(batch["labels"], model.config),
            method="features",
        )
        return train.linear_cross_entropy(hidden, kernel, batch["labels"])

    return loss_fn


# -------------------------------------------------------------------------------- data

Pairs = list[data.Pair]


def read_corpus(s: Settings) -> tuple[Pairs, Pairs, dict[str, Pairs]]:
    """Read what to train on, to validate with, and to test; the first test counts."""

    def read(files: Sequence[str | Path]) -> Pairs:
        empty = "skip" if s.skip_empty else "error"
        return data.read_pairs(files, s.direction, empty=empty)

    def embedded(name: str) -> Pairs:
        return read([ASSETS / "corpus" / f"{name}.{code}" for code in ("de", "en")])

    if s.dataset is not None:
        limits = (s.train_size, None, None)
        training, valid, test = (
            data.read_dataset_pairs(
                s.dataset, s.direction, s.config, split, limit=limit, seed=s.seed
            )
            for split, limit in zip(s.splits, limits, strict=True)
        )
        tests = {"test": test}
    elif s.train is None:
        training, valid = embedded("travel.train"), embedded("travel.valid")
        tests = {"travel": embedded("travel.test"), "home": embedded("home.test")}
    else:
        training, test = read(s.train), read(s.test) if s.test else None
        if test is None:
            training, test = data.hold_out(training, s.test_size, s.seed)
        valid = read(s.valid) if s.valid else None
        if valid is None:
            training, valid = data.hold_out(training, s.valid_size, s.seed)
        tests = {"test": test}
    if s.keep:
        tests["keep"] = read(s.keep)
    tests = {name: pairs[: s.test_size] for name, pairs in tests.items()}
    return data.subset(training, s.train_size, s.seed), valid[: s.valid_size], tests


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Batches of few shapes, the pairs of the tests, and what a user should know."""

    train: data.Batches
    valid: data.Batches
    tests: dict[str, data.Batches]
    pairs: dict[str, Pairs]
    remarks: list[str]


def prepare(s: Settings, model: Any, tokenizer: Any) -> Corpus:
    """Read and tokenise everything, and sort it into length buckets."""
    training, valid, tests = read_corpus(s)
    config = model.config
    remarks: list[str] = []

    def tokenise(name: str, pairs: Pairs) -> dict[str, Any]:
        sources, targets = zip(*pairs, strict=True)
        known = {"vocabulary": config.vocab_size, "end": config.eos_token_id}
        read = data.tokenise(
            tokenizer, sources, s.max_source_length, prefix=s.prefix, **known
        )
        write = data.tokenise(tokenizer, targets, s.max_target_length, **known)
        remarks.extend(read.remarks(f"{name}, sources"))
        remarks.extend(write.remarks(f"{name}, targets"))
        return {"input_ids": read.rows, "labels": write.rows}

    splits = {"train": training, "valid": valid, **tests}
    tokens = {name: tokenise(name, pairs) for name, pairs in splits.items()}
    shapes = data.shapes_for(list(tokens.values()), s.buckets)
    pad = config.pad_token_id
    batches = {
        name: data.Batches(columns, shapes, s.eval_batch_size, pad)
        for name, columns in tokens.items()
    }
    return Corpus(
        data.Batches(tokens["train"], shapes, s.batch_size, pad, s.seed),
        batches["valid"],
        {name: batches[name] for name in tests},
        tests,
        remarks,
    )


def count_tokens(batch: Arrays) -> int:
    """Return the tokens of a batch, without padding."""
    return int(batch["attention_mask"].sum() + (batch["labels"] >= 0).sum())


# -------------------------------------------------------------------- before and after

Said = dict[str, list[str]]  # what a model makes of each test


@dataclasses.dataclass(frozen=True)
class Translator:
    """A model with its tokenizer; `params` may carry adapters or not."""

    model: Any
    tokenizer: Any
    longest: int
    beams: int

    def __call__(self, params: Tree, batch: Arrays) -> list[str]:
        """Translate a batch."""
        tokens = models.generate(
            self.model,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=self.longest,
            num_beams=self.beams,
            transform=jlora.lora,
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def tests(
        self, when: str, params: Tree, corpus: Corpus, folder: train.RunFolder
    ) -> Said:
        """Translate the tests into files; a resumed run has its `before` already."""
        folder.outputs.mkdir(exist_ok=True)
        said: Said = {}
        for name, batches in corpus.tests.items():
            file = folder.outputs / f"{name}.{when}.txt"
            known = folder.resumed and when == "before" and file.exists()
            lines = data.read_lines(file) if known else []
            if len(lines) != batches.examples:
                translate = functools.partial(self, params)
                lines = batches.collect(translate, title=f"{when}: {name}")
                file.write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")
            said[name] = lines
        return said


def bleu(said: Said, corpus: Corpus) -> dict[str, float]:
    """Return sacrebleu's corpus BLEU of each test, 13a tokenisation, mixed case."""

    def score(lines: list[str], pairs: Pairs) -> float:
        return sacrebleu.corpus_bleu(lines, [[pair.target for pair in pairs]]).score

    return {name: score(lines, corpus.pairs[name]) for name, lines in said.items()}


def samples(pairs: Pairs, before: list[str], after: list[str]) -> list[Sequence[str]]:
    """Return the best translations that training changed, and the worst of all."""
    rows = [
        (sacrebleu.sentence_chrf(new, [pair.target]).score, *pair, old, new)
        for pair, old, new in zip(pairs, before, after, strict=True)
    ]
    rows.sort(key=lambda row: -row[0])
    changed = [row for row in rows if row[3] != row[4]]
    chosen = dict.fromkeys([*changed[:SAMPLES], *rows[-SAMPLES:]])
    return [(f"{quality:.0f}", *texts) for quality, *texts in chosen]


# ----------------------------------------------------------------------------- the run


def run(s: Settings) -> None:
    """Load, train, compare, save, report."""
    began = time.perf_counter()
    model, params, tokenizer = load_model(s)
    tree = adapt(params, s)
    summary = jlora.summary(tree)
    corpus = prepare(s, model, tokenizer)
    print(summary, *(f"note: {remark}" for remark in corpus.remarks), sep="\n")
    longest = corpus.train.shapes[-1][1]
    translate = Translator(model, tokenizer, longest, s.beams)
    with s.claim("translate") as folder:
        before = translate.tests("before", tree, corpus, folder)
        fit = fit_adapter(s, model, tree, corpus, folder)
        after = translate.tests("after", fit.params, corpus, folder)
        merged = jlora.merge(fit.params)
        models.save(model, merged, folder.merged, overwrite=True)
        tokenizer.save_pretrained(folder.merged)
        batch = next(iter(next(iter(corpus.tests.values()))))
        same = translate(merged, batch) == translate(fit.params, batch)
        facts = {
            "trained": s.what_is_trained,
            "parameters": f"{summary.trainable:,} ({summary.fraction:.2%} of "
            f"{summary.total:,})",
            **fit.facts(),
            "merged model": "translates a batch as the unmerged does"
            if same
            else "some translations differ from the unmerged model's (rounding)",
            "whole script": f"{time.perf_counter() - began:.0f} s",
        }
        report(s, corpus, folder, facts, before, after, str(summary))


def fit_adapter(
    s: Settings, model: Any, tree: Tree, corpus: Corpus, folder: train.RunFolder
) -> train.Fit:
    """Train the adapter."""
    steps = s.steps or max(1, round((s.epochs or 3.0) * len(corpus.train)))
    peak = s.lr or (1e-3 if s.full else 3e-3)
    rate = train.warmup_schedule(peak, steps, warmup=s.warmup, decay=s.schedule)
    return train.fit(
        make_loss(model),
        tree,
        optax.adamw(rate, weight_decay=s.weight_decay),
        corpus.train,
        folder,
        steps=steps,
        valid=corpus.valid,
        eval_every=s.eval_every,
        key=jax.random.key(s.seed),
        learning_rate=rate,
        count=count_tokens,
        accumulate=s.accumulate,
        clip_norm=s.clip or None,
    )


# ---------------------------------------------------------------------------- reporting

FIGURES = """\
BLEU counts the words and phrases that translations share with their references, from 0
to 100 (sacrebleu, whole test); it compares models on one test, and says little alone.
The loss is the mean of -log p of a target token; e to its power is the perplexity. The
adapter of the lowest validation loss is kept; `after` speaks of it."""
FORGETTING = """\
{name} fell by {fall:.1f}: trained on other text alone, a model forgets. A lower --lr,
fewer --steps, a smaller --alpha, or some pairs of that kind among the training text
lessen it; without the adapter the model is as it was."""
USE = """\
from jlora import data, models

model, params = models.load("{folder}")
tokenizer = data.load_tokenizer("{folder}")
batch = tokenizer(["{prefix}{source}"], return_tensors="np")
tokens = models.generate(model, params, **batch, max_new_tokens={longest})
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))"""


def report(
    s: Settings,
    corpus: Corpus,
    folder: train.RunFolder,
    facts: dict[str, str],
    before: Said,
    after: Said,
    parameters: str,
) -> None:
    """Write the plot and the report, and print the gist of it."""
    old, new = bleu(before, corpus), bleu(after, corpus)
    head = ("test", "sentences", "BLEU before", "BLEU after", "change")
    scores = [
        (x, len(after[x]), f"{old[x]:.1f}", f"{new[x]:.1f}", f"{new[x] - old[x]:+.1f}")
        for x in new
    ]
    first, *others = new
    remarks = [
        FORGETTING.format(name=name, fall=old[name] - new[name]).replace("\n", " ")
        for name in others
        if new[name] < old[name] - 1
    ]
    chosen = samples(corpus.pairs[first], before[first], after[first])
    use = USE.format(
        folder=folder.merged,
        prefix=s.prefix,
        source=chosen[0][1].replace('"', "'"),
        longest=corpus.train.shapes[-1][1],
    )
    title = f"{Path(s.model or EMBEDDED).name}: {s.direction}"
    train.plot_losses(folder.metrics, folder.plot, title)
    document = train.Report(title).section("Before and after").table(head, scores)
    document.text(FIGURES).items([*remarks, *corpus.remarks])
    document.section("Training").table(("what", ""), facts.items())
    document.image(folder.plot, "loss").section("Translations of held-out sentences")
    document.text(f"Of `{first}`: the best that training changed, and the worst.")
    document.table(("chrF", "source", "reference", "before", "after"), chosen)
    document.section("Now use it").code(use, "python")
    document.section("Files").table(("file", "size"), train.file_sizes(folder.path))
    document.section("Made with").table(("what", ""), train.machine().items())
    document.section("Parameters").code(parameters).write(folder.report)

    for fact, value in facts.items():
        print(f"{fact}: {value}")
    for quality, source, target, one, two in dict.fromkeys(chosen[:2] + chosen[-2:]):
        print(f"\n  source     {source}\n  reference  {target}")
        print(f"  before     {one}\n  after      {two}   (chrF {quality})")
    print(f"\n{train.table([head, *scores])}")
    for remark in remarks:
        print(textwrap.fill(remark, 88))
    print(f"\nNow use it:\n\n{use}\n\nThe report is {folder.report}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return train.command_line(Settings, run, argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
