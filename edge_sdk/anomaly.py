# SPDX-License-Identifier: Apache-2.0
"""How far a model's answers are from what they should be: what an anomaly detector goes by. Pure.

An autoencoder that was trained on what is normal reconstructs the normal well and the rest badly.
Where "badly" begins is each device's own affair: a quantile of the errors on its own examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def errors(
    answers: NDArray[Any], targets: NDArray[Any], output: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Return the mean squared error of each row, float64 `[rows]`.

    `answers`: `[rows, ...]` as the model gives them, raw int8 where its output is int8; `targets`:
    as many numbers a row. `output`: the manifest's, whose scale says what a level is worth.
    """
    values = answers.astype(np.float64)
    if output["scale"] is not None:
        values = (values - output["zero_point"]) * output["scale"]
    apart = values.reshape(len(values), -1) - targets.reshape(len(targets), -1)
    return np.asarray(np.mean(apart**2, axis=1), np.float64)


def quantile(values: NDArray[np.float64], level: float) -> float:
    """Return the smallest of the values that at least `level` of them do not exceed.

    Raises: ValueError when there are none, or `level` is not above 0 and at most 1.
    """
    if not 0 < level <= 1:
        raise ValueError(f"expected a quantile above 0 and at most 1, got {level}")
    if not len(values):
        raise ValueError("expected examples to take a quantile of, there are none; learn some")
    return float(np.quantile(values, level, method="inverted_cdf"))
