"""The numbers that codes stand for, as bitsandbytes has them to the bit."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Table = np.ndarray[Any, Any]

# NormalFloat: the quantiles of a normal distribution, scaled to [-1, 1].
# Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent, one of mantissa; over the largest of them, 12.
_FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
    0.1666666716337204, 0.25,
)  # fmt: skip


@functools.cache
def four_bits(form: str) -> Table:
    """The sixteen numbers of `"nf4"` or `"fp4"`, float32, by code."""
    numbers = _NF4 if form == "nf4" else (*_FP4, *(-x for x in _FP4))
    return np.asarray(numbers, np.float32)


@functools.cache
def pairs(form: str) -> Table:
    """What each byte of two codes stands for, `[256, 2]`: the high bits come first."""
    codes, byte = four_bits(form), np.arange(256)
    return np.stack([codes[byte >> 4], codes[byte & 15]], axis=-1)


@functools.cache
def dynamic_map() -> Table:
    """The 256 numbers in which statistics are quantised again, float32, sorted.

    A sign, a unary exponent from 0 to -6, and a fraction in the bits that are left.

    Source: Dettmers 2016, arXiv:1511.04561, section 2.1.2 (dynamic tree).
    """
    f = np.float32
    numbers = [0.0, 1.0]
    for bits in range(7):
        count = 2**bits
        step = f((f(1) - f(0.1)) / f(count))
        at = np.arange(count + 1, dtype=np.float64)
        # As torch.linspace: from the nearer end, rounded once.
        low, high = f(0.1) + np.float64(step) * at, 1 - np.float64(step) * (count - at)
        ends = np.where(at < (count + 1) // 2, low, high).astype(f)
        means = f(10.0 ** (bits - 6)) * ((ends[:-1] + ends[1:]) / f(2))
        numbers += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.asarray(numbers, f))


def midpoints(numbers: Table) -> Table:
    """Where a number is nearer to the next of some sorted ones, float32."""
    return (numbers[:-1] + numbers[1:]) / np.float32(2)
