"""Adapters as files hold them: arrays by name, the rest as JSON, and their base."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding

from jlora._errors import CheckpointError
from jlora._kernel.adapter import PARTS, Adapter
from jlora._kernel.nodes import Full, LowRank, Rows, is_node, is_trained
from jlora._paths import leaves_by_path
from jlora.checkpoint._digests import IN_BLOCKS, leaf_print
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint_of

Tree = Any
Check = Literal["values", "shapes"]


def as_json(name: str, value: Any) -> dict[str, Any]:
    """A dict that is kept beside the arrays.

    Raises:
      CheckpointError: it is no dict.
    """
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(
            f"{name}= is a {type(value).__name__}; pass a dict that JSON can hold."
        )
    return dict(value or {})


def nodes(params: Tree) -> Iterator[tuple[str, Any]]:
    """The nodes of a tree of which something is trained, with their paths."""
    for path, x in leaves_by_path(params, is_leaf=is_node).items():
        if is_trained(x):
            yield path, x


def adapter_arrays(params: Tree) -> dict[str, Any]:
    """What an adapter checkpoint holds, by name: all that is trained, and scales.

    Projections that several adapters have are held once.
    """
    arrays: dict[str, Any] = {}
    for name, x in nodes(params):
        if isinstance(x, Full):
            arrays[f"{name}/full"] = x.value
        elif isinstance(x, Rows):
            arrays[f"{name}/rows"] = x.rows
        else:
            for own, adapter in x.adapters.items():
                arrays.update(named_factors(name, own, adapter))
    elsewhere = {x for entry in adapter_entries(params) for x in borrowed(entry)}
    return {name: x for name, x in arrays.items() if name not in elsewhere}


def borrowed(entry: Mapping[str, Any]) -> list[str]:
    """The names that arrays of an adapter would have, were they not another's too."""
    shared = entry.get("shared", {})
    return [_factor_name(entry["path"], entry["name"], f) for f in shared]


_PARTS = "parts/"


def _factors(adapter: Adapter) -> dict[str, Any]:
    """The arrays of an adapter by name; a dropout key belongs to one step only."""
    children, _ = adapter.tree_flatten_with_keys()
    own = {key.name: x for key, x in children if key.name not in ("key", "parts")}
    return own | {f"{_PARTS}{n}": x for n, x in (adapter.parts or {}).items()}


def named_factors(path: str, name: str, adapter: Adapter) -> dict[str, Any]:
    """The arrays of one adapter by the names they have in a file."""
    factors = _factors(adapter).items()
    return {_factor_name(path, name, f): x for f, x in factors if x is not None}


def _factor_name(path: str, name: str, factor: str) -> str:
    return "/".join(filter(None, (path, name, factor)))


def adapter_entries(params: Tree) -> list[dict[str, Any]]:
    """The configuration of each adapter: all that is not an array."""
    entries: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for path, x in nodes(params):
        if not isinstance(x, LowRank):
            continue
        for name, adapter in x.adapters.items():
            factors = _factors(adapter)
            static: dict[str, Any] = {
                field.name: getattr(adapter, field.name)
                for field in dataclasses.fields(adapter)
                if field.name not in factors and field.name not in ("key", "parts")
            }
            kept = [f for f, value in factors.items() if value is not None]
            for part, array in projections(adapter).items():
                own = _factor_name(path, name, f"{_PARTS}{part}")
                if (holder := first.setdefault(id(array), own)) != own:
                    static.setdefault("shared", {})[f"{_PARTS}{part}"] = holder
            rank = adapter.rank
            entries.append(
                {"path": path, "name": name, "rank": rank, "factors": kept, **static}
            )
    return json.loads(json.dumps(entries))  # as it will be read again


def projections(adapter: Adapter) -> dict[str, Any]:
    """What an adapter has that is not trained, and that others may have too."""
    return {n: x for n, x in (adapter.parts or {}).items() if PARTS[n] == "frozen"}


def make_adapter(
    place: Path, entry: Mapping[str, Any], arrays: Mapping[str, Any]
) -> Any:
    """An adapter from its entry and its arrays."""
    settings = {k: _tuples(v) for k, v in entry.items()}
    path, name = settings.pop("path"), settings.pop("name")
    del settings["rank"]
    names = {f: _factor_name(path, name, f) for f in settings.pop("factors")}
    names |= settings.pop("shared", {})
    known = {field.name for field in dataclasses.fields(Adapter)}
    known |= {f"{_PARTS}{n}" for n in PARTS}
    strange = sorted((set(settings) | set(names)) - known)
    if strange:
        raise CheckpointError(
            f"the adapter of {path!r} in {str(place)!r} has {strange}, which this "
            "jlora does not know.\nUpgrade jlora."
        )
    factors = {f: arrays[full] for f, full in names.items()}
    parts = {f: x for f, x in factors.items() if f.startswith(_PARTS)}
    given: dict[str, Any] = {f: x for f, x in factors.items() if f not in parts}
    given |= settings
    if parts:
        given["parts"] = {f.removeprefix(_PARTS): x for f, x in parts.items()}
    fields = dataclasses.fields(Adapter)
    absent = [f.name for f in fields if f.default is dataclasses.MISSING]
    return Adapter(**{**dict.fromkeys(absent), **given})


