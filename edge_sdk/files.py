# SPDX-License-Identifier: Apache-2.0
"""Whole files on disk, durably: after `write` returns the new bytes survive a power cut.

A reader sees the old file or the new one, never a mixture: write beside, fsync, rename, fsync the
folder. Holds paths and bytes only; what they mean is the caller's business.
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
from pathlib import Path

from edge_sdk.errors import StoreError

_SUFFIX = ".tmp"


def write(path: Path, *parts: bytes | bytearray | memoryview, mode: int = 0o600) -> None:
    """Replace `path` by the bytes of `parts`, end to end, atomically and durably.

    Raises: StoreError when the disk is full, read-only or failing; the old file is then intact.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_SUFFIX}")
    try:
        try:
            _write_new(beside, parts, mode)
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(_cannot("write", path, error)) from error


def remove(path: Path) -> None:
    """Delete `path` if it is there, durably.

    Raises: StoreError when the folder does not let us.
    """
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(_cannot("remove", path, error)) from error


def folder(path: Path) -> Path:
    """Make a private folder (0700) with its parents, and return it.

    Raises: StoreError when it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StoreError(_cannot("make folder", path, error)) from error
    return path


def sweep(where: Path, name: str | None = None) -> None:
    """Delete what killed `write`s left in folder `where`, of the file `name` alone or of all.

    Only for the one owner of the folder, or of the file, at start.
    """
    of = "" if name is None else f"{glob.escape(name)}."
    for stale in where.glob(f".{of}*-*{_SUFFIX}"):
        remove(stale)


def sync_folder(path: Path) -> None:
    """Make the names in folder `path` durable: a rename is not on disk before this.

    Raises: OSError as the system gives it.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_new(path: Path, parts: tuple[bytes | bytearray | memoryview, ...], mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(path, flags, mode)
    try:
        for part in parts:
            write_all(handle, part)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte of `data` to an open file: the system may take fewer at a time.

    Raises: OSError as the system gives it.
    """
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(handle, left) :]


def _cannot(verb: str, path: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    return f"cannot {verb} {path}: {why}; free some space or correct the folder's rights"
