# SPDX-License-Identifier: Apache-2.0
"""Operators that lay patches or whole images into another frame."""

from __future__ import annotations

import math

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, vjp
from edge_sdk.errors import CompileError


@vjp("Col2Im")
def _col2im(e: Emit, n: Node, g: str) -> Grads:
    """Cut the patches out again: a grouped convolution with one filter for each place in a patch.

    Input [N, C * taps, L], output [N, C, *image].
    """
    block, channels = e.value(n.inputs[2]), e.dims(n.outputs[0])[1]
    if block is None or channels is None or e.dims(n.inputs[0])[2] is None:
        raise CompileError(f"expected constant sizes in {n.label}, got computed ones")
    kernel = [int(k) for k in block]
    taps = math.prod(kernel)
    filters = np.tile(np.eye(taps), (channels, 1)).reshape(channels * taps, 1, *kernel)
    kept = ("dilations", "pads", "strides")
    frame = {k: v for k, v in n.attributes.items() if k in kept}
    patches = e.Conv(g, e.const(filters), group=channels, **frame)
    return (e.Reshape(patches, e.ints(-1, channels * taps, e.dims(n.inputs[0])[2] or 0)),)


@vjp("CenterCropPad")
def _center_crop_pad(e: Emit, n: Node, g: str) -> Grads:
    """Crop what was padded and pad what was cropped: the centre is the same both ways."""
    x = n.inputs[0]
    axes = n.attr("axes") or tuple(range(e.rank(x)))
    sizes = e.Gather(e.size(x), e.ints(*[axis % e.rank(x) for axis in axes]))
    return (e.declare(e.CenterCropPad(g, sizes, axes=axes), e.dims(x)),)


@vjp("CastLike")
def _cast_like(e: Emit, n: Node, g: str) -> Grads:
    source, target = e.dtype(n.inputs[0]), e.dtype(n.outputs[0])
    return (g if source == target or source is None else e.Cast(g, to=source),)
