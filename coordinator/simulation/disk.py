# SPDX-License-Identifier: Apache-2.0
"""A device's disk with its page cache: what was not flushed may be lost, torn or kept.

Files are inodes, folders map names to them. What programs see is the cache; what survives a power
cut is `stable`. As on a journaling file system, changes of names become durable in order, at the
latest with `sync_folder`; the bytes of a file do with `put`, which flushes them before it returns.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coordinator.simulation.process import Process
from edge_sdk.files import Part


@dataclass(slots=True, eq=False)
class _File:
    data: bytes
    """As programs see it."""
    stable: bytes
    """As it is on the medium."""
    written_s: float


class _Change(NamedTuple):
    """A change of names that a power cut may undo: `file` is None for one taken away."""

    folder: str
    name: str
    file: _File | None
    gone: str | None
    """The old name, of a rename."""


class Disk:
    """One board's medium: it outlives the processes that use it, one at a time."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._folders: dict[str, dict[str, _File]] = {}
        self._stable: dict[str, dict[str, _File]] = {}
        self._changes: list[_Change] = []
        self._holder: Process | None = None
        self.is_full = False

    def of(self, process: Process) -> Mounted:
        """Return the disk as one process uses it."""
        return Mounted(self, process)

    def power_cut(self) -> str:
        """Lose what was not flushed, or some of it; say how much there was of it."""
        kept = self._rng.randint(0, len(self._changes))
        for change in self._changes[:kept]:
            _apply(self._stable, change)
        said = f"{len(self._changes) - kept} of {len(self._changes)} changes of names lost"
        self._changes = []
        self._folders = {folder: dict(files) for folder, files in self._stable.items()}
        torn = 0
        for files in self._folders.values():
            for file in files.values():
                if file.data != file.stable:
                    file.stable = file.data = self._torn(file)
                    torn += 1
        return f"{said}, {torn} files torn"

    def _torn(self, file: _File) -> bytes:
        draw = self._rng.random()
        if draw < 0.4:
            return file.stable
        if draw < 0.8:
            cut = file.data[: self._rng.randint(0, len(file.data))]
            return cut + bytes(len(file.data) - len(cut)) if draw < 0.6 else cut
        return file.data

    def folder(self, path: str) -> dict[str, _File]:
        """Return a folder's names. Raises: FileNotFoundError."""
        found = self._folders.get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return found

    def make(self, path: str) -> None:
        """Make a folder. It is durable at once: programs make theirs at their first start."""
        self._folders.setdefault(path, {})
        self._stable.setdefault(path, {})

    def change(self, path: Path, file: _File | None, gone: str | None = None) -> None:
        """Change a name, in the cache."""
        folder, name = cut(path)
        change = _Change(folder, name, file, gone)
        self.folder(folder)
        _apply(self._folders, change)
        self._changes.append(change)

    def sync(self, path: str) -> None:
        """Make the names of a folder durable."""
        left = []
        for change in self._changes:
            if change.folder == path:
                _apply(self._stable, change)
            else:
                left.append(change)
        self._changes = left

    def hold(self, process: Process) -> None:
        """Take the one lock there is. Raises: BlockingIOError."""
        if self._holder is not None and self._holder.is_alive and self._holder is not process:
            raise BlockingIOError(errno.EWOULDBLOCK, "held")
        self._holder = process

    def let_go(self) -> None:
        """Release the lock."""
        self._holder = None

    def check_room(self) -> None:
        """Raise OSError when the disk is full."""
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")


class Mounted:
    """A `Disk` (the port, `edge_sdk.files.Disk`) for one process, each call in steps."""

    def __init__(self, medium: Disk, process: Process) -> None:
        self._medium, self._process = medium, process

    def read(self, path: Path, most: int = -1) -> bytes:
        """Return a file's bytes, from the cache."""
        self._process.check()
        file = self._file(path)
        return file.data if most < 0 else file.data[:most]

    def put(self, path: Path, parts: tuple[Part, ...], mode: int) -> None:
        """Make a file: its name, its bytes, and the flush, a step each."""
        del mode
        self._process.step()
        file = _File(b"", b"", self._process.loop.now_s)
        self._medium.change(path, file)
        data = b"".join(bytes(part) for part in parts)
        half = len(data) // 2
        file.data = data[:half]
        self._medium.check_room()
        self._process.step()
        file.data = data
        self._process.step()
        file.stable = data

    def rename(self, path: Path, to: Path) -> None:
        """Rename."""
        self._process.step()
        self._medium.change(to, self._file(path), cut(path)[1])

    def unlink(self, path: Path) -> None:
        """Take a name away."""
        self._process.step()
        folder, name = cut(path)
        if name in self._medium.folder(folder):
            self._medium.change(path, None)

    def sync_folder(self, path: Path) -> None:
        """Make names durable."""
        self._process.step()
        self._medium.sync(str(path))

    def make_folder(self, path: Path) -> None:
        """Make a folder."""
        self._process.check()
        self._medium.make(str(path))

    def names(self, path: Path) -> list[str]:
        """List a folder."""
        self._process.check()
        return sorted(self._medium.folder(str(path)))

    def modified_s(self, path: Path) -> float:
        """Return when a file was written."""
        return self._file(path).written_s

    def lock(self, path: Path) -> Callable[[], None]:
        """Take the lock."""
        del path
        self._process.check()
        self._medium.hold(self._process)
        return self._medium.let_go

    def _file(self, path: Path) -> _File:
        folder, name = cut(path)
        file = self._medium.folder(folder).get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return file


def cut(path: Path) -> tuple[str, str]:
    """Return a path's folder and name: several times quicker than asking the path."""
    folder, _, name = str(path).rpartition("/")
    return folder, name


def _apply(folders: dict[str, dict[str, _File]], change: _Change) -> None:
    names = folders[change.folder]
    if change.file is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.file
    if change.gone is not None:
        names.pop(change.gone, None)
