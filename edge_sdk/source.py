# SPDX-License-Identifier: Apache-2.0
"""Examples for ``fedge device run`` without writing Python: a watched folder, or a local socket.

A file put into the folder is learned once, also over a crash: what is being taken is journalled
with the number of examples stored before. Both run in a thread until told to stop.
"""

from __future__ import annotations

import csv
import json
import logging
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import files
from edge_sdk.errors import FedgeError

log = logging.getLogger(__name__)

Rows = tuple[NDArray[Any], NDArray[Any]]
MAX_FILE_BYTES = 256 * 2**20
SUFFIXES = {".npz", ".csv"}


class Learner(Protocol):
    """The part of a `Device` that a source of examples needs."""

    @property
    def examples_ever(self) -> int:
        """How many examples were ever stored."""
        ...

    def wait_for_model(self, timeout_s: float) -> bool:
        """Wait until examples can be taken."""
        ...

    def learn_many(self, xs: ArrayLike, labels: ArrayLike) -> None:
        """Store labelled examples."""
        ...


class Folder:
    """Learns each NPZ or CSV file that appears in a folder, once, and moves it to ``consumed/``.

    A file is taken when it has not changed between two looks. One that cannot be read, or does not
    fit the model, goes to ``refused/``; the log says why. Names that begin with a dot are left
    alone: write beside, then rename.
    """

    def __init__(
        self,
        folder: Path,
        device: Learner,
        *,
        journal: Path,
        label: str = "last",
        poll_s: float = 2.0,
    ) -> None:
        self._folder, self._device, self._label, self._poll_s = folder, device, label, poll_s
        self._journal = journal
        self._seen: dict[Path, tuple[int, int]] = {}
        self._stuck: set[tuple[Path, tuple[int, int]]] = set()  # learned, but cannot be moved

    def run(self, stop: threading.Event) -> None:
        """Look into the folder every `poll_s` seconds until `stop` is set."""
        while not stop.is_set():
            if self._device.wait_for_model(self._poll_s):
                self.look()
                stop.wait(self._poll_s)

    def look(self) -> int:
        """Take what is new and settled; return how many files were taken."""
        try:
            found = {path: _stamp(path) for path in self._folder.iterdir() if _is_ours(path)}
        except OSError as error:
            log.warning(
                "source folder unreadable folder=%s reason=%s", self._folder, error.strerror
            )
            return 0
        settled = [
            path
            for path, stamp in sorted(found.items())
            if self._seen.get(path) == stamp and (path, stamp) not in self._stuck
        ]
        self._seen = found
        return sum(self._take(path) for path in settled)

    def _take(self, path: Path) -> bool:
        try:
            xs, ys = read(path, self._label)
        except (OSError, ValueError) as error:
            return self._move(path, "refused", str(error))
        try:
            done = self._already(path)
            self._device.learn_many(xs[done:], ys[done:])
        except ValueError as error:
            return self._move(path, "refused", str(error))
        except FedgeError as error:  # the disk is full, perhaps: the file stays, for another look
            log.warning("source file not stored file=%s reason=%s", path.name, error)
            return False
        log.info("source file learned file=%s examples=%d", path.name, len(xs))
        return self._move(path, "consumed", "")

    def _already(self, path: Path) -> int:
        """How many rows of this file were stored before a crash; from here on it is journalled."""
        now = self._device.examples_ever
        try:
            known = json.loads(self._journal.read_bytes())
        except (OSError, ValueError):
            known = None
        size, stamp = _stamp(path)
        if known == [path.name, size, stamp, known[-1] if isinstance(known, list) else 0]:
            return max(0, now - int(known[-1]))
        files.write(self._journal, json.dumps([path.name, size, stamp, now]).encode(), mode=0o600)
        return 0

    def _move(self, path: Path, where: str, reason: str) -> bool:
        if reason:
            log.warning(
                "source file refused file=%s reason=%s", path.name, " ".join(reason.split())
            )
        target = self._folder / where
        try:
            target.mkdir(exist_ok=True)
            path.replace(_free(target / path.name))
            files.sync_folder(self._folder)
            files.remove(self._journal)
        except OSError as error:
            log.warning("source file cannot be moved file=%s reason=%s", path.name, error.strerror)
            self._stuck.add((path, _stamp(path)))
        self._seen.pop(path, None)
        return where == "consumed"


def read(path: Path, label: str = "last") -> Rows:
    """Read labelled examples: NPZ with arrays `x` and `y`, or CSV with one label column.

    Returns: inputs `[n, ...]` and labels `[n, ...]`.
    Raises: ValueError or OSError, saying what was expected.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB; split it")
    xs, ys = _npz(path) if path.suffix == ".npz" else _csv(path, label)
    if len(xs) != len(ys) or not len(xs):
        raise ValueError(f"expected one label for each example, got {len(xs)} and {len(ys)}")
    return xs, ys


def _npz(path: Path) -> Rows:
    import zipfile

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if sum(info.file_size for info in arrays.zip.infolist()) > MAX_FILE_BYTES:
                raise ValueError(f"expected at most {MAX_FILE_BYTES >> 20} MiB unpacked; split it")
            if not {"x", "y"} <= set(arrays.files):
                raise ValueError(f"expected arrays x and y, got {', '.join(arrays.files)}")
            return np.atleast_1d(arrays["x"]), np.atleast_1d(arrays["y"])
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"not an NPZ file: {error}") from error


def _csv(path: Path, label: str) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    names: list[str] = []
    if rows and not _is_number(rows[0][0]):
        names = [name.strip() for name in rows.pop(0)]
    if label != "last" and label not in names:
        raise ValueError(f"expected a column {label!r} in the header, got {', '.join(names)}")
    column = names.index(label) if label != "last" else -1
    try:
        table = np.array([[float(cell) for cell in row] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"expected rows of numbers, all of one length: {error}") from error
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError("expected at least one input column and one label column")
    ys = table[:, column]
    return np.delete(table, column, axis=1).astype(np.float32), ys


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_ours(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _free(path: Path) -> Path:
    """A name that is not taken: a file of the same name may have been learned before."""
    candidate, number = path, 1
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        number += 1
    return candidate
