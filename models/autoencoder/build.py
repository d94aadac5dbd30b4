# SPDX-License-Identifier: Apache-2.0
"""The anomaly-detection autoencoder of MLPerf Tiny, float32: ``python build.py [FOLDER]``."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from layers import Net, script

if TYPE_CHECKING:
    import onnx

WIDTHS = (640, 128, 128, 128, 128, 8, 128, 128, 128, 128, 640)


def build(seed: int = 0) -> onnx.ModelProto:
    """Make the model: 640 spectrogram bins to their reconstruction; He weights from `seed`."""
    net = Net("autoencoder", (640,), seed=seed)
    y, last = net.x, len(WIDTHS) - 1
    for i, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        y = net.dense(y, f"dense{i}", inputs, outputs)
        y = net.relu(y) if i < last else y
    return net.model(y, (640,))


if __name__ == "__main__":
    script(build, "autoencoder")
