"""Tasks of GLUE on a real encoder: LoRA of jlora and PEFT, every weight, the head.

All see the same batches in the same order and begin with the same head; PEFT begins
with jlora's factors too, from the folder that `jlora.peft.save` writes. AdamW without
decay, a rate that rises for 6 % of the steps and falls to 0 linearly, gradients clipped
to 1, no dropout. `score` is of GLUE's development set after the last step, 1 for
perfect, where a task has two metrics their mean; `std` is over seeds, each of which
draws sentences, head and order anew. `mbytes` is what a task adds to the base on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.fine_tuning import fine_tune
from benchmarks.race import Row, Rows, curve, over_seeds

FULL, HEAD, PEFT = "full fine-tuning", "head alone", "PEFT"
CONTENDERS = ("jlora", PEFT, FULL, HEAD)
COLUMNS = (
    "case", "contender", "lr", "metric", "score", "std", "seeds", "steps", "trainable",
    "mbytes", "loss", "error",
)  # fmt: skip


def run(options: Any) -> Iterator[Rows]:
    """Yield the rows of each task."""
    names = options.contenders or [*CONTENDERS]
    for task in options.tasks:
        rows, about = [], dict[str, Row]()
        for name in names:
            one = functools.partial(_run, options, task, name)
            row, ran_on = over_seeds(one, options, "score", ["loss"])
            about |= {name: ran_on} if ran_on else {}
            title = f"{pathlib.Path(options.model).name}, {task}"
            rows.append({"case": title, "contender": name, **row})
        yield rows, about


def _run(options: Any, task: str, name: str, seed: int) -> tuple[Row, Row]:
    """Train and measure one contender; return its figures, and what it ran on."""
    from jlora import tasks

    rates = dict(zip((FULL, HEAD), options.rates[1:], strict=True))
    rate = rates.get(name, options.rates[0])
    quick: dict[str, Any] = {}
    if options.quick:
        quick = {"train_size": 8, "test_size": 8, "batch_size": 4, "rank": 2}
    settings = tasks.ClassificationSettings(**{
        "model": options.model, "glue": task, "data": options.data, "seed": seed,
        "train_size": options.sentences, "max_length": options.length or None,
        "batch_size": options.batch, "epochs": options.epochs, "rank": options.rank,
        "lr": rate, "schedule": "linear", "warmup_ratio": 0.06, **quick,
    })  # fmt: skip
    if name == FULL:
        settings = dataclasses.replace(settings, rank=None, full=True)
    loaded = settings.load(options.model)
    examples = tasks.Classification(settings, loaded)
    steps = settings.number_of_steps(len(examples.train))
    batches = itertools.islice(examples.train.stream(), steps)
    train = _peft if name == PEFT else _jlora
    row, logits, about = train(
        name, settings, loaded, examples, batches, settings.optimizer(steps)
    )
    (test,) = list(examples.tests)[:1]  # of MNLI the matched half
    scores = examples.scores({test: logits(test)})[test]
    found = {
        "lr": f"{rate:g}", "metric": ", ".join(scores), "steps": steps,
        "score": statistics.mean(scores.values()), **row,
        "each": scores,
    }  # fmt: skip
    return found, about


def _jlora(
    name: str, settings: Any, loaded: Any, examples: Any, batches: Any, optimizer: Any
) -> tuple[Row, Callable[[str], Any], Row]:
    import jlora

    if name == HEAD:
        tree = jlora.lorafy(loaded.params, 1, [], train=["classifier"])
    else:
        tree = settings.adapt(loaded.params, settings.key)
    params, row, about = fine_tune(
        tree, examples.loss_fn, optimizer[0], settings.key, batches
    )
    return row, lambda test: examples.logits(params, examples.tests[test]), about


def _peft(
    name: str, settings: Any, loaded: Any, examples: Any, batches: Any, optimizer: Any
) -> tuple[Row, Callable[[str], Any], Row]:
    import numpy as np
    import peft
    import torch
    import transformers

    import jlora.peft
    from jlora import models
    from jlora.train._report import size_of

    with tempfile.TemporaryDirectory() as folder:
        tree = settings.adapt(loaded.params, settings.key)
        models.save(loaded.model, loaded.params, f"{folder}/base")
        jlora.peft.save(
            f"{folder}/adapter", tree, model=loaded.model, task_type="SEQ_CLS"
        )
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            f"{folder}/base"
        )
        net = peft.PeftModel.from_pretrained(
            base, f"{folder}/adapter", is_trainable=True
        ).eval()  # without dropout, as ours
        size = size_of(pathlib.Path(folder) / "adapter")
    trained = [p for p in net.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    is_number, done = not settings.class_names, 0

    def logits_of(batch: Mapping[str, Any]) -> Any:
        inputs = {k: torch.from_numpy(v).long() for k, v in batch.items()
                  if k != "labels"}  # fmt: skip
        return net(**inputs).logits

    def one(batch: Mapping[str, Any]) -> float:
        nonlocal done
        tx.param_groups[0]["lr"] = float(optimizer[1](done))
        labels, logits = torch.from_numpy(batch["labels"]), logits_of(batch)
        counts = labels != -100
        if is_number:
            loss = torch.mean((logits[counts, 0] - labels[counts]) ** 2)
        else:
            loss = torch.nn.functional.cross_entropy(logits, labels.long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        tx.step()
        tx.zero_grad()
        done += 1
        return loss.item()

    def logits(test: str) -> Any:
        with torch.no_grad():
            found = examples.tests[test].collect(lambda x: logits_of(x).numpy())
        return np.stack(found)

    row = curve(one, batches)
    row |= {"trainable": sum(p.numel() for p in trained), "mbytes": size / 1e6}
    libraries = ("torch", "transformers", "peft")
    versions = {n: importlib.metadata.version(n) for n in libraries}
    return row, logits, {"versions": versions, "device": "cpu"}
