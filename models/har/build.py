# SPDX-License-Identifier: Apache-2.0
"""A small 1-D CNN that tells what a person does from a phone: ``python build.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import Net, script

if TYPE_CHECKING:
    import onnx


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the model: 9 signals of 128 samples to the logits of 6 activities; He weights."""
    net = Net("har", (9, 128), seed=seed)
    y = net.relu(net.conv(net.x, "conv1", (32, 9, 5), pads=(2,)))
    y = net.op("MaxPool", [y], "pool1", kernel_shape=[2], strides=[2])
    y = net.relu(net.conv(y, "conv2", (48, 32, 5), pads=(2,)))
    y = net.op("MaxPool", [y], "pool2", kernel_shape=[2], strides=[2])
    y = net.relu(net.conv(y, "conv3", (72, 48, 3), pads=(1,)))
    y = net.op("GlobalAveragePool", [y], "pool")
    y = net.op("Flatten", [y], "features")
    return net.model(net.dense(y, "head", 72, 6), (6,))


if __name__ == "__main__":
    script(build, "har")
