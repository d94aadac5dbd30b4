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
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from edge_sdk.errors import EngineError
from edge_sdk.footprint import peak_kib

Step = Callable[[Any, Any], float]
BATCHES = 4
"""Batches that a child goes through again and again: few, for their memory counts too."""


class Child:
    """The asking end."""

    def __init__(self, module: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-P", "-m", module, os.fspath(folder), str(threads)]
        home = os.fspath(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": home, "ORT_DISABLE_TELEMETRY": "1"}
        env |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def run(self, steps: int) -> dict[str, Any]:
        """Train `steps` times: ``{"losses": [..], "ms": [..], "peak_kib": n}``.

        Raises: EngineError when the child ends instead.
        """
        wire, answers = self._process.stdin, self._process.stdout
        line = ""
        if wire is not None and answers is not None and self._process.poll() is None:
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
                pipe.close()
        self._process.wait()


@contextmanager
def started(module: str, folder: Path, threads: int) -> Iterator[Child]:
    """Start a child for the length of a `with`."""
    child = Child(module, folder, threads)
    try:
        yield child
    finally:
        child.close()


def serve(step: Step, x: Any, y: Any) -> None:
    """Answer until the pipe closes. `x` and `y` hold `BATCHES` batches end to end."""
    size = len(x) // BATCHES
    cuts = [slice(i * size, (i + 1) * size) for i in range(BATCHES)]
    batches = cycle([(x[cut], y[cut]) for cut in cuts])
    for line in sys.stdin:
        losses, times = [], []
        for _ in range(int(line)):
            bx, by = next(batches)
            started_s = time.perf_counter()
            losses.append(step(bx, by))
            times.append((time.perf_counter() - started_s) * 1e3)
        answer({"losses": losses, "ms": times, "peak_kib": peak_kib()})


def answer(what: dict[str, Any]) -> None:
    """Write one line to the asking end."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()
