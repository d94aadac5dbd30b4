# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup, of either version, for processes that are to run out of memory alone.

Made below the one that the test runs in, and removed with the last of its processes. Skips where
none can be made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MOUNT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """The group in `folder`; `under` is what to run a process under, so that it is in it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_old = folder, (folder / "memory.limit_in_bytes").exists()
        joined = 'echo $$ > "$0" && exec "$@"'
        self.under = ("sh", "-c", joined, str(folder / "cgroup.procs"))

    @property
    def need(self) -> int:
        """The bytes that its processes hold and that the kernel cannot take from them."""
        names = ("total_rss", "total_shmem") if self._is_old else ("anon", "shmem")
        found = self._fields("memory.stat")
        return sum(found[name] for name in names)

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        file = "memory.oom_control" if self._is_old else "memory.events"
        return self._fields(file)["oom_kill"]

    def limit(self, most: int | None) -> None:
        """Let its processes have so many bytes together; None is no limit."""
        file = "memory.limit_in_bytes" if self._is_old else "memory.max"
        said = ("-1" if self._is_old else "max") if most is None else str(most)
        ends = time.monotonic() + 10
        while True:
            try:
                (self._folder / file).write_text(said)
            except OSError:  # it takes back what it can, and has not got there yet
                assert time.monotonic() < ends, f"no limit of {most} bytes over {self.need}"
            else:
                return

    def _fields(self, name: str) -> dict[str, int]:
        lines = (self._folder / name).read_text().splitlines()
        return {key: int(value) for key, value in map(str.split, lines)}


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Make a group; at the end whatever still runs in it is killed, and it is removed."""
    folder = _parent() / f"fedge-{name}-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made in {folder.parent}: {error.strerror}")
    try:
        if not (folder / "memory.stat").exists():
            pytest.skip(f"cgroups in {folder.parent} do not count memory")
        yield MemoryGroup(folder)
    finally:
        _remove(folder)


def _parent() -> Path:
    """Return the memory cgroup of this process, or the topmost where that is not to be seen."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "memory" in names.split(","):
            mine = MOUNT / "memory" / path.lstrip("/")
            return mine if mine.is_dir() else MOUNT / "memory"
    return MOUNT


def _remove(folder: Path) -> None:
    ends = time.monotonic() + 10
    while True:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except OSError:  # its processes are still ending
            assert time.monotonic() < ends, f"{folder} is still in use"
            time.sleep(0.01)
        else:
            return
