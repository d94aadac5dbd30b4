# SPDX-License-Identifier: Apache-2.0
"""The image-classification ResNet8 of MLPerf Tiny, float32: ``python build.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import Net, script

if TYPE_CHECKING:
    import onnx


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the model: 3 x 32 x 32 images to the logits of 10 classes; He weights from `seed`."""
    net = Net("resnet8", (3, 32, 32), seed=seed)
    y = net.relu(net.conv(net.x, "conv", (16, 3, 3, 3), pads=(1, 1)))
    y = _block(net, y, "stack1", 16, 16)
    y = _block(net, y, "stack2", 16, 32)
    y = _block(net, y, "stack3", 32, 64)
    y = net.op("GlobalAveragePool", [y], "pool")
    y = net.op("Flatten", [y], "features")
    return net.model(net.dense(y, "head", 64, 10), (10,))


def _block(net: Net, x: str, name: str, inputs: int, outputs: int) -> str:
    """Add two 3 x 3 convolutions and the way around them, which halves the image as they do."""
    stride = 1 if inputs == outputs else 2
    y = net.conv(x, f"{name}.a", (outputs, inputs, 3, 3), stride=stride, pads=(1, 1))
    y = net.conv(net.relu(y), f"{name}.b", (outputs, outputs, 3, 3), pads=(1, 1))
    if stride == 2:
        x = net.conv(x, f"{name}.skip", (outputs, inputs, 1, 1), stride=2, pads=(0, 0))
    return net.relu(net.op("Add", [x, y], f"{name}.sum"))


if __name__ == "__main__":
    script(build, "resnet8")
