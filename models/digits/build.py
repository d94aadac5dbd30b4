# SPDX-License-Identifier: Apache-2.0
"""The model that the demo ships: an int8 CNN that has seen very few digits.

``python build.py [FOLDER] [SEED]`` splits scikit-learn's digits, trains a float32 CNN on the few
pretraining rows with fedge's own compiler and trainer, and quantizes it to int8 QDQ with
onnxruntime. The rows that devices hold and the rows that accuracy is measured on take no part.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # read when onnxruntime loads: nothing phones home

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantized
from layers import FOLDER, Net, write

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

TEST, PRETRAIN = 397, 80
EPOCHS, BATCH, LR, DECAY = 40, 16, 0.05, 0.9


class Rows(NamedTuple):
    """Labelled images: `x` float32 `[rows, 1, 8, 8]` in 0..1, `y` int64 `[rows]`."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


class Split(NamedTuple):
    """Three parts that share no row. Calibration uses the pretraining rows."""

    test: Rows
    pretrain: Rows
    devices: Rows


def split(seed: int) -> Split:
    """Cut the 1,797 digits into 397 test, 80 pretraining and 1,320 device rows, by `seed` alone."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(seed).permutation(len(x))
    parts = np.split(order, [TEST, TEST + PRETRAIN])
    return Split(*(Rows(x[rows], labels[rows].astype(np.int64)) for rows in parts))


def network(seed: int = 0) -> onnx.ModelProto:
    """Make the float32 CNN with He weights: 38,282 of them, all trainable."""
    net = Net("digits", (1, 8, 8), seed=seed)
    y = net.relu(net.conv(net.x, "conv1", (16, 1, 3, 3), pads=(1, 1)))
    y = net.relu(net.conv(y, "conv2", (32, 16, 3, 3), stride=2, pads=(1, 1)))
    y = net.op("Flatten", [y], "features")
    y = net.relu(net.dense(y, "hidden", 512, 64))
    return net.model(net.dense(y, "head", 64, 10), (10,))


def pretrain(model: onnx.ModelProto, rows: Rows, seed: int = 0) -> onnx.ModelProto:
    """Train all of a float32 model on `rows` and return it with the weights that came out."""
    import onnx

    from coordinator.compiler import build, export, momentum
    from edge_sdk.trainer import Trainer

    bundle = build(model, loss="cross_entropy", train="all", optimizer=momentum(DECAY, lr=LR))
    trainer = Trainer(bundle, seed=seed)
    trainer.fit(rows.x, rows.y, epochs=EPOCHS, batch=BATCH)
    return onnx.load_from_string(export(bundle, trainer.params()))


def quantize(model: onnx.ModelProto, rows: Rows) -> onnx.ModelProto:
    """Return the int8 QDQ form: weights per channel, activations from the range `rows` give."""
    return quantized.quantize(model, rows.x)


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the shipped model of one seed: pretrained on 80 rows, then int8."""
    rows = split(seed).pretrain
    return quantize(pretrain(network(seed), rows, seed), rows)


def accuracy(model: onnx.ModelProto, rows: Rows) -> float:
    """Return the share of `rows` that plain onnxruntime gets right with `model`."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": rows.x})
    return float(np.mean(np.argmax(logits, axis=1) == rows.y))


def main() -> None:
    """Write `digits.onnx` and say how good it is on rows that it has not seen."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    model = build(seed)
    path = write(model, folder / "digits.onnx")
    print(
        f"{path}: {path.stat().st_size:,} bytes, accuracy {accuracy(model, split(seed).test):.3f}"
    )


if __name__ == "__main__":
    main()
