# SPDX-License-Identifier: Apache-2.0
"""What ``fedge selftest`` computes on: a small int8 network, compiled for every engine.

``python build.py [FILE]`` writes the bundle, by default the one that `edge_sdk` brings along, and
prints the answers that `edge_sdk/selftest.py` expects of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quantized
from layers import Net

from coordinator.compiler import build, momentum
from edge_sdk import selftest
from edge_sdk.bundle import Bundle
from edge_sdk.model import open_model
from edge_sdk.trainer import Trainer


def bundle() -> Bundle:
    """Compile two convolutions and a dense layer, int8, all of it trainable."""
    net = Net("selftest", (1, selftest.SIDE, selftest.SIDE))
    y = net.relu(net.conv(net.x, "conv1", (8, 1, 3, 3), pads=(1, 1)))
    y = net.relu(net.conv(y, "conv2", (16, 8, 3, 3), stride=2, pads=(1, 1)))
    y = net.op("Flatten", [y], "features")
    y = net.dense(y, "head", 256, selftest.CLASSES)
    x, _ = selftest.rows()
    model = quantized.quantize(net.model(y, (selftest.CLASSES,)), x)
    optimizer = momentum(0.9, lr=0.02)
    both = ("onnx", "tflite")
    return build(model, loss="cross_entropy", train="all", optimizer=optimizer, engines=both)


def main() -> None:
    """Write the bundle and say what it answers."""
    made = bundle()
    made.save(Path(sys.argv[1]) if len(sys.argv) > 1 else selftest.BUNDLE)
    x, y = selftest.rows()
    answers = open_model(made, made.member("params.bin"), 0).predict(x[0])
    trainer = Trainer(made)
    losses = [trainer.step(x, y) for _ in range(selftest.STEPS)]
    print(f"ANSWERS = {tuple(np.round(answers, 3).tolist())}")
    print(f"FIRST_LOSS, LAST_LOSS = {losses[0]:.3f}, {losses[-1]:.3f}")
    print(len(made.data), "bytes,", made.manifest["cost"]["params"], "weights")


if __name__ == "__main__":
    main()
