"""`jlora merge`: an adapter folded into its model, as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jlora._errors import CheckpointError
from jlora._options import option
from jlora.cli._common import DTYPES, check_target, stay_on_host


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora merge` takes."""

    source: str = option(
        about="a PEFT adapter, a checkpoint of jlora or a run", metavar="SOURCE",
        positional=True)
    target: Path = option(
        about="the folder to write", metavar="TARGET", positional=True)
    base: str | None = option(
        None, "the model it was trained on: a folder or a hub name (what SOURCE says)",
        metavar="DIR|NAME")
    adapter: str | None = option(
        None, "the PEFT adapter in the folder of that name", metavar="NAME")
    dtype: str | None = option(
        None, "of the merged model; sums are rounded to it once (its own)",
        choices=DTYPES)
    rounding: str = option(
        "nearest", "of sums that the dtype cannot hold; stochastic is exact on average "
        "(nearest)", choices=("nearest", "stochastic"))
    check: str = option(
        "values", "compare the model's values with those it was trained on, or shapes "
        "only (values)", choices=("values", "shapes"))
    max_shard: float = option(
        50.0, "gigabytes per file (50)", above=0, metavar="GB")
    overwrite: bool = option(False, "replace the model in TARGET")
    json: bool = option(False, "print the report as JSON")
# fmt: on


def run(options: Options) -> None:
    """Merge, save, and say what rounding cost."""
    stay_on_host()
    import jax

    import jlora
    from jlora import models
    from jlora.cli import _sources

    check_target(options.target, options.overwrite, "model")
    source = _sources.find(
        options.source, base=options.base, name=options.adapter, merged=False
    )
    if source.adapter is None:
        raise CheckpointError(
            f"{options.source!r} is a model without an adapter: there is nothing to "
            "merge.\nPass the folder of an adapter, or of a run."
        )
    model, tree = _sources.load(source, check=options.check)
    key = jax.random.key(0) if options.rounding == "stochastic" else None
    rounding: Any = options.rounding
    merged, report = jlora.merge(
        tree, report=True, rounding=rounding, key=key, dtype=options.dtype
    )
    models.save(
        model,
        merged,
        options.target,
        tokenizer_from=_tokenizer_of(source.model),
        max_shard_bytes=int(options.max_shard * 1e9),
        overwrite=options.overwrite,
    )
    _print(options, source.model, merged, report)


def _tokenizer_of(model: str) -> Path | None:
    """The model's folder, if it holds a tokenizer; a hub's model is in a cache."""
    from jlora.models._hf.load import TOKENIZER_FILES, _folder

    folder = _folder(model)
    has_one = any((folder / name).exists() for name in TOKENIZER_FILES)
    return folder if has_one else None


def _print(options: Options, base: str, merged: Any, report: Any) -> None:
    import jax

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(merged))
    if options.json:
        kernels = [dataclasses.asdict(leaf) for leaf in report]
        facts = {"path": str(options.target), "base": base, "bytes": size}
        print(json.dumps({**facts, "kernels": kernels}, indent=2))
        return
    print(report)
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(merged)})
    print(f"\n{options.target}: {size:,} bytes in {', '.join(dtypes)}, on {base}")
    lost = max((leaf.lost for leaf in report), default=0.0)
    if lost > 0.05:
        print(
            f"Up to {lost:.0%} of an update was lost to rounding; --dtype float32 "
            "keeps it, --rounding stochastic does on average."
        )
