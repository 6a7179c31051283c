"""Hugging Face folders to Flax models and parameters, without PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jlora._errors import CheckpointError, LoraError, OptionError
from jlora._files import check_local, read_json
from jlora._processes import put
from jlora._text import listed
from jlora.models._generate.settings import said_in_config
from jlora.models._hf import heads, reading
from jlora.models._hf.families import Family, family_of
from jlora.models._hf.quantised import (
    CONFIG,
    QuantisedWeights,
    Quantizer,
    check_quantizer,
)
from jlora.models._hf.replicated import Copies, Ranges, replicated
from jlora.models._hf.sources import Source, names, places
from jlora.models._hf.tables import check_untying
from jlora.models._hf.tensors import TensorFolder

Params = dict[str, Any]

GENERATION = "generation_config.json"
HEAD = "lm_head.weight"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def load(
    source: str | Path,
    dtype: Any = None,
    *,
    compute_dtype: Any = None,
    sharding: reading.Shardings = None,
    scan_layers: bool = False,
    remat: bool = False,
    attn_implementation: str = "einsum",
    head: str | None = None,
    num_labels: int | None = None,
    untie: bool = False,
    key: jax.Array | None = None,
    quantize: Quantizer | None = None,
    layer_replication: Ranges | None = None,
) -> tuple[Any, Params]:
    """Return the model and the parameters of a Hugging Face checkpoint.

    Leaves are read one by one into their dtype and sharding, each device's part alone;
    the host holds little more than one tensor besides.

    Args:
      source: a folder with `config.json` and safetensors, or a repository's name on
        the Hugging Face hub, which is downloaded or found in its cache.
      dtype: the parameters' dtype; `None` keeps the file's.
      compute_dtype: what the model computes in; `None` is bfloat16 where the
        parameters are, float32 otherwise (T5 overflows in float16).
      sharding: where the leaves lie. `None` is the default device; a
        `jax.sharding.Sharding` is for all of them; a function of a leaf's path
        (`"model/layers/0/mlp/up_proj/kernel"`) and shape answers with its sharding,
        or `None`; a tree of shardings in the structure of the parameters, or the
        beginning of one, says it leaf by leaf, as `jax.jit`'s `in_shardings`.
      scan_layers: whether the model scans its blocks: it is traced and compiled for
        one, however many there are. A block's number then leaves the paths, and leaves
        gain a leading axis of blocks, `model/layers/mlp/up_proj/kernel` `[L, i, o]`;
        T5's position bias, which the first block alone holds, stays at
        `block/0/layer/0/SelfAttention/...`. `jlora.stack_layers` and `unstack_layers`
        turn one form into the other.
      remat: whether the backward pass computes a block's activations again instead of
        keeping them.
      attn_implementation: how whole sequences attend. `"einsum"` forms the scores,
        `[B, H, T, S]` in float32, and serves every model; `"cudnn"` and `"xla"` are
        those of `jax.nn.dot_product_attention`, of which the first forms none.
      head: of BERT and RoBERTa, `"base"` (hidden states), `"classification"` or
        `"masked_lm"`, whatever head the checkpoint was saved with; `None` takes that
        one. What the head needs and the checkpoint lacks is newly initialised, and a
        warning lists it.
      num_labels: outputs of the classification head; `None` takes config.json's.
        Where the checkpoint's head has another number, its last layer is made anew.
      untie: whether a model whose head is its embedding gets a head of its own, which
        begins as a copy: adapters then change one and not the other. `models.untie`
        does it to a model that is loaded.
      key: for what is newly initialised; `None` is `jax.random.key(0)`.
      quantize: what makes of each kernel something else as soon as it is read,
        `jlora.quantizer("nf4")` say; `jlora.quantizer()` takes the codes of a
        checkpoint that bitsandbytes quantised. `jlora.lora` is for such parameters.
      layer_replication: ranges of the checkpoint's layers that are this model's, as in
        a PEFT adapter's config: `[[0, 4], [2, 5]]` is layers 0 to 3 and then 2 to 4,
        seven of five. Copies share their arrays, but in a model that scans its blocks.

    Returns:
      A Flax module, and its parameters for `model.apply({"params": params}, ...)`.

    Raises:
      CheckpointError: files missing or damaged, tensors that are missing, unknown or
        of another shape, or a configuration that no model here honours.
      ShapeError: a sharding that does not divide its leaf.
      OptionError: a `quantize` that does not fit the checkpoint; ranges of layers that
        it does not have, of a model with two stacks, or whose layers go by number.
      StructureError: shardings that are not those of the parameters, blocks that are
        not alike and shall be scanned, or an encoder that shall be untied.

    Warns:
      JloraWarning: keys of `config.json` that nothing reads, or a head made anew.
    """
    folder = _folder(source)
    raw = read_json(folder / "config.json")
    is_quantised = check_quantizer(quantize, raw)
    raw = {name: value for name, value in raw.items() if name != CONFIG or not value}
    family = family_of(raw.get("model_type"), str(folder / "config.json"))
    given_head = head is not None or num_labels is not None
    raw = heads.chosen(family, raw, head, num_labels)
    tensors = TensorFolder(folder)
    codes = QuantisedWeights(tensors, raw) if is_quantised else None
    with _of_a_file(family, folder):
        config = family.config.from_dict(raw)
    _check_depth(family, config, tensors)
    tensors.rename(family.names_here(config, tensors.names))
    _rename_aliases(tensors, family, config)
    config = family.config_of_file(config, raw, tensors.names, tensors.same)
    if hasattr(config, "generation"):
        file = folder / GENERATION
        said = read_json(file) if file.exists() else said_in_config(raw)
        config = dataclasses.replace(config, generation=said)
    if untie:
        config = _untied(tensors, family, config)
    if codes is not None and layer_replication is not None:
        raise OptionError(
            f"layer_replication={layer_replication!r}: layers of a checkpoint that is "
            "quantised cannot be repeated.\nTake its dense original, with "
            "quantize=jlora.quantizer('nf4')."
        )
    config, copies = replicated(tensors, family, config, layer_replication)
    form: dict[str, Any] = {"scan_layers": scan_layers, "remat": remat}
    form["attn_implementation"] = attn_implementation
    model = family.model(config=config, **form)
    with _of_a_file(family, folder):
        abstract = family.abstract_params(model)
    shardings = reading.shardings_of(sharding, abstract)
    new: dict[str, jax.Array] = {}
    if given_head:
        new = _new_leaves(tensors, family, model, abstract, key)
    plan = quantize.plan(abstract) if quantize is not None and codes is None else {}
    quantise = _Quantise(quantize, codes, plan)
    params, dtypes_read = _fill(
        tensors, family, config, abstract, dtype, shardings, new, quantise, copies
    )
    if new:
        heads.report(folder, {path: leaf.shape for path, leaf in new.items()})
    if compute_dtype is None:
        bf16 = all(x == jnp.bfloat16 for x in dtypes_read)
        compute_dtype = jnp.bfloat16 if bf16 else jnp.float32
    param_dtype = dtypes_read[0]
    dtypes = {"dtype": compute_dtype, "param_dtype": param_dtype}
    model = family.model(config=config, **dtypes, **form)
    return model, params


@contextlib.contextmanager
def _of_a_file(family: Family, folder: Path) -> Iterator[None]:
    """Read a configuration, or shapes by it, of a file that may say anything.

    Raises:
      CheckpointError: what it says is none.
    """
    try:
        yield
    except LoraError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        said = (str(e).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder / 'config.json'} makes no model of the family "
            f"{family.config.__name__.removesuffix('Config')}: {type(e).__name__}: "
            f"{said}.\nIt is damaged; copy or download it again."
        ) from e


def _check_depth(family: Family, config: Any, tensors: TensorFolder) -> None:
    """Refuse more layers than there are tensors, before a model is made of them."""
    layers = sum(family.stacks(config).values())
    if layers > len(tensors.names):
        raise CheckpointError(
            f"{tensors.folder / 'config.json'} says that there are {layers:,} layers, "
            f"and the files hold {len(tensors.names)} tensors.\nThey belong to "
            "different checkpoints."
        )


def sources_of(
    family: Family, config: Any, params: Mapping[str, Any], held: Collection[str] = ()
) -> dict[str, Source]:
    """Return where every leaf is found in a file, by its path joined with "/".

    `held` are the names in a file; where one is to be written there are none.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    keys = [tuple(str(entry.key) for entry in path) for path in paths]
    return {"/".join(key): family.source_of(key, config, held) for key in keys}


