"""The model families that `load` and `save` know, one row of a table each."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jlora._errors import CheckpointError
from jlora.models._hf.sources import Joined, Source, Stacked, Tensor
from jlora.models.bert import _files
from jlora.models.bert._config import NAMES, BertConfig, with_head
from jlora.models.bert._model import with_its_head
from jlora.models.gpt2._config import GPT2Config
from jlora.models.gpt2._model import GPT2
from jlora.models.llama._config import LlamaConfig
from jlora.models.llama._gemma_config import GemmaConfig
from jlora.models.llama._model import Llama
from jlora.models.llama._moe_config import MoeConfig
from jlora.models.t5._config import KINDS as T5_KINDS
from jlora.models.t5._config import T5Config
from jlora.models.t5._model import T5

Path = tuple[str, ...]
Names = Collection[str]
Same = Callable[[str, str], bool]  # whether two tensors are equal


class Config(Protocol):
    """What every family's configuration can do."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """Return the configuration in a parsed `config.json`."""

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is built, and how its checkpoints spell it.

    Attributes:
      config: the configuration class.
      model: makes a Flax module; takes the fields of `_blocks.Configured`.
      init_args: what `model.init` takes after the key, at the smallest shapes.
      source: where the leaf at a path is found in a file; it gets the path, the
        configuration and the file's names, which are none where one is written.
      stacks: the paths of a model's blocks and their numbers, for a model that scans
        them.
      aliases: names that files may hold besides, and the tensor each must equal.
      stands_alone: whether a file that lacks the tensor may hold it by that alias.
      unused: names that files may hold although the model never reads them; `*`
        stands for anything.
      config_of_file: corrects a configuration by what the file holds; it gets the
        configuration, the parsed `config.json`, the file's names, and what tells
        whether two tensors are equal.
      names_here: what the names in a file are called here, where that differs from file
        to file; `None` for those never read.
      with_head: changes a parsed `config.json` to another head and number of labels;
        `None` where there is no choice.
      is_head: whether a path leads to what another head may lack or leave.
    """

    config: type[Config]
    model: Callable[..., Any]
    init_args: tuple[Any, ...]
    source: Callable[[Path, Any, Names], Source]
    stacks: Callable[[Any], Mapping[Path, int]]
    aliases: Callable[[Any], Mapping[str, str]] = lambda config: {}
    stands_alone: Callable[[Any, str], bool] = lambda config, alias: True
    unused: frozenset[str] = frozenset()
    config_of_file: Callable[[Any, Mapping[str, Any], set[str], Same], Any] = (
        lambda config, raw, names, same: config
    )
    names_here: Callable[[Any, set[str]], Mapping[str, str | None]] = (
        lambda config, names: {}
    )
    with_head: Callable[..., dict[str, Any]] | None = None
    is_head: Callable[[Path], bool] = lambda path: False

    def abstract_params(self, model: Any) -> dict[str, Any]:
        """Return the parameter tree as shapes and dtypes; nothing is computed."""
        variables = jax.eval_shape(model.init, jax.random.key(0), *self.init_args)
        return variables["params"]

    def source_of(self, path: Path, config: Any, held: Names) -> Source:
        """Return where a leaf is found, be it of one block or of all, stacked."""
        for stack, length in self.stacks(config).items():
            inner = path[len(stack) :]
            if path[: len(stack)] == stack and not inner[0].isdigit():
                return Stacked(
                    tuple(
                        self.source((*stack, str(i), *inner), config, held)
                        for i in range(length)
                    )
                )
        return self.source(path, config, held)

    def ignores(self, name: str) -> bool:
        """Return whether a file may hold `name` although no leaf is read from it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.unused)


def dotted(path: Path, config: Any = None, held: Names = ()) -> Tensor:
    """Return the tensor where the tree's path is its name, up to the last word.

    >>> dotted(("encoder", "block", "0", "q", "kernel"))
    Tensor(name='encoder.block.0.q.weight', transposed=True)
    """
    *parents, last = path
    last_in_file = {"kernel": "weight", "embedding": "weight"}.get(last, last)
    return Tensor(".".join([*parents, last_in_file]), last == "kernel")


def _with_prefix(prefix: str) -> Callable[[Any, set[str]], Mapping[str, str | None]]:
    """Return a names_here for files that were saved from the model without its head.

    >>> names_here = _with_prefix("transformer.")
    >>> names_here(None, {"wte.weight"})
    {'wte.weight': 'transformer.wte.weight'}
    >>> names_here(None, {"transformer.wte.weight", "lm_head.weight"})
    {}
    """

    def names_here(config: Any, names: set[str]) -> dict[str, str | None]:
        if any(name.startswith(prefix) for name in names):
            return {}
        return {n: prefix + n for n in names if not n.startswith("lm_head.")}

    return names_here


def _gpt2_source(path: Path, config: GPT2Config, held: Names) -> Tensor:
    """Return a GPT-2's tensor: its kernels are stored as [in, out]."""
    tensor = dotted(path)
    return Tensor(tensor.name, tensor.transposed and path[0] == "lm_head")


def _gpt2_aliases(config: GPT2Config) -> dict[str, str]:
    return _tied_head(config, "transformer.wte.weight")


# What files call an expert's gate, up and down projections, and their block.
_MIXTRAL = ("block_sparse_moe", "w1", "w3", "w2")
_QWEN_MOE = ("mlp", "gate_proj", "up_proj", "down_proj")


