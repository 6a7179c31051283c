"""Data to text on the E2E challenge: LoRA of jlora and of PEFT, and every weight.

The base is a small GPT-2. Where `--model` is no folder yet, it is trained there from
scratch on the development set, whose places are coffee shops for the most part. The
contenders train on the meanings of the test set, pubs and restaurants, but for 200 that
are held out to be said. All see the same batches in the same order, AdamW without
decay, a rate that rises for a tenth of the steps and falls to 0 as a cosine, gradients
clipped to 1, no dropout; PEFT begins with jlora's factors. All answer by jlora's beam
search (4 beams, length penalty 0.9, no 4-gram twice), so that training alone differs.
`mbytes` is what a contender adds to the base on disk, `held_out` the loss a token of
the held-out texts.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import itertools
import pathlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.fine_tuning import fine_tune
from benchmarks.initialise import _device, _versions
from benchmarks.race import Row, Rows, curve, over_seeds

BASE, FULL, PEFT = "base", "full fine-tuning", "PEFT"
CONTENDERS = (BASE, "jlora", PEFT, FULL)
METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider")
COLUMNS = (
    "case", "contender", "lr", *METRICS, "std", "seeds", "steps", "trainable", "mbytes",
    "loss", "held_out", "error",
)  # fmt: skip
HELD = 200  # meanings to be said
KNOWN, NEW = "devset.csv", "testset_w_refs.csv"


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of all contenders."""
    folder = pathlib.Path(options.model)
    if not (folder / "config.json").exists():
        make_base(options, folder)
    rows, about = [], dict[str, Row]()
    with tempfile.TemporaryDirectory() as place:
        files = split(options, pathlib.Path(place))
        for name in options.contenders or CONTENDERS:
            one = functools.partial(_run, options, files, name)
            row, ran_on = over_seeds(
                one, options, "bleu", [*METRICS, "loss", "held_out"]
            )
            about |= {name: ran_on} if ran_on else {}
            rows.append({"case": f"{folder.name}, E2E", "contender": name, **row})
    yield rows, about


def split(options: Any, folder: pathlib.Path) -> dict[str, list[str]]:
    """Write the test set's meanings into tables to train on, to validate and to say."""
    from jlora import tasks

    meanings = tasks.read_meanings([pathlib.Path(options.data) / NEW])
    random.Random(0).shuffle(meanings)
    held, kept = (2, 8) if options.quick else (HELD, None)
    parts = {"test": meanings[:held], "train": meanings[held:kept]}
    parts["valid"] = parts["test"]  # nothing is chosen by it
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            out.writerow(["mr", "ref"])
            out.writerows((m.text, ref) for m in part for ref in m.references)
    return {name: [str(folder / f"{name}.csv")] for name in parts}