def _folder(source: str | Path) -> Path:
    """Return the folder itself, or the hub's snapshot of that name."""
    check_local(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    # A repository is called "name" or "owner/name"; anything else was meant as a path.
    if isinstance(source, Path) or name.count("/") > 1 or name[:1] in "./~\\":
        raise CheckpointError(f"{folder} is no folder; is the path right?")
    patterns = ["config.json", GENERATION, "*.safetensors"]
    patterns += ["*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of many libraries
        raise CheckpointError(
            f"{name!r} is no local folder, and the Hugging Face hub gave no "
            f"repository of that name: {error}\nCheck the name and the connection, or "
            "pass the path of a downloaded folder."
        ) from error


def _untied(tensors: TensorFolder, family: Family, config: Any) -> Any:
    """Return `config` with a head of its own, which is read from the embedding."""
    check_untying(family.model(config=config))
    if not config.tie_word_embeddings:
        return config
    (table,) = [t for a, t in family.aliases(config).items() if a == HEAD]
    tensors.repeat(table, HEAD)
    return dataclasses.replace(config, tie_word_embeddings=False)


def _rename_aliases(tensors: TensorFolder, family: Family, config: Any) -> None:
    """Call a shared tensor by its first name where a file holds another one alone."""
    for alias, name in family.aliases(config).items():
        alone = alias in tensors.names and name not in tensors.names
        if alone and family.stands_alone(config, alias):
            tensors.rename({alias: name})


def _new_leaves(
    tensors: TensorFolder, family: Family, model: Any, abstract: Params, key: Any
) -> dict[str, jax.Array]:
    """Return what the chosen head needs and `tensors` lack, newly initialised.

    What `tensors` hold of another head is hidden.
    """
    sources = sources_of(family, model.config, abstract, tensors.names)
    wanted = {name for source in sources.values() for name in names(source)}
    wanted |= family.aliases(model.config).keys()
    heads.hide_others(tensors, family, wanted)
    leaves = jax.tree.leaves(abstract)
    shapes = {path: leaf.shape for path, leaf in zip(sources, leaves, strict=True)}
    absent = heads.absent(tensors, family, sources, shapes)
    return heads.initial(family, model, absent, key) if absent else {}


@dataclasses.dataclass(frozen=True)
class _Quantise:
    """How leaves are quantised.

    Attributes:
      by: what was asked for, if anything.
      codes: the weights that the file holds quantised, if any.
      plan: what to do with leaves that it holds dense.
    """

    by: Quantizer | None
    codes: QuantisedWeights | None
    plan: Mapping[str, Callable[[jax.Array], Any]]


def _fill(
    tensors: TensorFolder,
    family: Family,
    config: Any,
    abstract: Params,
    dtype: Any,
    shardings: list[Sharding | None],
    new: Mapping[str, jax.Array],
    quantise: _Quantise,
    copies: Copies,
) -> tuple[Params, list[Any]]:
    """Return `abstract` with every leaf taken from `new` or read from `tensors`.

    Nothing is left over. With it go the leaves' dtypes, those of quantised ones dense.
    """
    sources = sources_of(family, config, abstract, tensors.names)
    read = {path: source for path, source in sources.items() if path not in new}
    _check_names(tensors, family, config, sources, read)
    leaves, treedef = jax.tree.flatten(abstract)
    shapes = {path: leaf.shape for path, leaf in zip(sources, leaves, strict=True)}
    held = quantise.codes
    coded = {
        path: held.dtype(source)
        for path, source in read.items()
        if held is not None and held.holds(source)
    }
    for path, source in read.items():
        if path not in coded:
            _check_shapes(tensors, path, source, shapes[path])
    dtypes = {
        path: jax.dtypes.canonicalize_dtype(
            dtype or coded.get(path) or _dtype_of(tensors, source)
        )
        for path, source in read.items()
    }
    like = next(iter(dtypes.values()))
    filled: list[Any] = []
    first: dict[Any, Any] = {}  # of leaves that are copies of one
    for path, sharding in zip(sources, shardings, strict=True):
        same = copies.original(path), sharding, path in quantise.plan
        if path not in new and same in first:
            filled.append(first[same])
            continue
        if path in new:
            leaf = new[path].astype(like)
            leaf = leaf if sharding is None else put(leaf, sharding)
        elif held is not None and path in coded and quantise.by is not None:
            codes = held.read(path, read[path], shapes[path])
            codes = dataclasses.replace(codes, dtype=str(dtypes[path]))
            leaf = quantise.by.from_codes(path, codes, sharding)
        else:
            leaf = reading.read(
                tensors, read[path], shapes[path], dtypes[path], sharding
            )
        if path in quantise.plan:
            leaf = jax.block_until_ready(quantise.plan[path](leaf))
        filled.append(first.setdefault(same, leaf))
    return jax.tree.unflatten(treedef, filled), list(dtypes.values())


def _dtype_of(tensors: TensorFolder, source: Source) -> Any:
    """Return the dtype that loses nothing of a leaf's tensors."""
    return reduce(jnp.promote_types, [tensors.dtype(name) for name in names(source)])


def _check_names(
    tensors: TensorFolder,
    family: Family,
    config: Any,
    sources: Mapping[str, Source],
    read: Mapping[str, Source],
) -> None:
    wanted = {name for source in sources.values() for name in names(source)}
    aliases = family.aliases(config)
    missing = {name for source in read.values() for name in names(source)}
    missing -= tensors.names
    unknown = tensors.names - wanted - set(aliases)
    unknown = {name for name in unknown if not family.ignores(name)}
    if missing or unknown:
        lines = [f"{tensors.folder} does not fit the model in its config.json."]
        if missing:
            lines += [f"{len(missing)} tensors are missing:\n  {listed(missing)}"]
        if unknown:
            lines += [f"{len(unknown)} tensors have no place:\n  {listed(unknown)}"]
        lines += ["Check that weights and config.json are of the same model."]
        raise CheckpointError("\n".join(lines))
    for alias, name in aliases.items():
        if alias in tensors.names - wanted and not tensors.same(alias, name):
            raise CheckpointError(
                f"{tensors.where(alias)}: {alias} must equal {name}, and does not.\n"
                "The model holds one tensor for both; the checkpoint is of another."
            )


def _check_shapes(
    tensors: TensorFolder, path: str, source: Source, shape: tuple[int, ...]
) -> None:
    for place in places(source, shape):
        name = place.tensor.name
        held = tensors.shape(name)
        if held != place.shape:
            raise CheckpointError(
                f"{tensors.where(name)}: {name} is {list(held)}, but by config.json it "
                f"is {list(place.shape)} ({path} {list(shape)}).\n"
                "Check that weights and config.json are of the same model."
            )
