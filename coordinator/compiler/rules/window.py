# SPDX-License-Identifier: Apache-2.0
"""The geometry that convolutions and poolings share: windows, taps, layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from edge_sdk.errors import CompileError

Ints = tuple[int, ...]


class Window(NamedTuple):
    """A sliding window over spatial dimensions, its padding explicit; one entry per dimension."""

    kernel: Ints
    strides: Ints
    dilations: Ints
    begins: Ints
    ends: Ints
    size: Ints
    out: Ints

    @property
    def extents(self) -> Ints:
        """Return how many elements the window spans, dilation included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def pads(self) -> Ints:
        """Return ONNX's pads attribute: all begins, then all ends."""
        return (*self.begins, *self.ends)

    @property
    def spare(self) -> Ints:
        """Return how many elements the last window leaves over; negative if it hangs over."""
        rows = zip(
            self.size, self.begins, self.ends, self.out, self.strides, self.extents, strict=True
        )
        return tuple(size + b + f - ((o - 1) * s + x) for size, b, f, o, s, x in rows)

    @property
    def taps(self) -> int:
        """Return the number of elements under the window."""
        return math.prod(self.kernel)

    @property
    def is_plain(self) -> bool:
        """Tell whether the windows tile the input one element each: a 1x1 kernel at stride 1."""
        return self.taps == 1 and not any(self.pads) and set(self.strides) == {1}

    @property
    def is_tiling(self) -> bool:
        """Tell whether the windows lie side by side, with nothing padded and none hanging over."""
        plain = set(self.dilations) == {1} and not any(self.pads)
        return plain and self.kernel == self.strides and min(self.spare) >= 0

    @property
    def is_flippable(self) -> bool:
        """Tell whether a stride-1 convolution undoes it: the padding lies within the extent."""
        rows = zip(self.extents, self.begins, self.ends, strict=True)
        return set(self.strides) == {1} and all(x > b and x > f for x, b, f in rows)


class Layer(NamedTuple):
    """A convolution x [N, C, *size] * w [K, C/group, *kernel] -> y [N, K, *out]."""

    batch: int | None
    channels: int
    filters: int
    group: int
    window: Window

    @property
    def is_depthwise(self) -> bool:
        """Tell whether each channel has one filter of its own."""
        return self.group == self.channels == self.filters > 1


def spatial(e: Emit, n: Node, x: str) -> Ints:
    """Return the known spatial sizes of [N, C, ...]; raise CompileError where one is unknown."""
    sizes = e.dims(x)[2:]
    if None in sizes:
        raise CompileError(
            f"expected known spatial sizes in {n.label}, got {e.dims(x)}: "
            "give the model's input a fixed shape but for the batch"
        )
    return tuple(size for size in sizes if size is not None)


def window_of(e: Emit, n: Node, kernel: Ints) -> Window:
    """Read the window of a Conv or pooling node."""
    rank = len(kernel)
    strides = tuple(n.attr("strides") or (1,) * rank)
    dilations = tuple(n.attr("dilations") or (1,) * rank)
    size, out = spatial(e, n, n.inputs[0]), spatial(e, n, n.outputs[0])
    begins, ends = (0,) * rank, (0,) * rank
    mode = n.attr("auto_pad", "NOTSET")
    if mode == "NOTSET" and n.attr("pads"):
        pads = tuple(n.attr("pads"))
        begins, ends = pads[:rank], pads[rank:]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        loose = Window(kernel, strides, dilations, begins, ends, size, out)
        total = [max(-spare, 0) for spare in loose.spare]
        small = tuple(t // 2 for t in total)
        large = tuple(t - t // 2 for t in total)
        begins, ends = (small, large) if mode == "SAME_UPPER" else (large, small)
    return Window(kernel, strides, dilations, begins, ends, size, out)


def padded(e: Emit, x: str, w: Window, first: int = 2) -> str:
    """Pad the spatial dimensions (from axis `first` on) with zeros, as the window sees them."""
    ends = [max(b - min(s, 0), 0) for b, s in zip(w.ends, w.spare, strict=True)]
    if not any((*w.begins, *ends)):
        return x
    axes = range(first, first + len(w.kernel))
    return e.Pad(x, e.ints(*w.begins, *ends), None, e.ints(*axes))


def tap_slices(e: Emit, x: str, w: Window, first: int = 2) -> Iterator[str]:
    """Yield what each tap sees of the padded `x`, in row-major order, each of size `out`."""
    axes = e.ints(*range(first, first + len(w.kernel)))
    for tap in itertools.product(*map(range, w.kernel)):
        starts = [t * d for t, d in zip(tap, w.dilations, strict=True)]
        ends = [a + (o - 1) * s + 1 for a, o, s in zip(starts, w.out, w.strides, strict=True)]
        yield e.Slice(x, e.ints(*starts), e.ints(*ends), axes, e.ints(*w.strides))


def seen_places(w: Window) -> NDArray[np.int64]:
    """Return where in the flattened input each tap of each window looks: [*out, *kernel] indices.

    What lies outside is the place after the last.
    """
    rank = len(w.kernel)
    flat = np.zeros((1,) * 2 * rank, np.int64)
    met = np.ones((1,) * 2 * rank, np.bool_)
    for axis, size in enumerate(w.size):
        starts = np.arange(w.out[axis]) * w.strides[axis] - w.begins[axis]
        seen = starts[:, None] + np.arange(w.kernel[axis]) * w.dilations[axis]
        shape = [1] * 2 * rank
        shape[axis], shape[rank + axis] = seen.shape
        seen = seen.reshape(shape)
        flat = flat * size + seen
        met = met & (seen >= 0) & (seen < size)
    return np.where(met, flat, math.prod(w.size))


def transposed(e: Emit, g: str, weights: str, w: Window, group: int) -> str:
    """Return the transposed convolution that takes [N, K, *out] back to [N, C, *size]."""
    ends = tuple(b - min(s, 0) for b, s in zip(w.ends, w.spare, strict=True))
    return e.ConvTranspose(
        g,
        weights,
        kernel_shape=w.kernel,
        strides=w.strides,
        dilations=w.dilations,
        pads=(*w.begins, *ends),
        output_padding=tuple(max(s, 0) for s in w.spare),
        group=group,
    )


def swapped_ends(w: Window) -> Ints:
    """Return the end padding of the convolution of x with g that finds the filter's gradient."""
    return tuple(max(f - max(s, 0), 0) for f, s in zip(w.ends, w.spare, strict=True))


def swapped_out(w: Window) -> Ints:
    """Return the output size of that convolution: at least the kernel's."""
    rows = zip(w.size, w.begins, swapped_ends(w), w.out, w.strides, w.dilations, strict=True)
    return tuple((size + b + f - (o - 1) * s - 1) // d + 1 for size, b, f, o, s, d in rows)


def counts(w: Window, *, include_pad: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return how many elements an average pooling divides each output by, as an array [*out].

    With `include_pad` the padding counts, but nothing beyond it (where ceil_mode lets a window hang
    over).
    """
    total = np.ones((), np.float32)
    for axis, out in enumerate(w.out):
        low = -w.begins[axis] if include_pad else 0
        high = w.size[axis] + (w.ends[axis] if include_pad else 0)
        starts = np.arange(out) * w.strides[axis] - w.begins[axis]
        taps = starts[:, None] + np.arange(w.kernel[axis]) * w.dilations[axis]
        inside = ((taps >= low) & (taps < high)).sum(axis=1)
        total = np.multiply.outer(total, inside.astype(np.float32))
    return total
