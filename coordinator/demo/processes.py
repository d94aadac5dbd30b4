# SPDX-License-Identifier: Apache-2.0
"""Real processes of a demo: started, watched for their peak memory, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_S = 10.0


def peak_mib(pid: int) -> float:
    """Return the kernel's peak resident memory of a live process in MiB; 0 once it is gone.

    VmHWM, not the rusage of a waited-for child: that one counts the pages of before exec.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


class Process:
    """A child process whose output goes to a file and whose peak memory is remembered."""

    def __init__(
        self, args: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.peak_mib = 0.0
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                args,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self._child.pid

    def watch(self) -> None:
        """Note the peak memory so far."""
        self.peak_mib = max(self.peak_mib, peak_mib(self.pid))

    @property
    def exit(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.poll()

    def kill(self) -> None:
        """Kill it as a power cut would."""
        self._child.kill()

    def ask_to_stop(self) -> None:
        """Send SIGTERM, if it runs."""
        if self.exit is None:
            self.watch()
            self._child.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = STOP_S) -> int:
        """Wait for the end, killing what does not end in time."""
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            self._child.kill()
            return self._child.wait()

    def last_line(self) -> str:
        """Return the last line it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def stop_all(processes: Sequence[Process]) -> None:
    """Stop all at once, then wait for each."""
    for process in processes:
        process.ask_to_stop()
    ends = time.monotonic() + STOP_S
    for process in processes:
        process.wait(max(0.1, ends - time.monotonic()))
