# SPDX-License-Identifier: Apache-2.0
"""The visual-wake-words MobileNetV1 0.25 of MLPerf Tiny: ``python build.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import Net, script

if TYPE_CHECKING:
    import onnx

# Filters and stride of each depthwise-separable block, at width 0.25.
BLOCKS = (
    *((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)),
    *((128, 1), (128, 1), (128, 1), (128, 1), (128, 1), (256, 2), (256, 1)),
)


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the model: 3 x 96 x 96 images to the logits of 2 classes; He weights from `seed`."""
    net = Net("mobilenet", (3, 96, 96), seed=seed)
    y, width = net.relu(net.conv(net.x, "conv", (8, 3, 3, 3), stride=2, pads=(1, 1))), 8
    for i, (filters, stride) in enumerate(BLOCKS, start=1):
        depth = (width, 1, 3, 3)
        y = net.relu(net.conv(y, f"depth{i}", depth, stride=stride, pads=(1, 1), group=width))
        y = net.relu(net.conv(y, f"point{i}", (filters, width, 1, 1), pads=(0, 0)))
        width = filters
    y = net.op("GlobalAveragePool", [y], "pool")
    y = net.op("Flatten", [y], "features")
    return net.model(net.dense(y, "head", width, 2), (2,))


if __name__ == "__main__":
    script(build, "mobilenet")
