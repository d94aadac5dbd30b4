# SPDX-License-Identifier: Apache-2.0
"""How LiteRT's integer kernels round where QuantizeLinear would do otherwise.

Each function changes numbers by a fraction of the output's step, before they are rounded, so that
the integers come out as the kernel's. Gradients pass unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.tflite.forward import Forward

_RATIOS = (2.0**-8, 2.0**7)
_SIMPLE = 16
_MOST = 8
"""Integers out of 256 that are put right one by one; more would be another formula."""


def away_from_zero(f: Forward, y: int, value: str, count: int, zero: int = 0) -> str:
    """Push means that lie halfway between two integers away from the number 0, or integer `zero`.

    Means of `count` integers are ``1 / count`` apart: a quarter of that decides every tie and moves
    nothing else.
    """
    step = float(f.tensor(y).scale[0])
    nudge = step / (4 * count)
    offset = f.e.Add(value, f.e.const(step * zero)) if zero else value
    signed = f.e.Mul(offset, f.e.const(1 / count))
    return f.e.Add(value, f.e.Clip(signed, f.e.const(-nudge), f.e.const(nudge)))


def upwards(f: Forward, y: int, value: str, part: float = 1 / 1024) -> str:
    """Push numbers that lie halfway between two integers, or a `part` below, to the larger one.

    By default less than kernels of 8 bits after the point tell apart.
    """
    return f.e.Add(value, f.e.const(float(f.tensor(y).scale[0]) * part))


def has_ties(f: Forward, inputs: tuple[int, ...], y: int) -> bool:
    """Tell whether sums often lie halfway: steps of inputs are simple fractions of the output's."""
    step = float(f.tensor(y).scale[0])
    parts = [float(f.tensor(i).scale[0]) / step * _SIMPLE for i in inputs]
    return all(abs(part - round(part)) < 1e-4 for part in parts)


def twice(f: Forward, y: int, value: str, real: float | NDArray[Any]) -> str:
    """Round as a fixed-point product does: to the bits that it keeps first, then to integers.

    What the first rounding puts onto a half, the second takes away from zero: numbers up to half a
    bit below a half are rounded up.

    Args:
        f: the graph.
        y: the tensor about to be written.
        value: its numbers.
        real: the product's multiplier, of integers; one for all, or an array that broadcasts.
    """
    reals = np.asarray(real, np.float64)
    bits = np.array([max(-fixed_point(float(r))[1], 0) for r in reals.flat]).reshape(reals.shape)
    parts = np.where(bits > 0, 0.999 * 2.0 ** -(bits + 1.0), 0.0)
    most = float(parts.max(initial=0))
    if not most:
        return value
    size = parts * float(f.tensor(y).scale[0])
    steep = f.e.Mul(value, f.e.const(most / (0.5 - most)))
    if not size.ndim:
        nudge = f.e.Clip(steep, f.e.const(-size), f.e.const(size))
    else:
        nudge = f.e.Max(f.e.Min(steep, f.e.const(size)), f.e.const(-size))
    return f.e.Add(value, nudge)


def coarse(f: Forward, x: int, y: int, value: str) -> str:
    """Scale as kernels do that multiply by a number of 8 bits after the point, ties upwards.

    Args:
        f: the graph.
        x: the tensor that is read.
        y: the one about to be written.
        value: numbers of `x`.
    """
    a, b = f.tensor(x), f.tensor(y)
    ratio = np.float32(a.scale[0]) / np.float32(b.scale[0])
    if a.dtype != b.dtype or not _RATIOS[0] <= ratio <= _RATIOS[1]:
        return value
    step = float(b.scale[0])
    factor = float(np.rint(ratio * 256)) / 256 * step / float(a.scale[0])
    scaled = value if factor == 1.0 else f.e.Mul(value, f.e.const(factor))
    return upwards(f, y, scaled)


def rounded_slope(f: Forward, x: int, y: int, slope: float) -> float:
    """Return the slope of negative numbers as such a kernel has it, next to that of positive."""
    ratio = np.float32(f.tensor(x).scale[0]) / np.float32(f.tensor(y).scale[0])
    most = float(np.rint(ratio * 256))
    return float(np.rint(ratio * np.float32(slope) * 256)) / most if most else slope


def by_code(
    f: Forward, x: int, y: int, value: str, tables: tuple[NDArray[Any], NDArray[Any]]
) -> str:
    """Put right the few input integers for which a kernel's table says something else.

    Args:
        f: the graph.
        x: the tensor that is read.
        y: the one about to be written.
        value: a function of `x`.
        tables: for each integer of `x`, from the least, what the kernel makes of it, and what
            `value` is rounded to.
    """
    theirs, ours = tables
    codes = np.flatnonzero(theirs != ours)
    if not 0 < len(codes) <= _MOST:
        return value
    a, step = f.tensor(x), float(f.tensor(y).scale[0])
    layout = f.layout(x, rank=f.rank(x))
    least = np.iinfo(a.dtype).min
    nudge = f.e.const(0.0)
    for code in codes:
        number = np.float32(int(code) + least - int(a.zero_point[0])) * a.scale[0]
        is_code = f.e.Equal(f.read(x, layout), f.e.const(number))
        by = (int(theirs[code]) - int(ours[code])) * step / 2
        nudge = f.e.Where(is_code, f.e.const(by), nudge)
    return f.e.Add(value, nudge)


def lattice(f: Forward, x: int, y: int, function: Callable[[Any], Any]) -> NDArray[Any]:
    """Return what a float32 function makes of each integer of `x`, as integers of `y`."""
    a, b = f.tensor(x), f.tensor(y)
    ends = np.iinfo(b.dtype)
    numbers = (codes(a.dtype) - int(a.zero_point[0])).astype(np.float32) * a.scale[0]
    steps = np.rint(function(numbers) / b.scale[0]) + int(b.zero_point[0])
    whole: NDArray[Any] = np.clip(steps, ends.min, ends.max).astype(np.int64)
    return whole


def codes(dtype: str) -> NDArray[np.int64]:
    """Return every integer of a dtype of 8 bits, in order."""
    ends = np.iinfo(dtype)
    return np.arange(ends.min, ends.max + 1, dtype=np.int64)


def fixed_point(real: float) -> tuple[int, int]:
    """Return a multiplier as 31 bits after the point, and the power of two that goes with it."""
    fraction, exponent = frexp(real)
    number = int(np.floor(fraction * (1 << 31) + 0.5))
    return (number // 2, exponent + 1) if number == 1 << 31 else (number, exponent)
