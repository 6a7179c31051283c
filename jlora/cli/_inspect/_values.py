"""How large an adapter's updates are, and of how many directions, from its factors.

The update `s·A·B` is never formed: with `A = Q R` and `Bᵀ = P S` its singular values
are those of `s·R·Sᵀ`, a matrix of rank by rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora._errors import CheckpointError
from jlora._kernel.axes import RANK
from jlora.cli._inspect._report import Report

Array = np.ndarray


class Factors(NamedTuple):
    """A `[*batch, in, r]`, B `[*batch, r, out]`, the scale `[*batch]` or a number."""

    a: Array
    b: Array
    scale: Any


@dataclasses.dataclass(frozen=True)
class Values:
    """What one kernel's factors amount to; of a stack, one number for each layer.

    Attributes:
      norm_a, norm_b: Frobenius norms of the factors, `[*batch]`.
      norm: that of the update `s·A·B`.
      singular_values: the update's, `[*batch, r]`, the largest first.
      effective_rank: e to the entropy of the singular values as parts of their sum: 1
        where one direction is all, r where all are alike; 0 of an update that is zero.

    Source: Roy and Vetterli 2007, "The effective rank".
    """

    norm_a: Array
    norm_b: Array
    norm: Array
    singular_values: Array
    effective_rank: Array

    @classmethod
    def of(cls, factors: Factors) -> Values:
        """Measure factors."""
        a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
        scale = np.asarray(factors.scale, np.float64)
        right = np.linalg.qr(a, mode="r")
        left = np.linalg.qr(np.swapaxes(b, -1, -2), mode="r")
        small = scale[..., None, None] * (right @ np.swapaxes(left, -1, -2))
        found = np.linalg.svd(small, compute_uv=False)
        norm_a, norm_b = (np.linalg.norm(x, axis=(-2, -1)) for x in (a, b))
        norm = np.linalg.norm(found, axis=-1)
        return cls(norm_a, norm_b, norm, found, _rank(found))


def _rank(values: Array) -> Array:
    total = values.sum(-1, keepdims=True)
    parts = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    logs = np.log(parts, out=np.zeros_like(parts), where=parts > 0)
    return np.where(total[..., 0] > 0, np.exp(-(parts * logs).sum(-1)), 0.0)


def with_values(report: Report) -> Report:
    """A report with what its adapter's factors amount to; of no adapter, as it is.

    Raises:
      CheckpointError: the weights cannot be read.
    """
    if report.kind not in _READERS:
        return report
    found = {name: Values.of(x) for name, x in _READERS[report.kind](report)}
    rows = [
        {**row, **_columns(found[row[report.unit]])}
        if row[report.unit] in found
        else {**row, **dict.fromkeys(COLUMNS)}
        for row in report.rows
    ]
    spectra = {name: x.singular_values.tolist() for name, x in found.items()}
    return dataclasses.replace(
        report,
        rows=rows,
        data={**report.data, "singular_values": spectra},
        shown=("rank", "scale", *COLUMNS),
    )


COLUMNS = ("norm_A", "norm_B", "norm_sAB", "largest", "effective_rank")


def _columns(values: Values) -> dict[str, float]:
    """A row's numbers: of a stack the norms of all of it, and the mean of the ranks."""
    lengths = (values.norm_a, values.norm_b, values.norm)
    numbers = [float(np.linalg.norm(x)) for x in lengths]
    numbers += [values.singular_values.max(), values.effective_rank.mean()]
    return {k: float(f"{x:.4g}") for k, x in zip(COLUMNS, numbers, strict=True)}


# -- PEFT ------------------------------------------------------------------------------


def _of_peft(report: Report) -> Iterator[tuple[str, Factors]]:
    from jlora._files import read_tensors
    from jlora.cli._inspect._peft import by_module
    from jlora.peft._contents import without_names
    from jlora.peft._files import WEIGHTS

    file = Path(report.path) / WEIGHTS
    if not file.exists():
        raise CheckpointError(
            f"{report.path!r} has no {WEIGHTS}, so its values cannot be read.\n"
            "Leave --values out."
        )
    scales = {row["module"]: row["scale"] for row in report.rows}
    modules = by_module(without_names(read_tensors(file), str(file)))
    for module, parts in modules.items():
        down = parts.get("lora_A.weight", parts.get("lora_embedding_A"))
        up = parts.get("lora_B.weight", parts.get("lora_embedding_B"))
        if down is None or up is None or scales[module] is None:
            continue
        r = next(row["rank"] for row in report.rows if row["module"] == module)
        down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
        if len(down) == r:  # A [r, in], B [out, r]
            yield module, Factors(down.T, up.T, scales[module])
        else:  # of E experts, A [E*r, in] and B [out, r*E]
            down = down.reshape(-1, r, down.shape[1])
            up = up.reshape(len(up), r, -1)
            scale = np.full(len(down), scales[module])
            yield module, Factors(down.mT, np.moveaxis(up, (2, 1, 0), (0, 1, 2)), scale)


