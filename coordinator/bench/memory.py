# SPDX-License-Identifier: Apache-2.0
"""Memory to train, predicted by the compiler and measured by the kernel, side by side.

Each row is a fresh process that imports numpy and onnxruntime, notes its peak (VmHWM), loads the
bundle, trains some steps on one batch, and notes its peak again. What it grew by is compared with
what the bundle's cost table says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from coordinator.bench import recipes
from coordinator.compiler import build, momentum
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EngineError

BATCHES = (4, 16, 32)
SELECTIONS = ("all", "last:1", "bias")
_MIB = 1 << 20


class Way(TypedDict):
    """How a step goes about its batch: rows at a time (0: all), operators computed again."""

    micro_batch: int
    recomputed: int


class Memory(Way):
    """MiB: what training adds, and the process's peak before and after; `off`: of what is added.

    How much of the libraries' code is resident before training is the kernel's choice: on one
    machine numpy and onnxruntime took 42 MiB from files long in its cache, 56 from fresh ones.
    """

    model: str
    max_ram: NotRequired[str]
    train: str
    batch: int
    predicted_mib: float
    measured_mib: float
    off: float
    runtime_mib: float
    process_mib: float


def measure(
    models: Sequence[str],
    *,
    batches: Sequence[int] = BATCHES,
    selections: Sequence[str] = SELECTIONS,
    loss: str | None = None,
    threads: int = 1,
) -> Iterator[Memory]:
    """Yield a row for each model, selection and batch, training by momentum.

    Raises: EngineError when a measured process ends early; ConfigError, CompileError for a bad
    model.
    """
    for model in models:
        proto = recipes.model(model)
        for train in selections:
            for batch in batches:
                bundle = build(
                    proto,
                    loss=loss or recipes.LOSSES.get(model, "cross_entropy"),
                    train=train,
                    optimizer=momentum(0.9, lr=0.001),
                    batch=batch,
                )
                yield row(Path(model).stem, bundle, batch, threads)


def within(
    models: Sequence[str],
    budgets: Sequence[str],
    *,
    batch: int | None = None,
    loss: str | None = None,
    threads: int = 1,
) -> Iterator[Memory]:
    """Yield a row for each model and `max_ram`, of what a build chose to keep within it.

    Raises: as `measure`; CompileError for a budget that nothing fits.
    """
    for model in models:
        proto = recipes.model(model)
        for budget in budgets:
            bundle = build(
                proto,
                loss=loss or recipes.LOSSES.get(model, "cross_entropy"),
                optimizer=momentum(0.9, lr=0.001),
                max_ram=budget,
                batch=batch,
            )
            rows = int(bundle.manifest["cost"]["batch"])
            yield {**row(Path(model).stem, bundle, rows, threads), "max_ram": budget}


def row(name: str, bundle: Bundle, batch: int, threads: int = 1) -> Memory:
    """Measure one bundle. Raises: EngineError when the process ends early."""
    runtime, peak = grown(bundle, batch, threads)
    cost = bundle.manifest["cost"]
    predicted = cost["ram_train"][str(batch)]
    return Memory(
        model=name,
        train=str(bundle.manifest["train"]),
        batch=batch,
        micro_batch=cost.get("micro_batch", 0),
        recomputed=cost.get("recomputed", 0),
        predicted_mib=predicted / _MIB,
        measured_mib=(peak - runtime) / _MIB,
        off=predicted / (peak - runtime) - 1,
        runtime_mib=runtime / _MIB,
        process_mib=peak / _MIB,
    )


def grown(bundle: Bundle, batch: int, threads: int = 1) -> tuple[int, int]:
    """Return a process's peak with the runtime imported, and after training: bytes.

    Raises: EngineError when it ends early.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as place:
        folder = Path(place)
        bundle.save(folder / "task.fedge")
        for name, array in zip("xy", recipes.examples(bundle, batch), strict=True):
            np.save(folder / f"{name}.npy", array)
        module = "coordinator.bench.grower"
        command = [sys.executable, "-P", "-m", module, os.fspath(folder), str(threads)]
        home = os.fspath(Path(__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": home, "ORT_DISABLE_TELEMETRY": "1"}
        env |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=False)
    if done.returncode:
        raise EngineError("the measured process ended early; what it printed above says why")
    said = json.loads(done.stdout)
    return said["runtime_kib"] << 10, said["peak_kib"] << 10
