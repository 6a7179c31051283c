"""Training states, saved so that a run can go on bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jlora._errors import CheckpointError
from jlora._processes import on_first
from jlora.checkpoint import _storage
from jlora.checkpoint._arrays import check_has_values, named
from jlora.checkpoint._digests import has_numbers, leaf_kind, leaf_print
from jlora.checkpoint._entries import (
    Check,
    as_json,
    base_of,
    check_adapters,
    check_base,
    scale_entries,
)
from jlora.checkpoint._fingerprint import Fingerprint, fingerprint
from jlora.checkpoint._storage import PathLike

if TYPE_CHECKING:
    from jlora.train._state import TrainState

Tree = Any


def save_state(
    path: PathLike,
    state: TrainState,
    *,
    data_position: Mapping[str, Any] | None = None,
    include_base: bool = False,
    overwrite: bool = False,
    base: Fingerprint | None = None,
) -> None:
    """Save a training state, so that the run can go on bit for bit.

    A later state of the same run (the same base, trained leaves and PRNG key) replaces
    an earlier one; anything else stays, unless `overwrite`.

    Args:
      path: the folder to write.
      state: a `jlora.train.TrainState`.
      data_position: where the data stands, as JSON: epoch, offset, an iterator's state.
      include_base: write the frozen base too.
      overwrite: replace the checkpoint of another run.
      base: as in `save_adapter`.

    Raises:
      CheckpointError: another run is at `path`, or it cannot be written.
    """
    place = _storage.local_path(path)
    arrays, config = state_content(state, data_position, include_base, base)
    on_first(
        f"looking for room at {str(place)!r}",
        lambda: _storage.check_place(place, overwrite or _is_earlier(place, config)),
    )
    _storage.write(place, "state", arrays, config)


def restore_state(
    path: PathLike,
    state: TrainState,
    *,
    check: Check = "values",
    base: Fingerprint | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a training state.

    Args:
      path: what `save_state` wrote.
      state: a state made as the saved one was, `TrainState.create(params, tx, key)`: it
        gives the structure, the shardings and the base. It may be abstract if the base
        was saved too.
      check: as in `load_adapter`.
      base: `fingerprint(state.params)`, if it is known; None reads the base.

    Returns:
      The state and the data position.

    Raises:
      CheckpointError: another base, other adapters, another optimiser, or a damaged
        checkpoint.
    """
    place = _storage.local_path(path)
    check_is_state(state)
    config = _storage.read_config(place, "state")
    with_base = config["with_base"]
    if not with_base:
        _check_has_base(place, state)
        own = base_of(state.params, config) if base is None else base
        check_base(place, config, own, check)
    check_adapters(place, config["adapters"], scale_entries(state.params))
    arrays = _storage.read_arrays(place, config, _state_arrays(state, with_base))
    moving = _moving(state, with_base)
    restored = (arrays[name] for name in named(moving))
    moving = jax.tree.map(lambda x: next(restored) if has_numbers(x) else x, moving)
    return dataclasses.replace(state, **moving), config["data_position"]


def _moving(state: TrainState, with_base: bool) -> dict[str, Any]:
    """What a checkpoint holds: all but the base."""
    names = ["step", "trainable", "opt_state", "key"]
    names += ["frozen"] if with_base else []
    return {name: getattr(state, name) for name in sorted(names)}


def _state_arrays(state: TrainState, with_base: bool) -> dict[str, Any]:
    return named(_moving(state, with_base))


def state_content(
    state: TrainState,
    data_position: Mapping[str, Any] | None,
    with_base: bool,
    base: Fingerprint | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a state's checkpoint and its description.

    Raises:
      CheckpointError: what is no state, or one without values.
    """
    check_is_state(state)
    check_has_values(_moving(state, with_base))
    base = fingerprint(state.params) if base is None else base
    config = {
        "step": int(state.step),
        "run": _run(state, base),
        "with_base": with_base,
        "adapters": scale_entries(state.params),
        "base": base.to_json(),
        "data_position": as_json("data_position", data_position),
    }
    return _state_arrays(state, with_base), config


def _run(state: TrainState, base: Fingerprint) -> str:
    """What tells one run from another: base, trained leaves and PRNG key."""
    shapes = {n: leaf_kind(x).kind for n, x in named(state.trainable).items()}
    text = f"{base.digest}|{shapes}|{leaf_print(state.key).digest}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_is_state(state: Any) -> None:
    """Refuse what is no training state.

    Raises:
      CheckpointError: a field is missing.
    """
    for name in ("step", "trainable", "frozen", "opt_state", "key"):
        if not hasattr(state, name):
            raise CheckpointError(
                f"a {type(state).__name__} is no training state: it has no {name!r}.\n"
                "Pass a jlora.train.TrainState."
            )


def _check_has_base(place: Path, state: TrainState) -> None:
    leaves = jax.tree.leaves(state.frozen)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise CheckpointError(
            f"{str(place)!r} was saved without the base, and the state it is restored "
            "into has only shapes for one.\nPass a state made of real parameters, or "
            "save with include_base=True."
        )


def _is_earlier(place: Path, config: Mapping[str, Any]) -> bool:
    """Whether an earlier state of the same run is there."""
    try:
        there = _storage.read_config(place, "state")
    except CheckpointError:
        return False
    return there["run"] == config["run"] and there["step"] <= config["step"]
