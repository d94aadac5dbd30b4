# SPDX-License-Identifier: Apache-2.0
"""How many updates one core decodes and folds in a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coordinator import sums
from coordinator.bench.codec import CODECS, best_ms, heavy, shapes_of
from edge_sdk import codec, params
from edge_sdk.types import Shapes

DEVICES = 8
NAMES = ("top_k 1 %, int8", "lean", "default", "stateless-lean", "stateless", "dense")


def measure(
    count: int = 1_000_000, repeat: int = 9, names: tuple[str, ...] = NAMES
) -> list[Mapping[str, Any]]:
    """Decode and fold the updates of eight devices, `count` numbers each; the best of several runs.

    `copy_ms` is what copying the model once takes on this machine: the yardstick of its memory.
    """
    shapes = shapes_of(count)
    copy_ms, _ = best_ms(np.zeros(count, np.float32).copy, repeat)
    return [{**_measure(name, count, shapes, repeat), "copy_ms": copy_ms} for name in names]


def _measure(name: str, count: int, shapes: Shapes, repeat: int) -> dict[str, Any]:
    blobs = [_encode(name, count, shapes, seed) for seed in range(DEVICES)]
    state = sums.init(count)

    def fold() -> None:
        nonlocal state
        for examples, blob in enumerate(blobs, 1):
            update = codec.lattice(blob, shapes)
            state = sums.add(state, update, sums.weight_of(examples))

    total_ms, _ = best_ms(fold, repeat)
    size = sum(map(len, blobs)) / DEVICES
    result_ms, _ = best_ms(lambda: sums.mean(state), repeat)
    return {
        "codec": name,
        "params": count,
        "bytes": round(size),
        "updates_per_s": 1000 * DEVICES / total_ms,
        "wire_mb_per_s": size * DEVICES / total_ms / 1000,
        "result_ms": result_ms,
    }


def _encode(name: str, count: int, shapes: Shapes, seed: int) -> bytes:
    c = codec.from_spec(CODECS[name])
    delta = params.unflatten(heavy(count, seed), shapes)
    return c.encode(delta, c.init(shapes, seed=seed))[0]
