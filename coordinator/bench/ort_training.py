# SPDX-License-Identifier: Apache-2.0
"""A rival of `fedge bench step`: onnxruntime-training-cpu 1.19.2, the last of its kind.

It runs under a Python of its own (`--peer-python`), for its package takes onnxruntime's place. Its
graphs are made in one process, which loads onnx, and run in another, which does not. Three things
stand between that release and today's packages, and are stepped around here as its users do:
`onnxruntime.training` imports torch, which training itself never needs, so the package's
`__init__` is passed by; today's onnx writes a newer IR than its runtime reads; and its optimizer
is SGD without momentum, so the others train without, too.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from coordinator.bench.child import answer, serve

READS_IR = 10
"""The newest IR version that its runtime reads."""

_QUIET = 3
_LOSSES = {"cross_entropy": "CrossEntropyLoss", "mse": "MSELoss", "bce_logits": "BCEWithLogitsLoss"}


def main() -> None:
    """Make a rival's graphs, or serve steps until the pipe closes.

    ``python -m coordinator.bench.ort_training FOLDER THREADS make``: read `plan.json` and
    `model.onnx`, leave its graphs and a checkpoint; one line of JSON says ``{}`` or an error.
    ``python -m coordinator.bench.ort_training FOLDER THREADS``: train.
    """
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3:] == ["make"]:
        answer(_made(folder))
    else:
        _train(folder, threads)


def _made(folder: Path) -> dict[str, str]:
    try:
        runtime = _runtime()
    except ImportError as error:
        return {"error": f"onnxruntime-training is not installed for {sys.executable}: {error}"}
    plan = json.loads((folder / "plan.json").read_text())
    said = os.dup(1)
    os.dup2(2, 1)  # its builder prints
    try:
        _make(runtime, plan, folder)
    except Exception as error:  # noqa: BLE001  its classes share no other root; the row says it
        line = " ".join(str(error).split())[:200]
        return {"error": f"onnxruntime-training has no gradients here: {line}"}
    finally:
        os.dup2(said, 1)
    return {}


def _make(runtime: Any, plan: dict[str, Any], folder: Path) -> None:
    import onnx
    from onnxruntime.training import artifacts

    runtime.set_default_logger_severity(_QUIET)
    model = onnx.load(folder / "model.onnx")
    stored = [t.name for t in model.graph.initializer]
    artifacts.generate_artifacts(
        model,
        requires_grad=plan["trains"],
        frozen_params=[name for name in stored if name not in plan["trains"]],
        loss=getattr(artifacts.LossType, _LOSSES[plan["loss"]]),
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=folder,
    )
    for file in folder.glob("*_model.onnx"):
        made = onnx.load(file)
        made.ir_version = min(made.ir_version, READS_IR)
        onnx.save(made, file)


def _train(folder: Path, threads: int) -> None:
    runtime = _runtime()
    from onnxruntime.training.api.checkpoint_state import CheckpointState
    from onnxruntime.training.api.module import Module
    from onnxruntime.training.api.optimizer import Optimizer

    runtime.set_default_logger_severity(_QUIET)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _QUIET
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, session_options=options)
    optimizer = Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(json.loads((folder / "plan.json").read_text())["lr"])

    def step(x: Any, y: Any) -> float:
        loss = module(x, y)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    serve(step, folder)


def _runtime() -> Any:
    """Import the runtime, with an `onnxruntime.training` whose `__init__` is not run."""
    import onnxruntime

    name = "onnxruntime.training"
    place = Path(onnxruntime.__file__).parent / "training"
    if not (place / "api").is_dir():
        raise ImportError(f"onnxruntime {onnxruntime.__version__} is the plain one")
    package = ModuleType(name)
    package.__path__ = [os.fspath(place)]
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules[name] = package
    return onnxruntime


if __name__ == "__main__":
    main()
