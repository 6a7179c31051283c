"""What the project sets itself: a bar for each figure, met or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks._cases import case

Results = Mapping[str, Mapping[str, Any]]
Row = Mapping[str, Any]


class Found(NamedTuple):
    """A value, and the two figures whose ratio it is, as text."""

    value: float
    above: str
    below: str


class Bar(NamedTuple):
    """A figure that shall be at most, or at least, so much.

    `find` reads it from the rows of one command, on one kind of device.
    """

    name: str
    command: str
    device: str
    at_least: bool
    bar: float
    find: Callable[[Sequence[Row]], Found | None]


def table(results: Results) -> list[dict[str, Any]]:
    """Return a row for each bar, and for each environment it was measured in."""
    return [row for bar in BARS for row in _rows(bar, results)]


def _rows(bar: Bar, results: Results) -> Iterator[dict[str, Any]]:
    sign = "at least" if bar.at_least else "at most"
    head = {"figure": bar.name, "bar": f"{sign} {bar.bar:g}"}
    found = {}
    # The newest last, so that it stands.
    for name, result in sorted(results.items(), key=lambda x: x[1]["machine"]["date"]):
        if _belongs(bar, result) and (figure := bar.find(result["rows"])):
            found[result["environment"]["name"]] = (name, figure)
    for environment, (name, figure) in found.items():
        met = figure.value >= bar.bar if bar.at_least else figure.value <= bar.bar
        yield {
            **head,
            "value": round(figure.value, 3),
            "numerator": figure.above,
            "denominator": figure.below,
            "met": met,
            "environment": environment,
            "load": results[name]["machine"]["load"],
            "file": name,
        }
    if not found:
        yield {**head, "value": "not measured"}


def _belongs(bar: Bar, result: Mapping[str, Any]) -> bool:
    kind = "cpu" if result["machine"]["device"].startswith("cpu") else "gpu"
    same = result["command"] == bar.command and bar.device in ("any", kind)
    return same and not result["options"].get("quick")


def _row(rows: Sequence[Row], **wanted: Any) -> Row | None:
    match = (r for r in rows if all(r.get(k) == v for k, v in wanted.items()))
    return next((r for r in match if not r.get("error")), None)


def _step(
    shape: str, column: str, other: str, *, contender: str = "jlora", **settings: Any
) -> Callable[[Sequence[Row]], Found | None]:
    """A ratio of step times; `other` is the contender it is to."""
    title = case(shape, **settings).title

    def find(rows: Sequence[Row]) -> Found | None:
        one = _row(rows, case=title, contender=contender)
        two = _row(rows, case=title, contender=other)
        if one is None or two is None or one.get(column) is None:
            return None
        sides = [f"{x['contender']} {x['median_ms']:,.1f} ms" for x in (one, two)]
        if column == "full_to_this":
            sides.reverse()
        return Found(one[column], *sides)

    return find


def _peak(
    shape: str, column: str, **settings: Any
) -> Callable[[Sequence[Row]], Found | None]:
    """A step against the machine's matmul, as a multiple or a share of its rate."""
    title = case(shape, **settings).title

    def find(rows: Sequence[Row]) -> Found | None:
        row = _row(rows, case=title, contender="jlora")
        if row is None or row.get(column) is None:
            return None
        needed, rate = row["needed_gflop"], row["matmul_gflops"]
        sides = [
            f"{row['median_ms']:,.1f} ms",
            f"{needed:,.0f} GFLOP at {rate:,.0f} GFLOP/s",
        ]
        if column == "share_of_peak":
            sides.reverse()
        return Found(row[column], *sides)

    return find


def _text(rows: Sequence[Row]) -> Found | None:
    ours, theirs = (_row(rows, contender=n) for n in ("jlora", "PEFT"))
    if ours is None or theirs is None:
        return None
    sides = (f"{n['tokens_per_s']:,.0f} tokens/s" for n in (ours, theirs))
    return Found(ours["to_peft"], *sides)


def _memory(
    shape: str, compiled_for: str | None = None, dtype: str | None = None, **fields: Any
) -> Callable[[Sequence[Row]], Found | None]:
    """The device's peak where it tells one, else XLA's account."""
    title = case(shape, dtype=dtype, model_fields=fields).title

    def find(rows: Sequence[Row]) -> Found | None:
        ours, full = (
            _row(rows, case=title, contender=n, compiled_for=compiled_for)
            for n in ("jlora", "full fine-tuning")
        )
        if ours is None or full is None:
            return None
        column = "device_mib" if ours.get("device_mib") else "peak_mib"
        sides = (f"{x[column]:,.0f} MiB" for x in (ours, full))
        return Found(ours[column] / full[column], *sides)

    return find


def _compile(rows: Sequence[Row]) -> Found | None:
    title = case("t5-small-8x64").title
    row = _row(rows, case=title, depth=None, scan_layers=False, stage="all")
    if row is None:
        return None
    return Found(row["ratio"], f"{row['jlora_s']:.2f} s", f"{row['plain_s']:.2f} s")


def _depth(rows: Sequence[Row]) -> Found | None:
    deep, flat = (_row(rows, depth=n, scan_layers=True, stage="all") for n in (48, 12))
    if deep is None or flat is None:
        return None
    sides = (f"{x['jlora_s']:.2f} s" for x in (deep, flat))
    return Found(deep["jlora_s"] / flat["jlora_s"], *sides)


