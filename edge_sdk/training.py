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
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_sdk.child import HANG_S, Child, TrainFailed

__all__ = [
    "CHECKPOINT_S",
    "Budget",
    "ChildTrainer",
    "LocalTraining",
    "TrainFailed",
    "TrainJob",
    "TrainResult",
]

CHECKPOINT_S = 30.0
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
    """Of one attempt: a training that goes on from a checkpoint has them anew."""
    seconds_in_all: float | None = None
    """Of all attempts together."""
    batch: int = 32
    lr: float | None = None
    mu: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One training: from `weights` (flat little-endian float32) on the examples in `samples`.

    The delta is written to `out`, beside the weights when None. The budget's `mu` pulls to the
    `anchor`, a file like the weights, to the weights when None. Where it stands is kept in
    `checkpoint` every `checkpoint_s`, and it goes on from what is found there.
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
    checkpoint: Path | None = None
    checkpoint_s: float = CHECKPOINT_S
    memory: int | None = None
    """Bytes that it may allocate, beyond what its runtime takes; None is no limit."""

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
    resumed_at: int = 0
    """The step at which it went on from a checkpoint; 0 when it did it all at once."""


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
    started it. A child that is still there `grace_s` after its budget of seconds, or gives no sign
    of life for `hang_s`, is killed.
    """

    def __init__(
        self,
        python: str = sys.executable,
        *,
        nice: int = 10,
        grace_s: float = 120.0,
        hang_s: float = HANG_S,
    ) -> None:
        self._command = [python, "-P", "-m", "edge_sdk.worker"]
        self._nice, self._grace_s, self._hang_s = nice, grace_s, hang_s

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        """Run one job in a fresh process. Raises: TrainFailed."""
        seconds = job.budget.seconds
        patience_s = math.inf if seconds is None else seconds + self._grace_s
        child = self.started()
        try:
            return self.carried_out(child, job, cancel, patience_s)
        finally:
            child.end()

    def started(self) -> Child:
        """Start a child that waits for jobs. Raises: TrainFailed."""
        try:
            return Child(self._command, _environment(), self._hang_s)
        except OSError as error:
            raise TrainFailed(f"cannot start {self._command[0]}: {error.strerror}") from error

    def carried_out(
        self, child: Child, job: TrainJob, cancel: threading.Event, patience_s: float
    ) -> TrainResult:
        """Let a child do a job. Raises: TrainFailed, also when what it answers is no result."""
        said = child.call(self.request(job), cancel, patience_s)
        try:
            return TrainResult(**{**said, "delta": job.delta})
        except TypeError as error:
            said_200 = json.dumps(said)[-200:]
            raise TrainFailed(f"the training process answered {said_200!r}; upgrade it") from error

    def request(self, job: TrainJob) -> dict[str, Any]:
        """Return a job as the child takes it: one line of JSON."""
        places = {"bundle": job.bundle, "weights": job.weights, "samples": job.samples}
        beside = {"anchor": job.anchor, "checkpoint": job.checkpoint}
        return {
            **{name: os.fspath(path) for name, path in places.items()},
            "delta": os.fspath(job.delta),
            **{name: None if path is None else os.fspath(path) for name, path in beside.items()},
            "checkpoint_s": job.checkpoint_s,
            "budget": asdict(job.budget),
            "seed": job.seed,
            "threads": job.threads,
            "engine": job.engine,
            "memory": job.memory,
            "nice": self._nice,
            "parent": os.getpid(),
        }


def _environment() -> dict[str, str]:
    """Ours, with this very package on the path, wherever it was imported from."""
    home = os.fspath(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, **_LEAN, "PYTHONPATH": os.pathsep.join([home, path] if path else [home])}