# -- jlora's checkpoints ---------------------------------------------------------------


def _of_checkpoint(report: Report) -> Iterator[tuple[str, Factors]]:
    from jlora._kernel.forms import as_lora
    from jlora.checkpoint import _storage
    from jlora.checkpoint._entries import make_adapter

    place = _storage.local_path(report.path)
    config = _storage.read_config(place, "adapter")
    arrays = _storage.read_arrays(place, config)
    for entry in config["adapters"]:
        if "factors" not in entry:
            continue
        own = "/".join(filter(None, (entry["path"], entry["name"])))
        adapter = make_adapter(place, entry, arrays)
        shape = config["base"]["leaves"][entry["path"]]["shape"]
        yield own, _as_matrices(as_lora(adapter, shape))


def _as_matrices(adapter: Any) -> Factors:
    """Bring an adapter's factors into `[*batch, in, r]` and `[*batch, r, out]`."""
    batch = adapter.batch_axes
    sizes = [adapter.size(d) for d in batch]
    a = _ordered(adapter.a, adapter.a_dims, (*batch, *adapter.in_axes, RANK), sizes)
    b = _ordered(adapter.b, adapter.b_dims, (*batch, RANK, *adapter.out_axes), sizes)
    r, n = adapter.rank, len(batch)
    scale = _ordered(adapter.scale, adapter.s_dims, batch, sizes)
    return Factors(
        a.reshape(*a.shape[:n], -1, r), b.reshape(*b.shape[:n], r, -1), scale
    )


def _ordered(
    array: Any, dims: Sequence[int], wanted: Sequence[int], sizes: Sequence[int]
) -> Array:
    """Bring axes into an order; a stack's that the array lacks are repeated."""
    array = np.asarray(array)
    own = [d for d in wanted if d in dims]
    array = array.transpose([dims.index(d) for d in own])
    for axis, d in enumerate(wanted):
        if d not in dims:
            array = np.repeat(np.expand_dims(array, axis), sizes[axis], axis)
    return array


_READERS = {"peft_adapter": _of_peft, "adapter": _of_checkpoint}


# -- a picture -------------------------------------------------------------------------


def plot(reports: Sequence[Report], path: Path) -> None:
    """Draw norms and effective ranks, layer by layer, a line for each kind of kernel.

    Raises:
      CheckpointError: none of the reports is an adapter's.
    """
    adapters = [report for report in reports if report.shown]
    if not adapters:
        raise CheckpointError(
            "--plot: there is no adapter here.\nPass the folder of an adapter."
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(adapters)), layout="constrained")
    panels = figure.subplots(len(adapters), 2, squeeze=False)
    for report, (norms, ranks) in zip(adapters, panels, strict=True):
        _lines(norms, report, "norm_sAB", "norm of the update s·A·B")
        _lines(ranks, report, "effective_rank", "effective rank")
        most = max(row["rank"] or 0 for row in report.rows)
        ranks.axhline(most, color="0.6", linestyle="--", linewidth=1, label="rank")
        ranks.set_ylim(0, most * 1.08)
        norms.set_ylim(bottom=0)
        norms.set_title(report.path, loc="left", fontsize=9)
        ranks.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120)


def _lines(axes: Any, report: Report, column: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for kind, points in _by_kind(report, column).items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=kind)
    axes.set(xlabel="layer", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _by_kind(report: Report, column: str) -> dict[str, list[tuple[int, float]]]:
    """The layers and values of each kind of kernel: its path without numbers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in report.rows:
        if row[column] is None:
            continue
        parts = re.split(r"[./]", row[report.unit])
        numbers = [int(part) for part in parts if part.isdigit()]
        words = [part for part in parts if not part.isdigit() and part != "kernel"]
        kind = " ".join([*words[:1], *words[-2:]] if len(words) > 3 else words)
        layer = numbers[0] if numbers else 0
        found.setdefault(kind, []).append((layer, row[column]))
    return found
