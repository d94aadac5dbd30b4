# SPDX-License-Identifier: Apache-2.0
"""Our side of `fedge bench step`: a `Trainer`, as a device's training process has one."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from coordinator.bench.child import answer, serve
from edge_sdk.errors import FedgeError
from edge_sdk.footprint import peak_kib

RUNTIMES = {
    "ort": "onnxruntime",
    "litert": "ai_edge_litert.interpreter",
    "tflite": "tflite_runtime.interpreter",
}
"""What an engine stands on, imported before the first reading of memory."""


def main() -> None:
    """``python -m coordinator.bench.ours FOLDER THREADS ENGINE``: serve steps until the end."""
    folder, threads, engine = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    import numpy  # noqa: F401, ICN001  loaded before the first reading, so that it is not counted

    try:
        import_module(RUNTIMES[engine])
    except ImportError as error:
        answer({"error": f"{engine} is not installed for {sys.executable}: {error}"})
        return
    before = peak_kib()
    from edge_sdk.bundle import Bundle
    from edge_sdk.trainer import Trainer

    try:
        trainer = Trainer(Bundle.load(folder / "task.fedge"), engine, threads)
    except FedgeError as error:
        answer({"error": str(error)})
        return
    serve(trainer.step, folder, runtime_kib=before)


if __name__ == "__main__":
    main()
