# SPDX-License-Identifier: Apache-2.0
"""Accuracy as a user of the exported file would measure it: plain onnxruntime, outside the SDK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler import export
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer
from edge_sdk.types import Params


def accuracy(model: bytes, x: NDArray[Any], y: NDArray[Any]) -> float:
    """Share of rows whose largest output is the label, by a session that knows nothing of fedge."""
    import onnxruntime  # after edge_sdk.engine has switched its telemetry off

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    (output,) = session.run(None, {entry.name: _as_input(entry.type, x)})[:1]
    return float(np.mean(np.argmax(output.reshape(len(x), -1), axis=1) == y))


def _as_input(kind: str, x: NDArray[Any]) -> NDArray[Any]:
    dtypes = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
    return np.ascontiguousarray(x, dtypes[kind])


def exported(bundle: Bundle, params: Params, x: NDArray[Any], y: NDArray[Any]) -> float:
    """Accuracy of the inference model that `params` give, in the form that was shipped."""
    return accuracy(export(bundle, params), x, y)


def alone(
    bundle: Bundle,
    rows: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    steps: Sequence[int],
    test: tuple[NDArray[Any], NDArray[Any]],
    *,
    batch: int,
    seed: int,
) -> list[float]:
    """Accuracy of each device had it trained by itself: same start, same number of local steps."""
    trainer = Trainer(bundle, seed=seed)
    start, scores = bundle.params(), []
    for (x, y), count in zip(rows, steps, strict=True):
        trainer.load_params(start)
        trainer.reset_optimizer()
        if count:
            trainer.fit(x, y, epochs=count, batch=batch, steps=count)
        scores.append(exported(bundle, trainer.params(), *test))
    return scores
