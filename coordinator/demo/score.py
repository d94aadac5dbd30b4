# SPDX-License-Identifier: Apache-2.0
"""What an exported file is worth to its user: run by its format's stock runtime, not by the SDK."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler import export
from coordinator.demo import detection
from coordinator.demo.detection import Detection
from edge_sdk.bundle import Bundle
from edge_sdk.engine import AUTO
from edge_sdk.errors import ConfigError
from edge_sdk.trainer import Trainer
from edge_sdk.types import Params

Rows = tuple[NDArray[Any], NDArray[Any]]
MOST_ALONE = 25
"""So many devices, evenly chosen, are enough to say how one does by itself."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores of models of one bundle on rows that no device has.

    `y`: the classes, scored by accuracy; or, for a bundle of loss mse, 1 for an anomaly and 0 for
    a normal row, scored by the AUC of the reconstruction's error.
    """

    bundle: Bundle
    x: NDArray[Any]
    y: NDArray[Any]

    @property
    def finds_anomalies(self) -> bool:
        """Whether errors are judged, not classes."""
        return bool(self.bundle.manifest["loss"] == "mse")

    @property
    def measure(self) -> str:
        """What `score` is called."""
        return "AUC" if self.finds_anomalies else "accuracy"

    def score(self, params: Params) -> float:
        """Return the score of the inference model that `params` give, in the form it ships in."""
        return self.score_of(export(self.bundle, params))

    def score_of(self, model: bytes) -> float:
        """Return the score of an exported file."""
        if self.finds_anomalies:
            return detection.auc(self.errors(model, self.x), self.y == 1)
        answers = run(self.bundle, model, self.x)
        return float(np.mean(np.argmax(answers.reshape(len(self.x), -1), axis=1) == self.y))

    def errors(self, model: bytes, x: NDArray[Any]) -> NDArray[np.float64]:
        """Return how far each row's reconstruction is off, mean squared."""
        apart = run(self.bundle, model, x).reshape(len(x), -1) - x.reshape(len(x), -1)
        return np.asarray(np.mean(apart**2, axis=1), np.float64)

    def detection(self, model: bytes, threshold: float) -> Detection:
        """Return what a threshold finds of the anomalies, and what it takes for one."""
        return detection.detect(self.errors(model, self.x), self.y == 1, threshold)

    def threshold(self, model: bytes, rows: Rows) -> float:
        """Return what one device would say of its own rows."""
        return float(np.quantile(self.errors(model, rows[0]), detection.LEVEL))


def alone(
    judge: Judge,
    rows: Sequence[Rows],
    steps: Sequence[int],
    *,
    batch: int,
    seed: int,
    engine: str = AUTO,
) -> list[bytes]:
    """Return the model that each device would have had it trained by itself: same start.

    `steps`: how many local steps each takes.
    """
    trainer = Trainer(judge.bundle, engine, seed=seed)
    start, models = judge.bundle.params(), []
    for (x, y), count in zip(rows, steps, strict=True):
        trainer.load_params(start)
        trainer.reset_optimizer()
        if count:
            trainer.fit(x, y, epochs=count, batch=batch, steps=count)
        models.append(export(judge.bundle, trainer.params()))
    return models


def run(bundle: Bundle, model: bytes, x: NDArray[Any]) -> NDArray[np.float64]:
    """Return an exported model's answers in real numbers, `[rows, ...]`.

    Raises: ConfigError when the stock runtime of its format is not installed.
    """
    manifest = bundle.manifest
    runner = {"onnx": _onnxruntime, "tflite": _litert}[manifest["source"]]
    answers = runner(model, _as_input(manifest["input"], x)).astype(np.float64)
    output = manifest["output"]
    if output["scale"] is None:
        return answers
    return np.asarray((answers - int(output["zero_point"])) * float(output["scale"]))


def _as_input(entry: Mapping[str, Any], x: NDArray[Any]) -> NDArray[Any]:
    """Quantize real inputs as the application around an int8 model does."""
    dtype = np.dtype(entry["dtype"])
    if entry["scale"] is None or x.dtype == dtype:
        return np.ascontiguousarray(x, dtype)
    levels = np.rint(x.astype(np.float32) / np.float32(entry["scale"])) + entry["zero_point"]
    return np.asarray(np.clip(levels, np.iinfo(dtype).min, np.iinfo(dtype).max), dtype)


def _onnxruntime(model: bytes, x: NDArray[Any]) -> NDArray[Any]:
    import onnxruntime  # after edge_sdk.engine has switched its telemetry off

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    batches = np.split(x, len(x)) if entry.shape[0] == 1 else [x]
    return np.concatenate([session.run(None, {entry.name: batch})[0] for batch in batches])


def _litert(model: bytes, x: NDArray[Any]) -> NDArray[Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped] # it has no types
    except ModuleNotFoundError as error:
        if error.name != "ai_edge_litert":
            raise
        said = "expected LiteRT to measure a .tflite file with; pip install 'fedge[litert]'"
        raise ConfigError(said) from None
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    entry, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    answers = []
    for row in x:
        interpreter.set_tensor(entry["index"], row[np.newaxis])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(output["index"]))
    return np.concatenate(answers)
