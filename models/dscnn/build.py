# SPDX-License-Identifier: Apache-2.0
"""The keyword-spotting DS-CNN of MLPerf Tiny, float32: ``python build.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import Net, script

if TYPE_CHECKING:
    import onnx


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the model: 49 x 10 MFCC frames to the logits of 12 words; He weights from `seed`."""
    net = Net("dscnn", (1, 49, 10), seed=seed)
    y = net.relu(net.conv(net.x, "conv", (64, 1, 10, 4), stride=2, pads=(5, 1)))
    for block in range(1, 5):
        y = net.relu(net.conv(y, f"depth{block}", (64, 1, 3, 3), pads=(1, 1), group=64))
        y = net.relu(net.conv(y, f"point{block}", (64, 64, 1, 1), pads=(0, 0)))
    y = net.op("GlobalAveragePool", [y], "pool")
    y = net.op("Flatten", [y], "features")
    return net.model(net.dense(y, "head", 64, 12), (12,))


if __name__ == "__main__":
    script(build, "dscnn")
