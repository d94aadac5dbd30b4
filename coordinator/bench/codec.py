# SPDX-License-Identifier: Apache-2.0
"""What an update costs: bytes, error and milliseconds of each codec on two kinds of delta."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from edge_sdk import codec, params
from edge_sdk.codec import BiasedCodec, positions
from edge_sdk.types import Array, Params, Shapes

T = TypeVar("T")
CODECS: dict[str, list[list[object]]] = {
    "top_k 1 %, int8": [["ef"], ["top_k", 0.01], ["int8"]],
    **codec.PRESETS,
}


def measure(
    count: int = 1_000_000, repeat: int = 9, names: tuple[str, ...] = tuple(CODECS)
) -> list[Mapping[str, Any]]:
    """Encode and decode a delta of `count` numbers with each codec; times are the best of several.

    `heavy` is Student-t with three degrees of freedom and 30 % exact zeros, as local SGD leaves it;
    `flat` is Gaussian, close to what local Adam leaves. `error` is the energy of what one update
    misses over that of the delta: with error feedback it is sent later, without bias it averages
    out over a cohort.
    """
    shapes = shapes_of(count)
    rows: list[Mapping[str, Any]] = []
    for kind, flat in (("heavy", heavy(count)), ("flat", gaussian(count))):
        delta = params.unflatten(flat, shapes)
        rows += [_measure(kind, name, delta, shapes, repeat) for name in names]
    return rows


def measure_positions(count: int = 1_000_000, seed: int = 0) -> list[Mapping[str, Any]]:
    """Return what uniform positions cost at several densities, next to their entropy."""
    rng = np.random.default_rng(seed)
    rows: list[Mapping[str, Any]] = []
    for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.45):
        k = round(share * count)
        found = np.sort(rng.choice(count, k, replace=False))
        coding, packed = positions.pack(found, count, shapes_of(count))
        bound = _log2_choose(count, k) / k
        row = {"density": share, "coding": coding, "bits": 8 * len(packed) / k, "bound": bound}
        rows.append({**row, "over_percent": 100 * (row["bits"] / bound - 1)})
    return rows


def shapes_of(count: int) -> Shapes:
    """Return shapes of about a thousand rows, a vector beside them, `count` numbers together."""
    width = max(1, count // 1250)
    return {"weight": (1000, width), "bias": (count - 1000 * width,)}


def heavy(count: int, seed: int = 0) -> Array:
    """Return a heavy-tailed delta: float32 `[count]`, 30 % of it zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, count).astype(np.float32) * np.float32(1e-3)
    values[rng.random(count) < 0.3] = 0
    return values


def gaussian(count: int, seed: int = 0) -> Array:
    """Return a delta without tails: float32 `[count]`."""
    return np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(1e-3)


def best_ms(call: Callable[[], T], repeat: int) -> tuple[float, T]:
    """Return the shortest time of several calls in milliseconds, and what the last returned."""
    shortest, result = math.inf, None
    for _ in range(max(1, repeat)):
        start = time.perf_counter_ns()
        result = call()
        shortest = min(shortest, (time.perf_counter_ns() - start) / 1e6)
    return shortest, result  # type: ignore[return-value] # called at least once


def _measure(kind: str, name: str, delta: Params, shapes: Shapes, repeat: int) -> Mapping[str, Any]:
    c = codec.from_spec(CODECS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedCodec)
        state = c.init(shapes, seed=1)
    encode_ms, (blob, _) = best_ms(lambda: c.encode(delta, state), repeat)
    decode_ms, lattice = best_ms(lambda: codec.lattice(blob, shapes), repeat)
    flat = params.flatten(delta, shapes).astype(np.float64)
    gap = params.flatten(c.decode(blob, shapes), shapes) - flat
    return {
        "delta": kind,
        "codec": name,
        "params": flat.size,
        "density": int(np.count_nonzero(lattice.q)) / flat.size,
        "bytes": len(blob),
        "ratio": 4 * flat.size / len(blob),
        "bits_per_param": 8 * len(blob) / flat.size,
        "error": float(gap @ gap / (flat @ flat)),
        "encode_ms": encode_ms,
        "decode_ms": decode_ms,
    }


def _log2_choose(count: int, k: int) -> float:
    logs = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
    return logs / math.log(2)
