"""What a command is to work with: a model, an adapter with its base, or a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jlora._errors import CheckpointError, LoraError
from jlora._files import read_json
from jlora.cli._inspect import kind_of
from jlora.cli._inspect._model import MISREAD

Tree = Any
SETTINGS = "settings.json"  # of a run


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
      model: a folder, or a name on the hub.
      adapter: the folder of what is put on it; None is nothing.
      name: the adapter's, of a PEFT folder that holds several.
      settings: of the run that it is of; empty without one.
    """

    model: str
    adapter: Path | None = None
    name: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What the run's model reads before each text."""
        if self.settings.get("prompt") is not None:
            return str(self.settings["prompt"])
        if direction := self.settings.get("direction"):
            from jlora import data

            return data.direction(direction).prompt
        return ""


class Loaded(NamedTuple):
    """A model of `jlora.models`, and its parameters, with the adapter on them."""

    model: Any
    params: Tree


def find(
    place: str,
    *,
    base: str | None = None,
    adapter: Path | None = None,
    name: str | None = None,
    merged: bool = True,
) -> Source:
    """Say what a folder or a name on the hub stands for.

    Args:
      place: of a model, an adapter (PEFT's, or a checkpoint of jlora) or a run.
      base: the model that the adapter belongs to, where it does not say so.
      adapter: one to put on a model.
      name: of a PEFT folder's several adapters.
      merged: take the merged model that a run has left, rather than its adapter.

    Raises:
      CheckpointError: nothing of the kind is there, or the base is not known.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if folder.exists() or place.startswith((".", "/", "~")):
            kind_of(folder)  # says what is wrong
        return _with(Source(place), adapter, name)
    if (folder / SETTINGS).is_file():
        return _run(folder, base, adapter, merged)
    if kind_of(folder) == "model":
        return _with(Source(str(folder)), adapter, name)
    if adapter is not None:
        raise CheckpointError(
            f"{place!r} is an adapter already.\nPass the model in its place, or leave "
            "--adapter out."
        )
    return Source(_base_of(folder, base, name), folder, name)


def _with(source: Source, adapter: Path | None, name: str | None) -> Source:
    if adapter is not None and kind_of(adapter) == "model":
        raise CheckpointError(f"--adapter: {str(adapter)!r} is a model, no adapter.")
    return dataclasses.replace(source, adapter=adapter, name=name)


def _run(folder: Path, base: str | None, adapter: Path | None, merged: bool) -> Source:
    settings = dict(read_json(folder / SETTINGS))
    own = folder / "merged"
    if adapter is not None:
        raise CheckpointError(f"{str(folder)!r} is a run, with an adapter of its own.")
    if merged and base is None and own.is_dir():
        return Source(str(own), settings=settings)
    if not (folder / "adapter").is_dir():
        raise CheckpointError(
            f"the run in {str(folder)!r} has saved no adapter yet.\nLet it go on until "
            "it has validated."
        )
    base = base or settings.get("model")
    if base is None:
        raise CheckpointError(
            f"the run in {str(folder)!r} does not say what model it trained.\nPass it: "
            "--base DIR."
        )
    return Source(base, folder / "adapter", settings=settings)


def _base_of(folder: Path, base: str | None, name: str | None) -> str:
    """The model that an adapter says it was trained on."""
    if base is None and kind_of(folder) == "peft":
        from jlora import peft

        base = peft.read_config(folder, adapter=name).get("base_model_name_or_path")
    elif base is None:
        from jlora import checkpoint

        base = checkpoint.load_metadata(folder).get("base")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{str(folder)!r} does not say what it was trained on.\nPass the model: "
            "--base DIR, or --base with its name on the Hugging Face hub."
        )
    return base


def load_model(source: str, **options: Any) -> Loaded:
    """Load a model; codes of bitsandbytes are taken as they are.

    Args:
      source: a folder, or a name on the hub.
      **options: of `jlora.models.load`.

    Raises:
      CheckpointError: it cannot be loaded.
    """
    import jlora
    from jlora import models

    config = Path(source).expanduser() / "config.json"
    if config.is_file() and read_json(config).get("quantization_config"):
        options.setdefault("quantize", jlora.quantizer())
    try:
        return Loaded(*models.load(source, **options))
    except LoraError:
        raise
    except MISREAD as error:
        raise CheckpointError(
            f"the model {source!r} cannot be made from its config.json, which holds a "
            f"value of the wrong type: {error}.\nCopy or download it again."
        ) from error


def load(source: Source, *, check: Any = "values", **options: Any) -> Loaded:
    """Load a model, and put its adapter on.

    Args:
      source: from `find`.
      check: how a checkpoint's base is compared, as `checkpoint.load_adapter` takes it.
      **options: of `jlora.models.load`.

    Raises:
      CheckpointError: either cannot be loaded, or they do not belong together.
    """
    model, params = load_model(source.model, **options)
    if source.adapter is None:
        return Loaded(model, params)
    if kind_of(source.adapter) == "peft":
        from jlora import peft

        naming = naming_of(model)
        tree = peft.load(source.adapter, params, model=naming, adapter=source.name)
        return Loaded(model, tree)
    from jlora import checkpoint

    return Loaded(model, checkpoint.load_adapter(source.adapter, params, check=check))


def naming_of(model: Any) -> Any:
    """The model if it tells its modules' names in PyTorch, else the paths are those."""
    return model if hasattr(model, "torch_names") else None


def writer(options: Any, settings: Any) -> tuple[Any, str]:
    """Load what answers texts, and return it with the prefix that it was trained with.

    Args:
      options: of a command: `source`, `base`, `adapter`, `dtype` and `seed`.
      settings: of `jlora.models.generate`.
    """
    from jlora import data
    from jlora.cli._texts import Writer

    source = find(options.source, base=options.base, adapter=options.adapter)
    model, params = load(source, check=check_of(options), dtype=options.dtype)
    tokenizer = data.load_tokenizer(source.model)
    of_chats = source.settings.get("task") in ("chat", "preference")
    write = Writer(model, params, tokenizer, settings, options.seed, of_chats)
    return write, source.prefix


def check_of(options: Any) -> str:
    """A base in another dtype has other values."""
    return "values" if options.dtype is None else "shapes"
