# SPDX-License-Identifier: Apache-2.0
"""The memory of a device: the application that predicts, and the child that trains beside it.

Both are fresh processes that do what a device does; the kernel says what they took at their peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TypedDict

from coordinator.bench import recipes
from coordinator.bench.cases import MODES
from coordinator.compiler import build, momentum
from edge_sdk.bundle import Bundle
from edge_sdk.engine import ENGINES
from edge_sdk.errors import EngineError
from edge_sdk.samples import Samples
from edge_sdk.training import Budget, ChildTrainer, TrainJob

ROWS, BATCH = 256, 16
_HOST = """
import sys
import paho.mqtt.client, cryptography.hazmat.primitives.asymmetric.ed25519
import numpy as np
from pathlib import Path
from edge_sdk.bundle import Bundle
from edge_sdk.device import Device
from edge_sdk.footprint import peak_kib
from edge_sdk.model import open_model
bundle = Bundle.load(Path(sys.argv[1]))
model = open_model(bundle, bundle.member("params.bin"), 0, engine=sys.argv[2])
x = np.zeros(bundle.manifest["input"]["shape"][1:], bundle.manifest["input"]["dtype"])
for _ in range(100):
    model.predict(x)
print(peak_kib())
"""


class DeviceMemory(TypedDict):
    """Peaks of resident memory, MiB."""

    model: str
    mode: str
    engine: str
    application_mib: float
    training_mib: float
    together_mib: float


def measure(model: str = "dscnn", mode: str = "all", engine: str = "ort") -> DeviceMemory:
    """Predict in one process, then train in another, on one engine.

    Raises: EngineError when either ends early; CompileError when the model has no graphs for it.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as place:
        folder = Path(place)
        bundle = build(
            recipes.model(model),
            loss=recipes.LOSSES.get(model, "cross_entropy"),
            train=MODES[mode],
            optimizer=momentum(0.9, lr=0.01),
            engines=(ENGINES[engine].format,),
        )
        bundle.save(folder / "task.fedge")
        host, child = _host(folder, engine), _training(bundle, folder, engine)
    return DeviceMemory(
        model=Path(model).stem,
        mode=mode,
        engine=engine,
        application_mib=host,
        training_mib=child,
        together_mib=host + child,
    )


def _host(folder: Path, engine: str) -> float:
    command = [sys.executable, "-c", _HOST, str(folder / "task.fedge"), engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the measured process failed: {done.stderr.strip()[-300:]}")
    return int(json.loads(done.stdout)) / 1024


def _training(bundle: Bundle, folder: Path, engine: str) -> float:
    weights = folder / "weights.bin"
    weights.write_bytes(bundle.member("params.bin"))
    x, y = recipes.examples(bundle, ROWS)
    with Samples(
        folder / "samples",
        x_shape=x.shape[1:],
        x_dtype=str(x.dtype),
        y_shape=y.shape[1:],
        y_dtype=str(y.dtype),
        capacity=ROWS,
    ) as samples:
        samples.extend(x, y)
    budget = Budget(epochs=1, batch=BATCH)
    job = TrainJob(folder / "task.fedge", weights, folder / "samples", budget, engine=engine)
    return ChildTrainer().train(job, threading.Event()).peak_bytes / (1 << 20)