def make_base(options: Any, folder: pathlib.Path) -> None:
    """Train a small GPT-2 from scratch on the places of the development set."""
    import jax
    import jax.numpy as jnp

    import jlora
    from jlora import data, models, tasks, train

    tokenizer = data.load_tokenizer(options.tokenizer)
    end = tokenizer.eos_token_id
    width, layers = (16, 1) if options.quick else (128, 3)
    config = models.GPT2Config(
        vocab_size=len(tokenizer), n_positions=192, n_embd=width, n_layer=layers,
        n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = models.GPT2(config)
    params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    files = {"train": [str(pathlib.Path(options.data) / KNOWN)]}
    settings = _settings(options, files, full=True, lr=2e-3, epochs=options.base_epochs)
    task = tasks.DataToText(settings, tasks.Loaded(model, params, tokenizer))
    steps = settings.number_of_steps(len(task.train))
    tx, _ = settings.optimizer(steps)
    state = train.TrainState.create(jax.tree.map(jlora.Full, params), tx)
    step = train.make_train_step(task.loss_fn, tx, clip_norm=1.0)
    for batch in itertools.islice(task.train.stream(), steps):
        state, _ = step(state, batch)
    models.save(model, jlora.merge(state.params), folder)
    tokenizer.save_pretrained(folder)


def _settings(options: Any, files: Mapping[str, list[str]], **changes: Any) -> Any:
    from jlora import tasks

    quick: dict[str, Any] = {}
    if options.quick:
        quick = {"batch_size": 4, "train_size": 4, "max_text_length": 8, "beams": 2}
    return tasks.DataToTextSettings(**{
        "model": options.model, "batch_size": options.batch, "warmup_ratio": 0.1,
        "max_text_length": 80, **files, **changes, **quick,
    })  # fmt: skip


def _run(
    options: Any, files: Mapping[str, list[str]], name: str, seed: int
) -> tuple[Row, Row]:
    """Train and measure one contender; return its figures, and what it ran on."""
    from jlora import metrics, tasks, train

    rate = options.rates[1 if name == FULL else 0]
    own = {"full": True} if name == FULL else {
        "rank": 2 if options.quick else options.rank, "targets": ["all-linear"],
    }  # fmt: skip
    settings = _settings(
        options, files, lr=rate, epochs=options.epochs, seed=seed, **own
    )
    loaded = settings.load(options.model)
    task = tasks.DataToText(settings, loaded)
    steps = settings.number_of_steps(len(task.train))
    batches = itertools.islice(task.train.stream(), steps)
    trained = {BASE: _base, PEFT: _peft}.get(name, _jlora)
    params, row, about = trained(settings, loaded, task, batches, steps)
    said = task.prompts.collect(functools.partial(task.say, params))
    scores = metrics.generation(said, [m.references for m in task.meanings])
    measure = train.make_eval_step(lambda p, b: {"loss": task.loss_fn(p, b, None)})
    row["held_out"] = float(train.evaluate(measure, params, task.valid)["loss"])
    if name != BASE:
        row |= {"lr": f"{rate:g}", "steps": steps}
    return {**scores, **row}, about


def _base(settings: Any, loaded: Any, *_: Any) -> tuple[Any, Row, Row]:
    import jax

    about = {"versions": _versions(), "device": _device(jax)}
    return loaded.params, {"trainable": 0, "mbytes": 0.0}, about


def _jlora(
    settings: Any, loaded: Any, task: Any, batches: Any, steps: int
) -> tuple[Any, Row, Row]:
    tx, _ = settings.optimizer(steps)
    tree = settings.adapt(loaded.params, settings.key)
    return fine_tune(tree, task.loss_fn, tx, settings.key, batches)


def _peft(
    settings: Any, loaded: Any, task: Any, batches: Any, steps: int
) -> tuple[Any, Row, Row]:
    import peft
    import torch
    import transformers

    import jlora.peft
    from jlora.train._report import size_of

    _, rate = settings.optimizer(steps)
    with tempfile.TemporaryDirectory() as folder:
        tree = settings.adapt(loaded.params, settings.key)
        jlora.peft.save(
            f"{folder}/start", tree, model=loaded.model, task_type="CAUSAL_LM"
        )
        base = transformers.AutoModelForCausalLM.from_pretrained(settings.model)
        net = peft.PeftModel.from_pretrained(
            base, f"{folder}/start", is_trainable=True
        ).eval()  # without dropout, as ours
        trained = [p for p in net.parameters() if p.requires_grad]
        tx, done = torch.optim.AdamW(trained, weight_decay=0.0, fused=True), 0

        def one(batch: Mapping[str, Any]) -> float:
            nonlocal done
            tx.param_groups[0]["lr"] = float(rate(done))
            given = {k: torch.from_numpy(batch[k]).long()
                     for k in ("input_ids", "attention_mask", "labels")}  # fmt: skip
            loss = net(**given).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            tx.step()
            tx.zero_grad()
            done += 1
            return float(loss.detach())

        row = curve(one, batches)
        net.save_pretrained(f"{folder}/end")
        size = size_of(pathlib.Path(folder) / "end")
        params = jlora.peft.load(f"{folder}/end", loaded.params, model=loaded.model)
    row |= {"trainable": sum(p.numel() for p in trained), "mbytes": size / 1e6}
    libraries = ("torch", "transformers", "peft")
    versions = {n: importlib.metadata.version(n) for n in libraries}
    return params, row, {"versions": versions, "device": "cpu"}
