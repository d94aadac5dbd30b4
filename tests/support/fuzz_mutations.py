# SPDX-License-Identifier: Apache-2.0
"""Seeds changed at random, by the ways that break decoders: for runs that nothing guides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

WORDS = tuple(
    value.to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 2**7, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
)


def mutations(seeds: Sequence[bytes], seed: int, most: int = 4096) -> Iterator[bytes]:
    """Yield changed seeds for ever; the same `seed` gives the same ones."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    while True:
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 6)):
            _change(data, seeds, draw)
        yield bytes(data[: max(most, len(seeds[0]))])


def _change(data: bytearray, seeds: Sequence[bytes], draw: random.Random) -> None:
    at, size = draw.randrange(len(data) + 1), draw.randint(1, 16)
    match draw.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            word = draw.choice(WORDS)
            data[at : at + len(word)] = word
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = draw.randbytes(size)
        case 4:
            data[at : at + size] = draw.randbytes(size)
        case 5:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            data[at : at + 4 * size] = other[start : start + 4 * size]
        case _:
            del data[at:]
