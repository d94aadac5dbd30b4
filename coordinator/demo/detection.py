# SPDX-License-Identifier: Apache-2.0
"""How well errors tell the anomalies from the normal rows: AUC, and what a threshold finds. Pure.

Each device knows one number about itself: the error that most of its own rows stay within. Their
median is the federation's threshold: no device, odd or lying, moves it far. Rows stay where they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""The share of its own rows that a device's threshold takes as normal."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What one model finds, as shares of 1."""

    auc: float
    """The chance that an anomaly's error is above that of a normal row."""
    detected_at_level: float
    """Anomalies above the error that `LEVEL` of the normal test rows stay within."""
    detected: float
    """Anomalies above the threshold that came from the devices."""
    false_alarms: float
    """Normal test rows above it."""
    threshold: float


def agree(thresholds: Sequence[float]) -> float:
    """Return the threshold of the federation from those of its devices."""
    return float(np.median(np.asarray(thresholds, np.float64)))


def auc(errors: NDArray[Any], is_anomaly: NDArray[Any]) -> float:
    """Return the area under the ROC curve; ties count half (Mann and Whitney 1947)."""
    odd, normal = np.asarray(errors)[is_anomaly], np.sort(np.asarray(errors)[~is_anomaly])
    below = np.searchsorted(normal, odd, "left") + np.searchsorted(normal, odd, "right")
    return float(np.mean(below) / (2 * len(normal)))


def detect(errors: NDArray[Any], is_anomaly: NDArray[Any], threshold: float) -> Detection:
    """Judge the errors of the test rows against a threshold that knows nothing of them."""
    odd, normal = np.asarray(errors)[is_anomaly], np.asarray(errors)[~is_anomaly]
    fair = np.quantile(normal, LEVEL, method="inverted_cdf")
    return Detection(
        auc=auc(errors, is_anomaly),
        detected_at_level=float(np.mean(odd > fair)),
        detected=float(np.mean(odd > threshold)),
        false_alarms=float(np.mean(normal > threshold)),
        threshold=threshold,
    )


def mean(found: Sequence[Detection]) -> Detection:
    """Return the mean of several devices, each with a model and a threshold of its own."""
    names = Detection.__slots__
    return Detection(**{n: float(np.mean([getattr(one, n) for one in found])) for n in names})
