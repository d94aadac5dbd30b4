# SPDX-License-Identifier: Apache-2.0
"""One bit a number: a randomised Hadamard rotation, its signs, one scale a chunk (EDEN-1b).

After Vargaftik et al., "EDEN: communication-efficient and robust distributed mean estimation"
(2022): `y = H D x`, send `sign(y)` and `|y|^2 / |y|_1`, which makes the estimate unbiased. `D` is a
diagonal of random signs from SHAKE-128 of a key. The numbers are cut into power-of-two chunks.
Chunk `j` of the first group is every n-th number, so all tensors share in all chunks and no number
dominates one. Chunks under 4096 are rotated twice, since one rotation of few numbers is far from
random. Restoring adds and subtracts integers only, so every machine restores the same lattice.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec.steps import round_step
from edge_sdk.types import Array

Number = TypeVar("Number", np.float32, np.int32)
KEY_BYTES = 16
CHUNK = 2**16
SMALLEST = 64
TWICE_BELOW = 4096
MAX_SCALE = 2**14 - 1


class Rotated(NamedTuple):
    """A delta as signs: number of chunks scales, one sign for each padded number."""

    key: bytes
    step: float
    scales: NDArray[np.int32]  # [chunks], 0..MAX_SCALE
    negative: NDArray[np.bool_]  # [padded]


class Group(NamedTuple):
    """Interleaved chunks of one size: number `i` of chunk `j` is at `i * columns + j`."""

    at: int
    size: int
    columns: int


def groups(count: int) -> list[Group]:
    """Cut `count` numbers into chunks: of 65,536 first, then by halves; the last is padded."""
    found, at, size = [], 0, CHUNK
    while at < count:
        left = count - at
        if left >= size or size == SMALLEST:
            columns = max(1, left // size)
            found.append(Group(at, size, columns))
            at += size * columns
        size = max(SMALLEST, size // 2)
    return found


def chunks_of(count: int) -> int:
    """Return how many chunks `count` numbers make."""
    return sum(g.columns for g in groups(count))


def padded(count: int) -> int:
    """Return how many signs `count` numbers take: at most 63 more."""
    return sum(g.columns * g.size for g in groups(count))


def rotate(flat: Array, key: bytes, uniform: Array) -> Rotated:
    """Rotate and keep the signs.

    Args:
        flat: float32 `[n]`, finite.
        key: 16 bytes that choose the rotation; a fresh one for each update.
        uniform: float32 `[chunks]` in [0, 1): rounds the scales without bias.
    """
    total = padded(flat.size)
    turned = np.zeros(total, np.float32)
    turned[: flat.size] = flat
    layout = groups(flat.size)
    flips = _flips(key, layout)
    scales = []
    for g in layout:
        block = turned[g.at : g.at + g.size * g.columns].reshape(g.size, g.columns)
        for flip in flips.of(g):
            block *= flip
            transform(block)
        scales.append(_scales(block, g))
    scale = np.concatenate(scales) if scales else np.zeros(0)
    step = round_step(float(scale.max(initial=0.0)) / (MAX_SCALE - 1), up=True)
    levels = np.minimum(np.floor(scale / step + uniform), MAX_SCALE).astype(np.int32)
    return Rotated(key, step, levels, turned < 0)


def restore(rotated: Rotated, count: int) -> NDArray[np.int32]:
    """Return the integers that the signs stand for: int32 `[count]`, to be scaled by the step."""
    signs = signs_of(rotated.negative).astype(np.int32)
    layout = groups(count)
    flips = _flips(rotated.key, layout)
    chunk = 0
    for g in layout:
        block = signs[g.at : g.at + g.size * g.columns].reshape(g.size, g.columns)
        for flip in reversed(flips.of(g)):
            transform(block)
            block *= flip
        block *= rotated.scales[chunk : chunk + g.columns]
        chunk += g.columns
    return signs[:count]


def transform(block: NDArray[Number]) -> None:
    """Apply the unnormalised Walsh-Hadamard transform to each column, in place."""
    size, columns = block.shape
    half = 1
    while half < size:
        pairs = block.reshape(size // (2 * half), 2, half * columns)
        low, high = pairs[:, 0], pairs[:, 1]
        low += high
        high *= -2
        high += low
        half *= 2


def signs_of(negative: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return -1 where `negative`, else 1: a product with these beats a masked negation by far."""
    return 1 - 2 * negative.view(np.int8)


class _Flips(NamedTuple):
    """Random signs, 1 or -1: for all numbers, and again for those rotated twice."""

    first: NDArray[np.int8]
    second: NDArray[np.int8]

    def of(self, group: Group) -> list[NDArray[np.int8]]:
        numbers, shape = group.size * group.columns, (group.size, group.columns)
        once = self.first[group.at : group.at + numbers].reshape(shape)
        if group.size >= TWICE_BELOW:
            return [once]
        at = group.at - (self.first.size - self.second.size)
        return [once, self.second[at : at + numbers].reshape(shape)]


def _flips(key: bytes, layout: list[Group]) -> _Flips:
    total = sum(g.size * g.columns for g in layout)
    twice = sum(g.size * g.columns for g in layout if g.size < TWICE_BELOW)
    stream = hashlib.shake_128(b"fedge-rotation-1\0" + key).digest((total + twice + 7) // 8)
    flips = np.unpackbits(np.frombuffer(stream, np.uint8), count=total + twice, bitorder="little")
    signs = signs_of(flips.view(np.bool_))
    return _Flips(signs[:total], signs[total:])


def _scales(block: Array, group: Group) -> NDArray[np.float64]:
    """Return, for each chunk, the unbiased scale of its restored integers."""
    energy = np.einsum("ij,ij->j", block, block).astype(np.float64)
    total = np.abs(block).sum(axis=0, dtype=np.float64)
    ratio = np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
    return cast(
        "NDArray[np.float64]", ratio / float(group.size) ** (1 if group.size >= TWICE_BELOW else 2)
    )