def _tuples(x: Any) -> Any:
    return tuple(_tuples(y) for y in x) if isinstance(x, list) else x


def sharded(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape, on a mesh if that is where the sharding is."""
    named = sharding if isinstance(sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named)


def check_adapters(place: Path, saved: Any, own: Any) -> None:
    """Refuse to go on with adapters of another configuration than was saved."""
    saved, own = ({(e["path"], e["name"]): e for e in x} for x in (saved, own))
    lines = [f"{p!r} has no adapter here" for p, _ in saved if (p, _) not in own]
    lines += [f"{p!r} has no adapter there" for p, _ in own if (p, _) not in saved]
    for place_of, old in saved.items():
        new = own.get(place_of, old)
        for field in sorted(set(old) | set(new)):
            was, now = old.get(field), new.get(field)
            if was != now and None not in (was, now):
                lines.append(f"{place_of[0]!r}: {field} was {was}, is {now}")
    if not lines:
        return
    more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
    listed = "\n  ".join(lines[:8])
    raise CheckpointError(
        f"the adapters in {str(place)!r} are not configured as those they are restored "
        f"into.\n  {listed}{more}\nPass jlora.lorafy what it was given then."
    )


def scale_entries(params: Tree) -> list[dict[str, Any]]:
    """`adapter_entries` with what a training state takes from its base.

    These are the scales, the projections, and which rows of a table are trained.
    """
    entries = iter(adapter_entries(params))
    prints: dict[int, str | None] = {}
    out: list[dict[str, Any]] = []
    for path, x in nodes(params):
        if isinstance(x, Rows):
            out.append({"path": path, "name": "rows", "indices": list(x.indices)})
        for adapter in x.adapters.values() if isinstance(x, LowRank) else ():
            scale = leaf_print(adapter.scale)
            entry = {**next(entries), "scale": _brief_scale(adapter, scale.digest)}
            for name, held in projections(adapter).items():
                if id(held) not in prints:
                    prints[id(held)] = leaf_print(held).digest
                entry[name] = prints[id(held)]
            entry.pop("shared", None)
            out.append(entry)
    return out


def _brief_scale(adapter: Adapter, digest: str | None) -> Any:
    """The scale itself, or for a stack of them what tells one from another."""
    if digest is None:
        return None
    return float(adapter.scale) if not adapter.scale.shape else digest


# -- the base --------------------------------------------------------------------------


def check_is_plain(base_params: Tree) -> None:
    """Refuse a tree that has nodes already."""
    adapted = [name for name, _ in nodes(base_params)]
    if adapted:
        raise CheckpointError(
            f"load_adapter takes the plain base, but {adapted[0]!r} is adapted or "
            "trained already.\nPass the parameters as they were before jlora.lorafy."
        )


def base_of(params: Tree, config: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a tree, made as that of a checkpoint was."""
    in_blocks = config["version"] >= IN_BLOCKS
    return fingerprint_of(params, config.get("full", ()), in_blocks=in_blocks)


def check_base(place: Path, config: Any, base: Fingerprint, check: Check) -> None:
    """Refuse a base that is not the one a checkpoint was saved on.

    Raises:
      CheckpointError: another base, or a `check` that is neither of the two.
    """
    if check not in ("values", "shapes"):
        raise CheckpointError(f"check={check!r}; expected 'values' or 'shapes'.")
    saved = Fingerprint.from_json(config["base"])
    lines = saved.differences(base, values=check == "values")
    if not lines:
        return
    more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
    listed = "\n  ".join(lines[:8])
    remedy = (
        ""
        if check == "shapes"
        else (
            " To use another dtype or version of it all the same, pass check='shapes'."
        )
    )
    if any(entry.get("shifted") for entry in config.get("adapters", ())):
        remedy = (
            " That is what the adapter's start left of them (PiSSA, OLoRA and their "
            "like): lorafy the original as it was then and take jlora.without_adapters "
            "of that; or save jlora.init.unshift(tree, initial, params), which loads "
            "on the original."
        )
    raise CheckpointError(
        f"{str(place)!r} was saved on another base.\n  fingerprint there: "
        f"{saved.digest}\n  fingerprint here:  {base.digest}\n  {listed}{more}\nPass "
        f"the parameters it was trained on, in the same dtype.{remedy}"
    )
