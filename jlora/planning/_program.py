"""The training step that is planned: a model, adapters and a batch, all as shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora import models, tasks, train
from jlora._errors import CheckpointError, OptionError
from jlora._files import read_json
from jlora.models._hf.families import family_of
from jlora.train._static import put_together, take_apart

Tree = Any
Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained, and how; see `jlora.plan`."""

    rank: int
    targets: Any
    quantize: str | None
    full: bool
    dora: bool
    dropout: float
    precision: str
    accumulate: int
    clip: float | None
    scan_layers: bool
    remat: bool
    attn_implementation: str
    lorafy: Mapping[str, Any]

    @property
    def what_is_trained(self) -> str:
        """A line for the report."""
        if self.full:
            return "every weight"
        names = (
            self.targets if isinstance(self.targets, str) else " ".join(self.targets)
        )
        base = f"a base in {self.quantize or self.precision}"
        return (
            f"{'DoRA' if self.dora else 'LoRA'} of rank {self.rank} on {names}, {base}"
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """A step, as shapes.

    Attributes:
      name: what the model is called.
      loss_fn: the loss, `(params, batch, key)`.
      state: the abstract training state.
      batch: its shapes.
      tx: the optimiser.
      options: of `jlora.train.make_train_step`.
      parameters: how many numbers the model has.
      model: of `jlora.models`; None where the loss is the caller's.
    """

    name: str
    loss_fn: Callable[..., Any]
    state: Any
    batch: Any
    tx: Any
    options: Mapping[str, Any]
    parameters: int
    model: Any = None

    @property
    def batch_words(self) -> str:
        """The batch for a reader."""
        shapes = [f"{[*x.shape]}" for x in jax.tree.leaves(self.batch)]
        if self.model is None:
            return ", ".join(shapes[:3])
        size, length = self.batch["input_ids"].shape
        words = f"{size} x {length} tokens"
        labels = self.batch["labels"].shape
        own = isinstance(self.model, models.T5)
        return f"{words}, answers of {labels[1]}" if own else words

    @property
    def tokens(self) -> int | None:
        """How many tokens a batch has, answers included."""
        if self.model is None:
            return None
        ids, labels = self.batch["input_ids"], self.batch["labels"]
        own = isinstance(self.model, models.T5)
        return int(ids.size + (labels.size if own else 0))

    def forward(self) -> tuple[Any, list[Any]]:
        """The loss's program, and the shapes of its operands."""
        arrays, rest = take_apart((self.state.params, self.batch))
        loss = jlora.lora(self.loss_fn)

        def run(arrays: list[Any]) -> list[Any]:
            params, batch = put_together(arrays, rest)
            return jax.tree.leaves(loss(params, batch, None))

        return jax.make_jaxpr(run)(arrays), arrays

    def loss_head(self, ways: int) -> tuple[Any, list[Any]] | None:
        """The program of the head, the loss and their gradient, of 1/ways examples.

        None where the head is not a product, or is the caller's.
        """
        if self.model is None or not hasattr(self.model, "features"):
            return None
        if getattr(self.model.config, "logit_cap", None) is not None:
            return None
        labels = self.batch["labels"]
        size = -(-labels.shape[0] // (ways * int(self.options["accumulate"])))
        labels = Shape((size, *labels.shape[1:]), labels.dtype)
        width, vocab = head_sizes(self.model)
        hidden = Shape((*labels.shape, width), self.model.dtype)
        kernel = Shape((width, vocab), self.model.dtype)

        def run(hidden: Any, kernel: Any, labels: Any) -> Any:
            def loss(hidden: Any) -> Any:
                args = hidden, kernel, labels
                return train.linear_cross_entropy(*args, vocab_axis=1)[0]

            return jax.value_and_grad(loss)(hidden)

        arrays = [hidden, kernel, labels]
        return jax.make_jaxpr(run)(*arrays), arrays

    def step(self) -> Any:
        """The training step."""
        return train.make_train_step(self.loss_fn, self.tx, **self.options)


def work_of(
    source: Any,
    settings: Settings,
    batch: Any,
    tx: Any,
    loss_fn: Callable[..., Any] | None = None,
) -> Work:
    """Return the step of a model of `jlora.models`, or of a tree and its loss.

    Raises:
      OptionError: a model or a batch that is none.
      CheckpointError: a configuration that cannot be read.
    """
    if loss_fn is not None:
        name, params, shapes = "own parameters", as_shapes(source), as_shapes(batch)
        model = None
    else:
        model, name = model_of(source, settings)
        params = _parameters(model, settings)
        shapes = batch_of(model, batch)
        loss_fn = loss_of(model)
    count = sum(x.size for x in jax.tree.leaves(params))
    tree = _adapted(params, settings)
    options = {"accumulate": settings.accumulate, "clip_norm": settings.clip}
    state = train.TrainState.create(tree, tx)
    return Work(name, loss_fn, state, shapes, tx, options, count, model)


def as_shapes(tree: Tree) -> Tree:
    """Return a tree with shapes in the place of arrays."""
    return jax.tree.map(lambda x: Shape(jnp.shape(x), x.dtype), tree)


def model_of(source: Any, settings: Settings) -> tuple[Any, str]:
    """Return a model of `jlora.models`, and what to call it.

    Args:
      source: a folder, a `config.json`, what is in one, a configuration, or a model.
      settings: its form; a model has one already.
    """
    name = ""
    if isinstance(source, str | Path):
        name, source = _read(Path(source).expanduser())
    if isinstance(source, Mapping):
        family = family_of(source.get("model_type"), name or "the configuration")
        source = family.config.from_dict(source)
    if hasattr(source, "config") and hasattr(source, "init"):
        return source, type(source).__name__
    if not hasattr(source, "to_dict"):
        raise OptionError(
            f"a plan of {type(source).__name__}: expected a model's folder or "
            "config.json, a configuration or a model of jlora.models.\nFor parameters "
            "of your own pass loss_fn= as well, and the batch's shapes."
        )
    kind = source.to_dict()["model_type"]
    model = family_of(kind, "the configuration").model(
        config=source,
        dtype=jnp.dtype(settings.precision),
        param_dtype=jnp.float32,
        scan_layers=settings.scan_layers,
        remat=settings.remat,
        attn_implementation=settings.attn_implementation,
    )
    return model, name or type(model).__name__


def _read(place: Path) -> tuple[str, Mapping[str, Any]]:
    """Return what to call a configuration, and its keys."""
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise CheckpointError(
            f"{file} is not there.\nPass a model's folder or its config.json; of a "
            "model on the Hugging Face hub that file alone is enough."
        )
    found = place.name if place.is_dir() else place.stem
    return found if found != "config" else place.resolve().parent.name, read_json(file)


def _parameters(model: Any, settings: Settings) -> Tree:
    """The model's parameters as shapes, as `jlora.models.load` would have them."""
    kind = model.config.to_dict()["model_type"]
    params = family_of(kind, "the configuration").abstract_params(model)
    dtype = jnp.float32 if settings.full else jnp.dtype(settings.precision)
    return jax.tree.map(lambda x: Shape(x.shape, dtype), params)


def _adapted(params: Tree, settings: Settings) -> Tree:
    if settings.full:
        return jax.tree.map(jlora.Full, params)
    if settings.quantize:
        params = jlora.quantize(params, settings.quantize)
    named = settings.targets
    targets = named if isinstance(named, str | Mapping) else list(named)
    all_linear = targets in ("all-linear", ["all-linear"])
    more = dict(settings.lorafy)
    if all_linear and isinstance(params, Mapping) and "lm_head" in params:
        more.setdefault("exclude", ["lm_head"])  # as `jlora train` has it
    return jlora.lorafy(
        params,
        settings.rank,
        "all-linear" if all_linear else targets,
        dropout=settings.dropout,
        dora=settings.dora,
        **more,
    )


def loss_of(model: Any) -> Callable[..., Any]:
    """Return the loss that a model is trained by."""
    if isinstance(model, models.T5):
        return tasks.seq2seq_loss(model)
    if isinstance(model, models.BertClassifier):
        return tasks.classification_loss(model)
    capped = getattr(model.config, "logit_cap", None) is not None
    if isinstance(model, models.BertMaskedLM) or capped:
        return _logits_loss(model, is_causal=capped)
    if isinstance(model, models.Bert):
        raise OptionError(
            "a plan of an encoder without a head: there is no loss to train it by.\n"
            'Set "architectures" in config.json to a model with one, such as '
            '["BertForSequenceClassification"].'
        )
    return tasks.causal_loss(model)


def _logits_loss(model: Any, *, is_causal: bool) -> Callable[..., Any]:
    """The loss where the head is more than a product, so that logits are made."""

    def loss_fn(params: Tree, batch: Any, key: Any) -> Any:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model.apply({"params": params}, ids, mask)
        labels = batch["labels"]
        if is_causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return train.cross_entropy(logits, labels)

    return loss_fn


def head_sizes(model: Any) -> tuple[int, int]:
    """The width of the head's input, and the size of the vocabulary."""
    config = model.config
    names = ("hidden_size", "d_model", "n_embd")
    width = next(getattr(config, name) for name in names if hasattr(config, name))
    return int(width), int(config.vocab_size)


def batch_of(model: Any, sizes: Any) -> dict[str, Any]:
    """Return the shapes of a batch for a model.

    Args:
      model: of `jlora.models`.
      sizes: examples, tokens, and of an encoder-decoder perhaps tokens of an answer.
    """
    whole = isinstance(sizes, tuple | list) and all(isinstance(n, int) for n in sizes)
    most = 3 if isinstance(model, models.T5) else 2
    if not whole or not 2 <= len(sizes) <= most or min(sizes) < 1:
        raise OptionError(
            f"batch={sizes!r}: expected (examples, tokens)"
            + (", or (examples, tokens, tokens of the answer)." if most == 3 else ".")
        )
    size, length, *answer = sizes
    ids = Shape((size, length), jnp.int32)
    labels = Shape((size, (answer or [length])[0]), jnp.int32)
    if isinstance(model, models.BertClassifier):
        labels = Shape((size,), jnp.int32)
    return {"input_ids": ids, "attention_mask": ids, "labels": labels}
