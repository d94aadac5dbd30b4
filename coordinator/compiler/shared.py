# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a bundle's members may occur in others: weights, each stored once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from coordinator.compiler.wire import raw_data_places
from edge_sdk import splices, tflitefile
from edge_sdk.bundle import PARAMS
from edge_sdk.splices import Span


def spans(members: Mapping[str, bytes], shapes: Sequence[Sequence[int]]) -> dict[str, list[Span]]:
    """Return where weights lie in each member; `shapes` are those of the parameters."""
    found = {name: _spans(name, data) for name, data in members.items()}
    sizes = [4 * math.prod(shape) for shape in shapes]
    starts = itertools.accumulate(sizes, initial=0)
    return found | {PARAMS: list(zip(starts, sizes, strict=False))}


def stored_bytes(members: Mapping[str, bytes], shapes: Sequence[Sequence[int]]) -> int:
    """Return what a bundle takes to store members."""
    stored, _ = splices.split(members, spans(members, shapes))
    return sum(map(len, stored.values()))


def _spans(name: str, data: bytes) -> list[Span]:
    places: Iterable[Span] = ()
    if name.endswith(".onnx"):
        places = raw_data_places(data).values()
    elif name.endswith(".tflite"):
        places = {(b.offset, b.size) for b in tflitefile.read(data).buffers if b.size}
    return [(offset, size) for offset, size in places]
