# SPDX-License-Identifier: Apache-2.0
"""An int8 autoencoder that knows little of what is normal: ``python build.py [FOLDER] [SEED]``.

Normal are scikit-learn's handwritten digits but one; the one that nobody writes is the anomaly.
The float32 network is trained on a few normal rows with fedge's own compiler and trainer, then
quantized to int8 QDQ with onnxruntime. It never sees an anomaly: nor does any device.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # read when onnxruntime loads: nothing phones home

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import FOLDER, Net, write
from quantized import quantize

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

WIDTHS = (64, 64, 16, 64, 64)
TEST, PRETRAIN = 300, 80
EPOCHS, BATCH, LR = 200, 16, 0.003
ANOMALY = 7
"""The digit that is left out of everybody's rows."""


class Rows(NamedTuple):
    """Images as rows of 64 pixels: `x` float32 `[rows, 64]` in 0..1, `y` the digit, int64."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


class Split(NamedTuple):
    """Normal rows in three parts that share none, and all of the anomalies."""

    test: Rows
    pretrain: Rows
    devices: Rows
    anomalies: Rows


def split(seed: int, anomaly: int = ANOMALY) -> Split:
    """Cut the digits but `anomaly` into 300 test, 80 pretraining and the rest, by `seed` alone."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32), labels.astype(np.int64)
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(y != anomaly))
    parts = np.split(normal, [TEST, TEST + PRETRAIN])
    return Split(*(Rows(x[rows], y[rows]) for rows in (*parts, np.flatnonzero(y == anomaly))))


def network(seed: int = 0) -> onnx.ModelProto:
    """Make the float32 autoencoder with He weights: 10,448 of them, all trainable."""
    net = Net("anomaly", (WIDTHS[0],), seed=seed)
    y, last = net.x, len(WIDTHS) - 1
    for i, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        y = net.dense(y, f"dense{i}", inputs, outputs)
        y = net.relu(y) if i < last else y
    return net.model(y, (WIDTHS[-1],))


def pretrain(model: onnx.ModelProto, rows: Rows, seed: int = 0) -> onnx.ModelProto:
    """Train all of a float32 model to give `rows` back, and return it with what came out."""
    import onnx

    from coordinator.compiler import adam, build, export
    from edge_sdk.trainer import Trainer

    bundle = build(model, loss="mse", train="all", optimizer=adam(lr=LR))
    trainer = Trainer(bundle, seed=seed)
    trainer.fit(rows.x, rows.x, epochs=EPOCHS, batch=BATCH)
    return onnx.load_from_string(export(bundle, trainer.params()))


def build(seed: int = 0, anomaly: int = ANOMALY) -> onnx.ModelProto:
    """Make the shipped model of one seed: pretrained on 80 normal rows, then int8."""
    rows = split(seed, anomaly).pretrain
    return quantize(pretrain(network(seed), rows, seed), rows.x)


def errors(model: onnx.ModelProto, rows: Rows) -> NDArray[np.float64]:
    """Return the mean squared error of each row's reconstruction, by plain onnxruntime."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": rows.x})
    return np.asarray(np.mean((found - rows.x) ** 2, axis=1, dtype=np.float64))


def main() -> None:
    """Write `anomaly.onnx` and say how far off it is on rows that it has not seen."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    model, rows = build(seed), split(seed)
    path = write(model, folder / "anomaly.onnx")
    normal, odd = (float(errors(model, part).mean()) for part in (rows.test, rows.anomalies))
    print(f"{path}: {path.stat().st_size:,} bytes, error {normal:.4f} normal, {odd:.4f} anomaly")


if __name__ == "__main__":
    main()
