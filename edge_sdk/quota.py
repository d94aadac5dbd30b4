# SPDX-License-Identifier: Apache-2.0
"""How much of the disk a device may take, looked at before a write makes it more.

All that it keeps counts: models, updates, examples (the whole ring, also before it is full), what
a training leaves, and the journal. What nobody needs goes first: damaged files that were set aside,
then old pages of the journal. Where nothing more can go, there is no room, and no training; the
model goes on answering. Some of the file system is always left to others.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from edge_sdk.errors import StoreError

LEFT_TO_OTHERS = 128 << 10
"""Bytes of the file system that are never taken."""
DAMAGED = ".damaged"
JOURNAL = "why"


class Quota:
    """The room of one state folder; `most` bytes in all, None for what the disk has.

    `is_real`: whether the folder is on the machine's disk, as it is but in simulations.
    """

    def __init__(self, folder: Path, most: int | None = None, *, is_real: bool = True) -> None:
        self._folder, self.most, self._is_real = folder, most, is_real
        self._rings: dict[Path, int] = {}

    @property
    def used(self) -> int:
        """Bytes that are taken, or spoken for."""
        found = dict(_sizes(self._folder)) if self._is_real else {}
        return sum((found | {p: max(n, found.get(p, 0)) for p, n in self._rings.items()}).values())

    @property
    def left(self) -> float:
        """Bytes that may yet be taken; infinite where nobody knows."""
        if not self._is_real:
            return math.inf
        allowed = math.inf if self.most is None else self.most - self.used
        return min(allowed, _free(self._folder) - LEFT_TO_OTHERS)

    def speak_for(self, ring: Path, size: int) -> None:
        """Count a ring of examples as large as it will be."""
        self._rings = {ring: size}

    def make_room(self, size: int) -> None:
        """Delete what nobody needs until `size` bytes fit.

        Raises: StoreError when they do not even so.
        """
        for path in self._spare():
            if self.left >= size:
                return
            with contextlib.suppress(OSError):
                path.unlink()
        if (left := self.left) < size:
            raise StoreError(
                f"expected room for {size} bytes in {self._folder}, there is room for "
                f"{max(0, int(left))}; free some space or raise max_disk_bytes"
            )

    def _spare(self) -> Iterator[Path]:
        if not self._is_real or self.left == math.inf:
            return
        damaged = [p for p, _ in _sizes(self._folder) if DAMAGED in p.name]
        pages = sorted(p for p, _ in _sizes(self._folder / JOURNAL))
        yield from (*damaged, *pages[:-1])


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            with contextlib.suppress(OSError):  # gone meanwhile
                yield path, path.lstat().st_size


def _free(folder: Path) -> float:
    try:
        found = os.statvfs(folder)
    except OSError:
        return math.inf
    return float(found.f_bavail * found.f_frsize)
