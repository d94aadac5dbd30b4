# SPDX-License-Identifier: Apache-2.0
"""The measured side of `fedge bench memory`: a process that trains and says how much it grew."""

from __future__ import annotations

import sys
from pathlib import Path

STEPS = 8
"""Enough for the arena to settle."""


def main() -> None:
    """``python -m coordinator.bench.grower FOLDER THREADS``: one line of JSON, KiB at the peak.

    FOLDER holds ``task.fedge``, and one batch in ``x.npy`` and ``y.npy``.
    """
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    import json

    import numpy as np
    import onnxruntime  # noqa: F401  loaded before the first reading, so that it is not counted

    from edge_sdk.footprint import peak_kib

    before = peak_kib()
    from edge_sdk.bundle import Bundle
    from edge_sdk.trainer import Trainer

    trainer = Trainer(Bundle.load(folder / "task.fedge"), threads=threads)
    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    trainer.fit(x, y, epochs=None, batch=len(x), steps=STEPS)
    sys.stdout.write(json.dumps({"runtime_kib": before, "peak_kib": peak_kib()}) + "\n")


if __name__ == "__main__":
    main()
