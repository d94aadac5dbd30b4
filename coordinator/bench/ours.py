# SPDX-License-Identifier: Apache-2.0
"""Our side of `fedge bench step`: a `Trainer`, as a device's training process has one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from coordinator.bench.child import serve
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer


def main() -> None:
    """``python -m coordinator.bench.ours FOLDER THREADS``: serve steps until the pipe closes."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    trainer = Trainer(Bundle.load(folder / "task.fedge"), threads=threads)
    serve(trainer.step, np.load(folder / "x.npy"), np.load(folder / "y.npy"))


if __name__ == "__main__":
    main()
