"""What training scripts have in common on their command lines, and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora import _compat, data, models, optim, train
from jlora._errors import OptionError
from jlora.tasks._devices import DeviceOptions
from jlora.train import option

Tree = Any
Batch = Mapping[str, Any]


class Loaded(NamedTuple):
    """A model, its parameters and its tokenizer."""

    model: Any
    params: Tree
    tokenizer: Any


def refuse(faults: Mapping[str, Any]) -> None:
    """Raise `OptionError` with the first sentence whose condition is true."""
    for said, is_wrong in faults.items():
        if is_wrong:
            raise OptionError(f"{said}.\nSee --help.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(train.RunSettings):
    """Which adapters a run puts on its model, or that it trains every weight."""

    # fmt: off
    rank: int | None = option(None, "the rank r (8)", least=1, group="adapter")
    alpha: float | None = option(None, "the scale is alpha/r (2r)", above=0)
    targets: list[str] | None = option(
        None, "names of layers, or all-linear (query value)")
    dropout: float = option(
        0.0, "rate of dropout on the adapters' inputs (0)", least=0, below=1)
    init: str | None = option(
        None, "how A and B start (default: A random, B zero)",
        choices=("default", "gaussian", "orthogonal", "pissa", "olora"))
    rslora: bool = option(False, "the scale is alpha/sqrt(r)")
    dora: bool = option(False, "DoRA: train each output column's length, too")
    quantize: str | None = option(
        None, "keep the frozen base in 8 or 4 bits (QLoRA)",
        choices=("int8", "nf4", "fp4", "fp8"))
    full: bool = option(False, "train every weight instead, for comparison")
    # fmt: on

    def check(self) -> None:
        """Refuse an adapter's options beside `--full`."""
        super().check()
        own = [self.rank, self.alpha, self.targets, self.init]
        is_adapted = any(x is not None for x in own)
        is_adapted |= bool(self.dropout or self.rslora or self.dora)
        refuse({
            "--full trains every weight: --rank, --alpha, --targets, --dropout, "
            "--init, --rslora and --dora are an adapter's": self.full and is_adapted,
            "--full trains every weight, and --quantize freezes them": (
                self.full and self.quantize
            ),
        })  # fmt: skip

    @property
    def what_is_trained(self) -> str:
        """A line for the report."""
        if self.full:
            return "every weight"
        names = " ".join(self.targets or ["query", "value"])
        kind = "DoRA" if self.dora else "adapters"
        base = f", on a base in {self.quantize}" if self.quantize else ""
        return f"{kind} of rank {self.rank or 8} on {names}{base}"

    def adapt(
        self, params: Tree, key: jax.Array | None = None, whole: Sequence[str] = ()
    ) -> Tree:
        """Put adapters on the targets; with `full` every weight is trained instead.

        Args:
          params: the model's parameters.
          key: for the factors A.
          whole: names of what is trained as it is, a new head say.
        """
        if self.full:
            return jax.tree.map(jlora.Full, params)
        rank, targets = self.rank or 8, self.targets or ["query", "value"]
        all_linear = targets == ["all-linear"]
        return jlora.lorafy(
            params,
            rank,
            "all-linear" if all_linear else targets,
            alpha=self.alpha or 2 * rank,
            key=key,
            train=whole,
            # As PEFT has it, "all linear layers" leaves the head out, where it is its
            # own, and what is trained as it is.
            exclude=[x for x in ("lm_head", *whole) if all_linear and x in params],
            dropout=self.dropout,
            init=self.init or "default",
            rslora=self.rslora,
            dora=self.dora,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(DeviceOptions):
    """How a run trains: batches, steps, the optimiser, precision, validation."""

    # fmt: off
    batch_size: int = option(32, "examples per step (32)", least=1, group="training")
    accumulate: int = option(1, "parts that a batch is cut into (1)", least=1)
    epochs: float | None = option(
        None, "passes over the training examples (3)", above=0, extends=True,
        replaces="steps")
    steps: int | None = option(
        None, "steps, instead of --epochs", least=1, extends=True, replaces="epochs")
    lr: float | None = option(None, "peak rate (3e-3; 1e-3 with --full)", above=0)
    lr_ratio: float = option(
        1.0, "LoRA+: how many times A's rate B's is (1)", above=0)
    schedule: str = option(
        "cosine", "how the rate falls to 0 (cosine)",
        choices=("cosine", "linear", "constant"))
    warmup: int = option(20, "steps in which the rate rises (20)", least=0)
    warmup_ratio: float | None = option(
        None, "the fraction of the steps in which the rate rises", least=0, below=1,
        replaces="warmup")
    weight_decay: float = option(0.0, "AdamW's (0)", least=0)
    clip: float = option(1.0, "the largest norm of the gradient; 0 is off (1)", least=0)
    precision: str = option(
        "float32", "what the model computes in; adapters stay float32 (float32)",
        choices=("float32", "bfloat16"))
    buckets: int = option(
        3, "shapes of batches; with more, less is padded (3)", least=1)
    seed: int = option(0, "of adapters, data order and dropout (0)", least=0)
    eval_every: int | None = option(
        None, "steps between validations (a tenth of the run, or an epoch)", least=1,
        group="evaluation")
    eval_batch_size: int = option(64, "examples per batch (64)", least=1)
    # fmt: on

    def check(self) -> None:
        """Refuse a batch that does not fall into equal parts."""
        super().check()
        refuse({
            f"--batch-size {self.batch_size} does not fall into --accumulate "
            f"{self.accumulate} equal parts": self.batch_size % self.accumulate,
        })  # fmt: skip

    @property
    def products(self) -> str:
        """What the model's products round to, in words.

        A GPU rounds the factors of float32 products to TF32, if nobody tells JAX
        otherwise.
        """
        told = _compat.default_precision() in (None, "default", "tensorfloat32")
        if self.precision == "float32" and told and jax.default_backend() == "gpu":
            return "float32 with products in TF32"
        return self.precision

    @property
    def key(self) -> jax.Array:
        """The run's PRNG key."""
        return jax.random.key(self.seed)

    def load(self, source: str | Path, **options: Any) -> Loaded:
        """Load a model in the run's precision, and its tokenizer.

        Args:
          source: a folder or a name on the hub.
          **options: those of `jlora.models.load`.
        """
        precision = jnp.dtype(self.precision)
        # Whole kernels are trained in float32, whatever the model computes in.
        dtype = jnp.float32 if getattr(self, "full", False) else precision
        if form := getattr(self, "quantize", None):
            options["quantize"] = jlora.quantizer(form)
        if (mesh := self.device_mesh) is not None:
            options["sharding"] = self.rules.on(mesh)
        model, params = models.load(source, dtype, compute_dtype=precision, **options)
        return Loaded(model, params, data.load_tokenizer(source))

    def number_of_steps(self, epoch: int) -> int:
        """Return how many steps to make where an epoch has `epoch` batches."""
        return self.steps or max(1, round((self.epochs or 3.0) * epoch))

    @property
    def peak(self) -> float:
        """The largest learning rate."""
        return self.lr or (1e-3 if getattr(self, "full", False) else 3e-3)

    def warmup_steps(self, steps: int) -> int:
        """Return in how many of all steps the rate rises."""
        if self.warmup_ratio is None:
            return self.warmup
        return round(self.warmup_ratio * steps)

    def optimizer(
        self, steps: int
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Return AdamW, and its rate over so many steps."""
        rate = train.warmup_schedule(
            self.peak,
            steps,
            warmup=self.warmup_steps(steps),
            decay=self.schedule,  # type: ignore[arg-type]
        )
        return self.adamw(rate, self.weight_decay), rate

    def adamw(
        self, rate: optax.ScalarOrSchedule, weight_decay: Any
    ) -> optax.GradientTransformation:
        """Return AdamW of a rate, and with `lr_ratio` LoRA+ after it."""
        tx = optax.adamw(rate, weight_decay=weight_decay)
        if self.lr_ratio == 1:
            return tx
        return optax.chain(tx, optim.lora_plus(self.lr_ratio))

    def fit(
        self,
        loss_fn: Callable[..., Any],
        tree: Tree,
        batches: data.Batches | data.Streaming,
        folder: train.RunFolder,
        valid: Iterable[Batch] | None = None,
        **options: Any,
    ) -> train.Fit:
        """Train: `jlora.train.fit` with these options.

        Args:
          loss_fn: `(params, batch, key)`, for plain parameters.
          tree: a lorafied tree.
          batches: the training batches; of several processes each takes its part.
          folder: of the run.
          valid: validation batches, of which each takes its part too.
          **options: more of `jlora.train.fit`'s, `base` say: the parameters as they
            were before an `init` that shifts them.
        """
        epoch = len(batches) if isinstance(batches, data.Batches) else 0
        steps = self.number_of_steps(epoch)
        tx, rate = self.optimizer(steps)
        return train.fit(
            loss_fn,
            tree,
            tx,
            self.part(batches),
            folder,
            **{
                "steps": steps,
                "valid": self.part(valid),
                "eval_every": self.eval_every,
                "key": self.key,
                "learning_rate": rate,
                "count": count_tokens,
                "accumulate": self.accumulate,
                "clip_norm": self.clip or None,
                "mesh": self.device_mesh,
                **options,
            },
        )


def count_tokens(batch: Batch) -> int:
    """Return the tokens of a batch's inputs, without padding."""
    return int(batch["attention_mask"].sum())


def count_both_sides(batch: Batch) -> int:
    """Return the tokens of a batch's inputs and labels, without padding."""
    return count_tokens(batch) + int((batch["labels"] >= 0).sum())
