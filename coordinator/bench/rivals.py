# SPDX-License-Identifier: Apache-2.0
"""Whoever trains in a benchmark: a process and what it said, or why there is none."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from importlib.util import find_spec
from typing import NamedTuple

from coordinator.bench.cases import Case
from coordinator.bench.child import Child, command_of, environment, started

TORCH, ORT_TRAINING = "torch", "onnxruntime-training"
PEERS = (TORCH, ORT_TRAINING)


class Rival(NamedTuple):
    """One side: ours on an engine, or another's.

    Attributes:
        name: as rows spell it.
        engine: ours that it is compared with; "" is all of them.
        child: the process; None where there is none.
        why: there is none.
        losses: of its first steps.
        differs: by how much from the first side's.
    """

    name: str
    engine: str = ""
    child: Child | None = None
    why: str = ""
    losses: tuple[float, ...] = ()
    differs: float | None = None


def start(name: str, case: Case, threads: int, python: str | None, stack: ExitStack) -> Rival:
    """Start a rival on a case for the length of `stack`."""
    if not (case.folder / "plan.json").exists():
        return Rival(name, why=f"{name} reads no .tflite file")
    if name == TORCH:
        if not find_spec("torch"):
            return Rival(name, why="torch is not installed")
        module = "coordinator.bench.torch_peer"
        return Rival(name, child=stack.enter_context(started(module, case.folder, threads)))
    if python is None:
        return Rival(name, why="onnxruntime-training needs --peer-python")
    if why := _make(case, threads, python):
        return Rival(name, why=why)
    module = "coordinator.bench.ort_training"
    child = stack.enter_context(started(module, case.folder, threads, python=python))
    return Rival(name, child=child)


def _make(case: Case, threads: int, python: str) -> str:
    """Let onnxruntime-training write its graphs; return why it could not."""
    command = command_of("coordinator.bench.ort_training", case.folder, threads, "make")
    try:
        done = subprocess.run(
            [python, *command[1:]],
            capture_output=True,
            text=True,
            env=environment(threads),
            check=False,
        )
    except OSError as error:
        return f"--peer-python {python} does not run: {error.strerror}"
    if done.returncode:
        return f"{python} ended early: {done.stderr.strip()[-200:]}"
    said: dict[str, str] = json.loads(done.stdout)
    return said.get("error", "")
