# SPDX-License-Identifier: Apache-2.0
"""One bit a number: a randomised Hadamard rotation, its signs, one scale a chunk (EDEN-1b).

After Vargaftik et al., "EDEN: communication-efficient and robust distributed mean estimation"
(2022): rotate, send the signs and `|y|^2 / |y|_1`, which makes the estimate unbiased. The rotation
is `y = H E H D x`, with random signs D and E from SHAKE-128 of a key; one `H D` alone would let a
single large number hide all others of its chunk. Restoring adds and subtracts integers only, so
every machine restores the same lattice.

The numbers are cut into chunks of 4096, and what is left over by halves down to 64. Of `n` chunks
of 4096, chunk `j` takes every n-th number from `j` on: no tensor has a chunk to itself, and numpy
adds long runs.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.codec.steps import round_step
from edge_sdk.types import Array

Number = TypeVar("Number", np.float32, np.int32)
KEY_BYTES = 16
CHUNK = 4096
SMALLEST = 64
MAX_SCALE = 4095
"""With it, no restored integer passes 2**30: CHUNK**1.5 * MAX_SCALE."""


class Rotated(NamedTuple):
    """A delta as signs: one scale for each chunk, one sign for each padded number."""

    key: bytes
    step: float
    scales: NDArray[np.int32]  # [chunks], 0..MAX_SCALE
    negative: NDArray[np.bool_]  # [padded]


class Group(NamedTuple):
    """Interleaved chunks of one size: number `i` of chunk `j` is at `i * columns + j`."""

    at: int
    size: int
    columns: int

    @property
    def end(self) -> int:
        """Where the next group begins."""
        return self.at + self.size * self.columns

    @property
    def factor(self) -> int:
        """What makes the integers of smaller chunks as large as those of a whole one."""
        return CHUNK // self.size


def groups(count: int) -> list[Group]:
    """Cut `count` numbers into chunks: of 4096 first, then by halves; the last is padded."""
    found: list[Group] = []
    at, size = 0, CHUNK
    while at < count:
        left = count - at
        if left >= size or size == SMALLEST:
            found.append(Group(at, size, max(1, left // size)))
            at = found[-1].end
        size = max(SMALLEST, size // 2)
    return found


def chunks_of(count: int) -> int:
    """Return how many chunks `count` numbers make."""
    return sum(group.columns for group in groups(count))


def padded(count: int) -> int:
    """Return how many signs `count` numbers take: at most 63 more."""
    return groups(count)[-1].end if count else 0


def rotate(flat: Array, key: bytes, uniform: Array) -> Rotated:
    """Rotate, and keep the signs and a scale for each chunk.

    Args:
        flat: float32 `[n]`, finite.
        key: 16 bytes that choose the rotation; fresh ones for each update.
        uniform: float32 `[chunks]` in [0, 1): rounds the scales without bias.
    """
    turned = np.zeros(padded(flat.size), np.float32)
    turned[: flat.size] = flat
    first, second = _diagonals(key, turned.size)
    layout = groups(flat.size)
    _transform_all(turned, layout, first)
    _transform_all(turned, layout, second)
    scales = np.concatenate([np.zeros(0), *(_scales(turned, group) for group in layout)])
    step = round_step(float(scales.max(initial=0.0)) / (MAX_SCALE - 1), up=True)
    levels = np.minimum(np.floor(scales / step + uniform), MAX_SCALE).astype(np.int32)
    return Rotated(key, step, levels, turned < 0)


def restore(rotated: Rotated, count: int) -> NDArray[np.int32]:
    """Return the integers that the signs stand for: int32 `[count]`, to be scaled by the step."""
    numbers = signs_of(rotated.negative).astype(np.int32)
    first, second = _diagonals(rotated.key, numbers.size)
    layout = groups(count)
    _transform_all(numbers, layout)
    numbers *= second
    _transform_all(numbers, layout)
    numbers *= first
    chunk = 0
    for group in layout:
        scales = rotated.scales[chunk : chunk + group.columns] * np.int32(group.factor)
        numbers[group.at : group.end].reshape(group.size, group.columns)[:] *= scales
        chunk += group.columns
    return numbers[:count]


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


def _transform_all(
    numbers: NDArray[Number], layout: list[Group], signs: NDArray[np.int8] | None = None
) -> None:
    if signs is not None:
        numbers *= signs
    for group in layout:
        transform(numbers[group.at : group.end].reshape(group.size, group.columns))


def _diagonals(key: bytes, total: int) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Return two lists of random signs, D and E of the rotation."""
    stream = hashlib.shake_128(b"fedge-rotation-1\0" + key).digest((2 * total + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=2 * total, bitorder="little")
    signs = signs_of(bits.view(np.bool_))
    return signs[:total], signs[total:]


def _scales(turned: Array, group: Group) -> NDArray[np.float64]:
    """Return, for each chunk, the scale that makes its restored integers unbiased."""
    block = turned[group.at : group.end].reshape(group.size, group.columns)
    energy = np.einsum("ij,ij->j", block, block).astype(np.float64)
    total = np.abs(block).sum(axis=0, dtype=np.float64)
    ratio = np.divide(energy, total, out=np.zeros_like(energy), where=total > 0)
    scales: NDArray[np.float64] = ratio / (group.size**2 * group.factor)
    return scales
