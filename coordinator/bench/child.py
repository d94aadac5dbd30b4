# SPDX-License-Identifier: Apache-2.0
"""A process that trains when it is told to, so that its memory and its threads are its own.

Both ends are here: `Child` starts one and asks, `serve` answers. A request is one line, a number of
steps; the answer is one line of JSON. Nothing heavy is imported: what the child loads is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_sdk.errors import EngineError
from edge_sdk.footprint import peak_kib

Step = Callable[[Any, Any], float]
BATCHES = 4
"""Batches that a child goes through again and again, one in memory at a time."""


class Child:
    """The asking end."""

    def __init__(self, module: str, folder: Path, threads: int, *more: str, python: str) -> None:
        command = command_of(module, folder, threads, *more, python=python)
        pipe = subprocess.PIPE
        env = environment(threads)
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def run(self, steps: int) -> dict[str, Any]:
        """Train `steps` times: ``{"losses": [..], "ms": [..], "peak_kib": n, "runtime_kib": n}``.

        Raises: EngineError when the child ends instead.
        """
        wire, answers = self._process.stdin, self._process.stdout
        line = ""
        if wire is not None and answers is not None:
            with suppress(BrokenPipeError):  # it has ended: what it said last is still to be read
                wire.write(f"{steps}\n")
                wire.flush()
            line = answers.readline()
        if not line:
            raise EngineError("the measured process ended early; what it printed above says why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a question that nobody read
                    pipe.close()
        self._process.wait()


@contextmanager
def started(
    module: str, folder: Path, threads: int, *more: str, python: str = sys.executable
) -> Iterator[Child]:
    """Start a child for the length of a `with`."""
    child = Child(module, folder, threads, *more, python=python)
    try:
        yield child
    finally:
        child.close()


def command_of(
    module: str, folder: Path, threads: int, *more: str, python: str = sys.executable
) -> list[str]:
    """Return the command that runs one of our modules in a process of its own."""
    return [python, "-P", "-m", module, os.fspath(folder), str(threads), *more]


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a measured process, whichever Python runs it."""
    home = os.fspath(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": home, "ORT_DISABLE_TELEMETRY": "1"}
    return env | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}


def save(folder: Path, x: Any, y: Any) -> None:
    """Leave `BATCHES` batches, which come end to end, for a child to read one by one."""
    import numpy as np

    for name, rows in (("x", x), ("y", y)):
        for i, part in enumerate(np.split(rows, BATCHES)):
            np.save(folder / f"{name}.{i}.npy", part)


def serve(
    step: Step,
    folder: Path,
    as_fed: Callable[[Any], Any] = lambda rows: rows,
    runtime_kib: int | None = None,
) -> None:
    """Answer until the pipe closes; reading a batch is not timed.

    Args:
        step: trains on one batch and returns its loss.
        folder: holds the batches that `save` left.
        as_fed: what `step` takes, made of the array that was read.
        runtime_kib: the peak of memory when only numpy and the runtime were imported.
    """
    import numpy as np

    at = 0
    for line in sys.stdin:
        losses, times = [], []
        for _ in range(int(line)):
            x, y = (as_fed(np.load(folder / f"{name}.{at % BATCHES}.npy")) for name in "xy")
            at += 1
            started_s = time.perf_counter()
            losses.append(step(x, y))
            times.append((time.perf_counter() - started_s) * 1e3)
        said = {"losses": losses, "ms": times, "peak_kib": peak_kib()}
        answer(said | {"runtime_kib": runtime_kib})


def answer(what: dict[str, Any]) -> None:
    """Write one line to the asking end."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
