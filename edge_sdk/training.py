# SPDX-License-Identifier: Apache-2.0
"""Local training as a port, and the child process behind it.

A device never trains in the process of the application that embeds it: the child may run out of
memory, crash or be killed, and the application goes on predicting. The child starts with
`python -m`, so the application's own script is never imported a second time, and dies with its
parent. Importing this module loads neither numpy nor an engine.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from edge_sdk.errors import EngineError

_POLL_S = 0.1
_LEAN = {  # set before the child loads anything; measured: a thread pool fewer, no telemetry
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a job may spend; the first limit reached ends it, None is no limit."""

    epochs: int | None = 1
    steps: int | None = None
    seconds: float | None = None
    batch: int = 32
    lr: float | None = None
    mu: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training: from `weights` (flat little-endian float32) on the examples in `samples`.

    The delta is written to `out`, beside the weights when None. The budget's `mu` pulls to the
    `anchor`, a file like the weights, to the weights when None.
    """

    bundle: Path
    weights: Path
    samples: Path
    budget: Budget
    seed: int = 0
    threads: int = 1
    engine: str = "auto"
    out: Path | None = None
    anchor: Path | None = None

    @property
    def delta(self) -> Path:
        """Where the delta goes."""
        return self.weights.with_suffix(".delta.bin") if self.out is None else self.out


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training did. `delta`: flat little-endian float32, `local - base`."""

    delta: Path
    examples: int
    steps: int
    epochs: int
    loss: float
    seconds: float
    stopped_by: str
    peak_bytes: int
    """The most memory that the training process took."""


class TrainFailed(EngineError):  # noqa: N818 - says what happened, as `when` and `left` do
    """A local training gave no delta; `reason` says why. The device goes on without it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LocalTraining(Protocol):
    """Whatever can carry out a job."""

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        """Train to the end of the budget, or until `cancel` is set.

        Raises: TrainFailed, also when cancelled.
        """
        ...


class ChildTrainer:
    """Trains in a child process at low priority.

    Call `train` from a thread that outlives it: the kernel ends the child with the thread that
    started it. A child that is still there `grace_s` after its budget of seconds is killed.
    """

    def __init__(
        self, python: str = sys.executable, *, nice: int = 10, grace_s: float = 120.0
    ) -> None:
        self._command = [python, "-P", "-m", "edge_sdk.worker"]
        self._nice, self._grace_s = nice, grace_s

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        """Run one job in a fresh process. Raises: TrainFailed."""
        try:
            with self.started() as child:
                try:
                    said, noise = self._watch(child, job, cancel)
                finally:
                    child.kill()
        except OSError as error:
            raise TrainFailed(f"cannot start {self._command[0]}: {error.strerror}") from error
        if child.returncode != 0:
            raise TrainFailed(last_words(child.returncode, said, noise))
        return answer(said, job.delta)

    def started(self, stderr: int | IO[bytes] = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a child that waits for jobs. Raises: OSError."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=stderr,
            text=True,
            env=_environment(),
            process_group=0,  # the terminal's Ctrl-C is for the application
        )

    def _watch(
        self, child: subprocess.Popen[str], job: TrainJob, cancel: threading.Event
    ) -> tuple[str, str]:
        request: str | None = json.dumps(self.request(job))
        patience_s = math.inf if job.budget.seconds is None else job.budget.seconds + self._grace_s
        until_s = time.monotonic() + patience_s
        while not cancel.is_set():
            try:
                return child.communicate(request, _POLL_S)
            except subprocess.TimeoutExpired:
                request = None
            if time.monotonic() > until_s:
                raise TrainFailed(f"still training {self._grace_s:g} s after its budget; killed")
        raise TrainFailed("cancelled")

    def request(self, job: TrainJob) -> dict[str, Any]:
        """Return a job as the child takes it: one line of JSON."""
        places = {"bundle": job.bundle, "weights": job.weights, "samples": job.samples}
        return {
            **{name: os.fspath(path) for name, path in places.items()},
            "delta": os.fspath(job.delta),
            "anchor": None if job.anchor is None else os.fspath(job.anchor),
            "budget": asdict(job.budget),
            "seed": job.seed,
            "threads": job.threads,
            "engine": job.engine,
            "nice": self._nice,
            "parent": os.getpid(),
        }


def _environment() -> dict[str, str]:
    """Ours, with this very package on the path, wherever it was imported from."""
    home = os.fspath(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, **_LEAN, "PYTHONPATH": os.pathsep.join([home, path] if path else [home])}


def answer(said: str, delta: Path) -> TrainResult:
    """Read the last line of what a child said: what else is loaded into it may print before.

    Raises: TrainFailed when that is no result.
    """
    try:
        return TrainResult(**{**json.loads(said.splitlines()[-1]), "delta": delta})
    except (ValueError, IndexError, TypeError) as error:
        raise TrainFailed(f"the training process answered {said[-200:]!r}; upgrade it") from error


def last_words(code: int, said: str, noise: str) -> str:
    """Return why a child ended, from its exit code and what it printed."""
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        return f"the training process was killed by {name}; is there enough memory?"
    try:
        return str(json.loads(said.splitlines()[-1])["error"])
    except (ValueError, IndexError, KeyError, TypeError):
        lines = noise.split("\n") if noise else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"the training process failed with code {code}: {last[:300]}"