def _merge(contender: str, copy: str, share: str) -> Callable[..., Found | None]:
    def find(rows: Sequence[Row]) -> Found | None:
        row = _row(rows, contender=contender)
        if row is None:
            return None
        sides = (f"{row[n]:,.1f} GB/s" for n in ("gbytes_per_s", copy))
        return Found(row[share], *sides)

    return find


def _seconds(**wanted: Any) -> Callable[[Sequence[Row]], Found | None]:
    def find(rows: Sequence[Row]) -> Found | None:
        row = _row(rows, **wanted)
        return None if row is None else Found(row["median_s"], "", "")

    return find


def _cpu_bars() -> Iterator[Bar]:
    step = ("step_time", "cpu", False)
    small = "t5-small-8x64"
    yield Bar("jlora / floor, T5-small, query value", *step, 1.04,
              _step(small, "to_floor", "floor"))  # fmt: skip
    yield Bar("jlora / floor, T5-small, all-linear", *step, 1.12,
              _step(small, "to_floor", "floor", targets=["all-linear"]))  # fmt: skip
    names = {small: "T5-small 8x64/64", "t5-small-16x128": "T5-small 16x128/128",
             "gpt2-4x128": "GPT-2 4x128"}  # fmt: skip
    for shape, name in names.items():
        find = _step(shape, "to_peft", "PEFT")
        yield Bar(f"jlora / PEFT eager, {name}", *step, 0.95, find)
    for shape, name in names.items():
        find = _peak(shape, "to_roofline")
        yield Bar(f"step / needed FLOPs at the matmul's rate, {name}", *step, 1.4, find)
    yield Bar(
        "real text, jlora / PEFT tokens a second", "text", "cpu", True, 1.5, _text
    )
    yield Bar("full / jlora, T5-small", "step_time", "cpu", True, 1.75,
              _step(small, "full_to_this", "full fine-tuning"))  # fmt: skip
    memory = ("memory", "cpu", False, 0.33)
    base, wide = "t5-base-8x64", "t5-base-32x512"
    ahead = {"compiled_for": "h100"}
    yield Bar("memory, LoRA / full, T5-base 8x64/64, bfloat16, compiled for an H100",
              *memory, _memory(base, **ahead, dtype="bfloat16"))  # fmt: skip
    lean = {"attn_implementation": "cudnn", "remat": True}
    yield Bar("the same, 32x512/128", *memory, _memory(wide, **ahead))
    yield Bar("the same, cuDNN's attention, blocks recomputed", *memory,
              _memory(wide, **ahead, **lean))  # fmt: skip
    yield Bar("memory, LoRA / full, T5-base 8x64/64, float32, CPU", *memory,
              _memory(base))  # fmt: skip
    lean = {"scan_layers": True, "remat": True}
    yield Bar("the same, layers scanned and recomputed", *memory,
              _memory(base, **lean))  # fmt: skip


def _gpu_bars() -> Iterator[Bar]:
    step = ("step_time", "gpu", False)
    base, llama = "t5-base-32x512", "llama-1b-2x2048"
    cudnn = {"attn_implementation": "cudnn"}  # what `--gpu` chooses
    for shape, name in {base: "T5-base", llama: "Llama 1B"}.items():
        find = _step(shape, "to_compile", "PEFT, torch.compile", model_fields=cudnn)
        yield Bar(f"jlora / PEFT torch.compile, {name}, bfloat16", *step, 0.67, find)
    wide = _step(llama, "to_floor", "floor", rank=16, targets=["all-linear"],
                 model_fields=cudnn)  # fmt: skip
    yield Bar("jlora / floor, Llama 1B, all-linear r16, bfloat16", *step, 1.1, wide)
    yield Bar("share of the matmul's rate, Llama 1B, 2048 tokens", "step_time", "gpu",
              True, 0.55,
              _peak(llama, "share_of_peak", model_fields=cudnn))  # fmt: skip
    yield Bar("memory, LoRA / full, T5-base 32x512, bfloat16", "memory", "gpu", False,
              0.33, _memory(base, **cudnn))  # fmt: skip


def _other_bars() -> Iterator[Bar]:
    yield Bar("trace and compile, jlora / plain", "compile_time", "any", False, 1.15,
              _compile)  # fmt: skip
    yield Bar("compile, 48 / 12 scanned layers", "compile_time", "any", False, 1.2,
              _depth)  # fmt: skip
    for device in ("cpu", "gpu"):
        # Each against the copy that needs as much new memory as it does.
        merge = ("merge", device, True, 0.7)
        yield Bar(f"merge, share of a copy into new memory, {device.upper()}", *merge,
                  _merge("jlora", "copy_gbytes_per_s",
                         "share_of_bandwidth"))  # fmt: skip
        yield Bar(f"merge, donated, share of a copy in place, {device.upper()}", *merge,
                  _merge("jlora, donated", "in_place_gbytes_per_s",
                         "share_of_in_place"))  # fmt: skip
    yield Bar("lorafy of T5-XXL's shapes, all-linear, s", "lorafy", "any", False, 1.0,
              _seconds(targets="all-linear"))  # fmt: skip
    yield Bar("import jlora beyond import jax, s", "import_time", "any", False, 0.1,
              _seconds(**{"import": "jlora"}))  # fmt: skip


BARS = list(itertools.chain(_cpu_bars(), _gpu_bars(), _other_bars()))
