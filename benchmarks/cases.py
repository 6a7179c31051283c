"""What is measured: a model of [cases.toml](cases.toml), a batch, adapters.

No framework is imported here: workers of JAX and of PyTorch build the same model from
the same `config.json` keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import tomllib
from typing import Any

import numpy as np

KNOWN = tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text())
SHAPES, MODELS, FAMILIES = (KNOWN[name] for name in ("shapes", "models", "families"))


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure. All fields are JSON; `None` is what the shape has.

    Attributes:
      shape: its name in `SHAPES`.
      rank: of the adapters; alpha is twice as much.
      targets: names of layers, or `"all-linear"`, which leaves the head out as PEFT
        does.
      batch, source, target, dtype, depth, vocab_size: other sizes than the shape's.
        `dtype` is that of base and computation; adapters are float32.
      scan_layers, remat, attn_implementation: fields of our Flax modules; peers have
        none.
      quick: whether all sizes are tiny.
    """

    shape: str
    rank: int = 8
    targets: str | None = None
    batch: int | None = None
    source: int | None = None
    target: int | None = None
    dtype: str | None = None
    depth: int | None = None
    vocab_size: int | None = None
    scan_layers: bool = False
    remat: bool = False
    attn_implementation: str = "einsum"
    quick: bool = False

    def __post_init__(self) -> None:
        known = {"dtype": "float32", "target": 0, **SHAPES[self.shape]}
        known["targets"] = self.family["targets"]
        if self.quick:
            known |= {"batch": 2, "source": 8, "target": 7 if known["target"] else 0}
            object.__setattr__(self, "rank", min(self.rank, 4))
        for name in ("batch", "source", "target", "dtype", "targets"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, known[name])

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return MODELS[SHAPES[self.shape]["model"]]["model_type"]

    @property
    def family(self) -> dict[str, Any]:
        """What its architecture differs in."""
        return FAMILIES[self.model_type]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The keys of `config.json`."""
        config = {**MODELS[SHAPES[self.shape]["model"]]}
        if self.quick:
            config |= self.family["tiny"]
        if self.depth:
            config |= dict.fromkeys(self.family["depth"], self.depth)
        return config | ({"vocab_size": self.vocab_size} if self.vocab_size else {})

    @property
    def names(self) -> list[str] | str:
        """The targets as `jlora.lorafy` takes them."""
        return self.targets if self.targets == "all-linear" else self.targets.split()

    @property
    def model_fields(self) -> dict[str, Any]:
        """The fields of our Flax modules that are not left at their defaults."""
        names = ("scan_layers", "remat", "attn_implementation")
        fields = {name: getattr(self, name) for name in names}
        return {n: x for n, x in fields.items() if x and x != "einsum"}

    @property
    def title(self) -> str:
        """What it is called in tables."""
        lengths = f"{self.source}/{self.target}" if self.target else f"{self.source}"
        model = f"{SHAPES[self.shape]['model']} {self.batch}x{lengths}"
        depth = {"depth": self.depth} if self.depth else {}
        fields = {**depth, **self.model_fields}.items()
        words = [name if x is True else f"{name} {x}" for name, x in fields]
        return ", ".join([model, self.dtype, f"r{self.rank}", self.targets, *words])

    @property
    def json(self) -> dict[str, Any]:
        """Its fields: arguments that make it again in a worker."""
        return dataclasses.asdict(self)

    def arrays(self) -> dict[str, np.ndarray]:
        """A batch of random tokens, the same in every framework."""
        rng, vocabulary = np.random.default_rng(0), self.config["vocab_size"]
        ids = rng.integers(2, vocabulary, (self.batch, self.source), np.int32)
        labels = np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
        if self.target:
            labels = rng.integers(2, vocabulary, (self.batch, self.target), np.int32)
        return {"input_ids": ids, "labels": labels}


def cases(options: Any, *defaults: Case) -> list[Case]:
    """Return what the command line asks for: the defaults, or every combination.

    Where `--rank` or `--targets` stand without `--shape`, they go for each shape of
    the defaults.
    """
    grid: Any = [(one.shape, one.rank, one.targets) for one in defaults]
    if options.shape or options.rank or options.targets:
        shapes = options.shape or dict.fromkeys(one.shape for one in defaults)
        targets = [" ".join(names) for names in options.targets or []] or [None]
        grid = itertools.product(shapes, options.rank or [8], targets)
    return [Case(*chosen, **sizes(options, chosen[0])) for chosen in grid]


def sizes(options: Any, shape: str) -> dict[str, Any]:
    """Return a case's other fields, as the command line has them.

    On a GPU attention is cuDNN's where nothing else is said, as PyTorch's peers have
    a fused one there.
    """
    narrow = (options.dtype or SHAPES[shape].get("dtype", "float32")) != "float32"
    fused = "cudnn" if options.gpu and not options.dry and narrow else "einsum"
    names = ("batch", "source", "target", "dtype", "depth", "scan_layers", "remat",
             "quick")  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    return given | {"attn_implementation": options.attn_implementation or fused}