def _moe_source(path: Path, config: MoeConfig, held: Names) -> Source:
    """Return the tensors of single experts, or the one tensor of all that is held."""
    mixtral = config.model_type == "mixtral"
    block, gate, up, down = _MIXTRAL if mixtral else _QWEN_MOE
    path = tuple(block if part == "mlp" else part for part in path)
    if "experts" not in path:
        return dotted(path)
    whole = Tensor(".".join(path), transposed=True)
    if whole.name in held:
        return whole
    *parents, last = path
    names = [gate, up] if last == "gate_up_proj" else [down]
    experts = []
    for i in range(config.num_experts):
        start = ".".join([*parents, str(i)])
        parts = tuple(Tensor(f"{start}.{n}.weight", transposed=True) for n in names)
        experts.append(Joined(parts, axis=-1) if parts[1:] else parts[0])
    return Stacked(tuple(experts))


def _moe_names_here(config: MoeConfig, names: set[str]) -> dict[str, str | None]:
    """Return Mixtral's names, whose block is "mlp" in files of all experts' tensors."""
    names_here = dict(_with_prefix("model.")(config, names))
    if config.model_type == "mixtral":
        for name in names:
            full = names_here.get(name, name) or name
            names_here[name] = full.replace(".mlp.", f".{_MIXTRAL[0]}.")
    return names_here


def _llama_aliases(config: LlamaConfig) -> dict[str, str]:
    return _tied_head(config, "model.embed_tokens.weight")


def _tied_head(config: Any, embedding: str) -> dict[str, str]:
    return {"lm_head.weight": embedding} if config.tie_word_embeddings else {}


def _t5_aliases(config: T5Config) -> dict[str, str]:
    embeddings = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    head = ["lm_head.weight"] if config.tie_word_embeddings else []
    return dict.fromkeys(embeddings + head, "shared.weight")


def _t5_stands_alone(config: T5Config, alias: str) -> bool:
    """Whether a name of the embedding is enough, and a head's no head of its own.

    A head whose input is not scaled was untied when it was trained, whatever later
    releases of `transformers` wrote of it.
    """
    return alias != "lm_head.weight" or bool(config.scale_decoder_outputs)


def _t5_config_of_file(
    config: T5Config, raw: Mapping[str, Any], names: set[str], same: Same
) -> T5Config:
    """Untie the head where the file holds another one than the embedding.

    Since release 5 `transformers` writes `tie_word_embeddings: true` for every T5 and
    tells by the tensors; `scale_decoder_outputs` marks such a file. Of an mT5 it heeds
    the tensors alone.
    """
    held = {"lm_head.weight", "shared.weight"} <= names
    if config.model_type == "mt5" and "lm_head.weight" not in names:
        return dataclasses.replace(config, tie_word_embeddings=True)
    if not config.tie_word_embeddings or not held:
        return config
    if same("lm_head.weight", "shared.weight"):
        return config
    if config.model_type == "t5" and raw.get("scale_decoder_outputs") is None:
        raise CheckpointError(
            "config.json ties the head to the embedding, but lm_head.weight differs "
            "from shared.weight.\nIf the head is its own, set "
            '"tie_word_embeddings": false and say in "scale_decoder_outputs" whether '
            "its input is scaled; if it is tied, remove lm_head.weight."
        )
    return dataclasses.replace(config, tie_word_embeddings=False)


_IDS = jax.ShapeDtypeStruct((1, 1), jnp.int32)

_ENCODER = Family(
    config=BertConfig,
    model=with_its_head,
    init_args=(_IDS,),
    source=dotted,
    stacks=_files.stacks,
    aliases=_files.aliases,
    config_of_file=_files.config_of_file,
    names_here=_files.names_here,
    with_head=with_head,
    is_head=_files.is_head,
)

_T5 = Family(
    config=T5Config,
    model=T5,
    init_args=(_IDS, None, _IDS),
    source=dotted,
    stacks=lambda config: {
        ("encoder", "block"): config.num_layers,
        ("decoder", "block"): config.num_decoder_layers,
    },
    aliases=_t5_aliases,
    stands_alone=_t5_stands_alone,
    # The first release's files hold it; cross-attention has no positions.
    unused=frozenset(
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
    ),
    config_of_file=_t5_config_of_file,
)

_LLAMA = Family(
    config=LlamaConfig,
    model=Llama,
    init_args=(_IDS,),
    source=dotted,
    stacks=lambda config: {("model", "layers"): config.num_hidden_layers},
    aliases=_llama_aliases,
    # Constants, which older releases saved.
    unused=frozenset({"model.layers.*.self_attn.rotary_emb.inv_freq"}),
    names_here=_with_prefix("model."),
)
_MOE = dataclasses.replace(
    _LLAMA, config=MoeConfig, source=_moe_source, names_here=_moe_names_here
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(NAMES, _ENCODER),
    "gpt2": Family(
        config=GPT2Config,
        model=GPT2,
        init_args=(_IDS,),
        source=_gpt2_source,
        stacks=lambda config: {("transformer", "h"): config.n_layer},
        aliases=_gpt2_aliases,
        # The causal mask, which older releases saved.
        unused=frozenset(
            {"transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"}
        ),
        names_here=_with_prefix("transformer."),
    ),
    **dict.fromkeys(T5_KINDS, _T5),
    **dict.fromkeys(LlamaConfig.kinds, _LLAMA),
    **dict.fromkeys(GemmaConfig.kinds, dataclasses.replace(_LLAMA, config=GemmaConfig)),
    **dict.fromkeys(MoeConfig.kinds, _MOE),
}


def family_of(model_type: Any, where: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
      CheckpointError: no family of that name; `where` names the file that asked.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, which jlora.models does not "
            f"define.\nKnown are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
