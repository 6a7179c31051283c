"""`jlora plan`: what a run takes on each device, before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora._options import UsageError, option, read_toml
from jlora.cli._common import stay_on_host

TOO_LARGE = 3  # the exit status of a plan that does not fit

# Of a file of `jlora train`, the settings that are options here by the same name, and
# those that are here by another.
_SAME = (
    "rank", "targets", "quantize", "full", "dora", "dropout", "precision", "accumulate",
    "clip",
)  # fmt: skip


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `jlora plan` takes."""

    model: str | None = option(
        None, "a model's folder, its config.json, or a file of `jlora train` that "
        "names a folder", metavar="MODEL", positional=True)
    length: int | None = option(
        None, "tokens per example (512)", least=1, group="batch")
    target_length: int | None = option(
        None, "tokens per answer, for an encoder-decoder (as --length)", least=1)
    batch_size: int | None = option(
        None, "examples per step, over all devices (32)", least=1)
    accumulate: int | None = option(
        None, "parts that a batch is cut into (1)", least=1)
    rank: int | None = option(None, "the rank r (8)", least=1, group="adapter")
    targets: list[str] | None = option(
        None, "names of layers, or all-linear (query value)")
    dropout: float | None = option(
        None, "rate of dropout on the adapters' inputs (0)", least=0, below=1)
    dora: bool | None = option(None, "DoRA: train each output column's length, too")
    quantize: str | None = option(
        None, "keep the frozen base in 8 or 4 bits (QLoRA)",
        choices=("int8", "nf4", "fp4", "fp8"))
    full: bool | None = option(None, "train every weight instead")
    precision: str | None = option(
        None, "what the model computes in; adapters stay float32 (float32)",
        choices=("float32", "bfloat16"), group="program")
    clip: float | None = option(
        None, "the largest norm of the gradient; 0 is off (1)", least=0)
    scan_layers: bool | None = option(
        None, "compile the blocks as one, in a scan (yes; no for a file of `jlora "
        "train`)")
    remat: bool | None = option(
        None, "recompute activations in the backward pass, to keep fewer")
    mesh: str | None = option(
        None, "axes and sizes, such as data=2,fsdp=4 (one device)", group="devices")
    layout: str | None = option(
        None, "how parameters are spread (fsdp+tensor)",
        choices=("fsdp", "tensor", "fsdp+tensor", "replicated"))
    uneven: str | None = option(
        None, "what to do with an axis that the mesh does not divide (error)",
        choices=("error", "replicate"))
    devices: str = option("h100", "the accelerator (h100)", metavar="NAME")
    compile: bool = option(
        False, "compile the step for simulated CPU devices, and use XLA's account of "
        "memory; there bfloat16 counts as float32")
    remedies: bool | None = option(
        None, "also plan what would make it smaller (done if it does not fit)")
    json: bool = option(False, "print JSON, for programs")
# fmt: on


def run(options: Options) -> int:
    """Print the plan; return 3 where a device's memory is not enough."""
    if options.model is None:
        raise UsageError("MODEL is missing: a folder, a config.json, or a .toml file.")
    stay_on_host()
    import jlora

    given = arguments(options)
    if options.compile:
        _fake_devices(given.get("mesh"))
    plan = jlora.plan(
        **given, compiled=options.compile, remedies=options.remedies,
    )  # fmt: skip
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan)
    return 0 if plan.fits else TOO_LARGE


def arguments(options: Options) -> dict[str, Any]:
    """Return what `jlora.plan` is called with: the file's settings, then the options.

    Raises:
      UsageError: a file that names no model's folder.
    """
    file = Path(str(options.model))
    said = read_toml(file) if file.suffix == ".toml" else {}
    given = {name: said[name] for name in _SAME if name in said}
    own = {name: getattr(options, name) for name in _SAME}
    given |= {name: value for name, value in own.items() if value is not None}
    given["clip"] = given.get("clip", 1.0) or None
    in_file = bool(said)
    return {
        **given,
        "model": _model(options.model, said),
        "batch": _batch(options, said),
        "mesh": options.mesh or said.get("mesh"),
        "layout": options.layout or said.get("layout", "fsdp+tensor"),
        "uneven": options.uneven or said.get("uneven", "error"),
        "devices": options.devices,
        # Tasks number their blocks unless their file says otherwise.
        "scan_layers": _first(options.scan_layers, said, "scan_layers", not in_file),
        "remat": _first(options.remat, said, "remat", False),
    }


def _first(given: Any, said: dict[str, Any], name: str, default: Any) -> Any:
    return said.get(name, default) if given is None else given


def _batch(options: Options, said: dict[str, Any]) -> tuple[int, ...]:
    """Examples, tokens, and tokens of an answer, where anything says them."""
    size = _first(options.batch_size, said, "batch_size", 32)
    sources = ("max_length", "max_source_length", "max_meaning_length")
    answers = ("max_target_length", "max_text_length")
    length = options.length or _said(said, sources) or 512
    answer = options.target_length or _said(said, answers)
    return (size, length) if answer is None else (size, length, answer)


def _said(said: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of some settings that a file has."""
    return next((said[name] for name in names if name in said), None)


def _model(place: Any, said: dict[str, Any]) -> str:
    if not said:
        return str(place)
    if "model" not in said:
        raise UsageError(f'{place} names no model.\nAdd model = "DIR".')
    return str(said["model"])


def _fake_devices(mesh: Any) -> None:
    """Have as many CPU devices as the mesh asks for."""
    import jax

    from jlora.planning._read import mesh_of

    jax.config.update("jax_num_cpu_devices", mesh_of(mesh).size)
