# SPDX-License-Identifier: Apache-2.0
"""Whole files on disk, durably: after `write` returns the new bytes survive a power cut.

A reader sees the old file or the new one, never a mixture: write beside, fsync, rename, fsync the
folder. Holds paths and bytes only; what they mean is the caller's business. The disk itself is a
port: `SYSTEM` is the machine's, and a simulation has one that loses what was not flushed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from edge_sdk.errors import StoreError

_SUFFIX = ".tmp"
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.EACCES}
LOCK_TRIES, LOCK_PAUSE_S = 3, 0.02

Part: TypeAlias = bytes | bytearray | memoryview


class Disk(Protocol):
    """Where files are. Power may fail before, within and after each call. Raises: OSError."""

    def read(self, path: Path, most: int = -1) -> bytes:
        """Return the bytes of a file, the first `most` of them."""
        ...

    def put(self, path: Path, parts: tuple[Part, ...], mode: int) -> None:
        """Make a file of these bytes, flushed; its name is not durable before `sync_folder`."""
        ...

    def rename(self, path: Path, to: Path) -> None:
        """Give a file another name, in place of what has it; durable after `sync_folder`."""
        ...

    def unlink(self, path: Path) -> None:
        """Take a name away, if it is there; durable after `sync_folder`."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        ...

    def make_folder(self, path: Path) -> None:
        """Make a private folder (0700) with its parents; one that is there is fine."""
        ...

    def names(self, path: Path) -> list[str]:
        """Return the names of the files in a folder, sorted."""
        ...

    def modified_s(self, path: Path) -> float:
        """Return when a file was last written, seconds."""
        ...

    def lock(self, path: Path) -> Callable[[], None]:
        """Hold a lock file, made if need be; return what lets it go.

        Raises: BlockingIOError when another process holds it.
        """
        ...


class SystemDisk:
    """The machine's own files."""

    def read(self, path: Path, most: int = -1) -> bytes:
        """Return the bytes of a file."""
        with path.open("rb") as file:
            return file.read(most)

    def put(self, path: Path, parts: tuple[Part, ...], mode: int) -> None:
        """Write a file and flush it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path, flags, mode)
        try:
            for part in parts:
                write_all(handle, part)
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, path: Path, to: Path) -> None:
        """Rename, replacing."""
        path.replace(to)

    def unlink(self, path: Path) -> None:
        """Take a name away."""
        path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Flush a folder."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Make a private folder with its parents."""
        path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def names(self, path: Path) -> list[str]:
        """List the files of a folder."""
        with os.scandir(path) as found:
            return sorted(entry.name for entry in found if entry.is_file())

    def modified_s(self, path: Path) -> float:
        """Return a file's time of modification."""
        return path.stat().st_mtime

    def lock(self, path: Path) -> Callable[[], None]:
        """Hold a lock file: the kernel lets it go when the process ends."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # held all the same
        try:
            _lock(handle)
        except OSError:
            os.close(handle)
            raise
        return lambda: os.close(handle)


SYSTEM = SystemDisk()


def write(path: Path, *parts: Part, mode: int = 0o600, disk: Disk = SYSTEM) -> None:
    """Replace `path` by the bytes of `parts`, end to end, atomically and durably.

    Raises: StoreError when the disk is full, read-only or failing; the old file is then intact.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_SUFFIX}")
    try:
        try:
            disk.put(beside, parts, mode)
            disk.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.unlink(beside)
            raise
        disk.sync_folder(path.parent)
    except OSError as error:
        raise StoreError(_cannot("write", path, error)) from error


def remove(path: Path, disk: Disk = SYSTEM) -> None:
    """Delete `path` if it is there, durably.

    Raises: StoreError when the folder does not let us.
    """
    try:
        disk.unlink(path)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise StoreError(_cannot("remove", path, error)) from error


def folder(path: Path) -> Path:
    """Make a private folder (0700) with its parents, and return it.

    Raises: StoreError when it cannot be made.
    """
    try:
        SYSTEM.make_folder(path)
    except OSError as error:
        raise StoreError(_cannot("make folder", path, error)) from error
    return path


def sweep(where: Path, name: str | None = None, disk: Disk = SYSTEM) -> None:
    """Delete what killed `write`s left in folder `where`, of the file `name` alone or of all.

    Only for the one owner of the folder, or of the file, at start.
    """
    start = "." if name is None else f".{name}."
    for stale in disk.names(where):
        if stale.startswith(start) and "-" in stale[len(start) :] and stale.endswith(_SUFFIX):
            remove(where / stale, disk)


def is_refusal(error: Exception) -> bool:
    """Say whether the disk does not want to be written, or not now: the file itself is fine."""
    cause = error.__cause__ if isinstance(error, StoreError) else error
    return isinstance(cause, OSError) and cause.errno in _REFUSALS


def sync_folder(path: Path) -> None:
    """Make the names in folder `path` durable: a rename is not on disk before this.

    Raises: OSError as the system gives it.
    """
    SYSTEM.sync_folder(path)


def write_all(handle: int, data: Part) -> None:
    """Write every byte of `data` to an open file: the system may take fewer at a time.

    Raises: OSError as the system gives it.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(handle, left) :]


def _lock(handle: int) -> None:
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):  # somebody may look whether it is held
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(LOCK_PAUSE_S)
    return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _cannot(verb: str, path: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    return f"cannot {verb} {path}: {why}; free some space or correct the folder's rights"
