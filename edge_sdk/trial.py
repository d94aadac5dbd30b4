# SPDX-License-Identifier: Apache-2.0
"""What a new model has to show before it is the one to go back to. Pure.

That it answers, with finite numbers, for a while. Not that it answers better: in federated learning
a version that is worse for one device is better for the others, and a device that stays behind
trains no more. Whoever wants the gate all the same sets `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk import anomaly
from edge_sdk.errors import ConfigError

FAULTS = 3
"""Answers that fail, or are not finite, before a model on trial is gone back from."""
LEAST_EXAMPLES = 32
"""With fewer, how well a model answers is chance."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a new version proves itself; the first of `answers` and `seconds` is enough.

    Raises: ConfigError for terms that no model can meet.
    """

    answers: int = 20
    """Predictions that were finite."""
    seconds: float = 60.0
    """Of running without a fault."""
    starts: int = 3
    """Processes that may die before it has: with the last of them it is gone back from."""
    margin: float | None = None
    """How far its error on the stored examples may be above that of the version before: for classes
    the share of wrong ones, else the mean squared error, relative. None does not ask."""

    def __post_init__(self) -> None:
        if self.answers < 1 or self.starts < 1 or not self.seconds >= 0:
            raise ConfigError("trial: expected answers and starts from 1, seconds from 0")
        if self.margin is not None and not self.margin >= 0:
            raise ConfigError(f"trial: expected a margin from 0, got {self.margin}")


class OnTrial:
    """A model's trial. Safe from several threads: it counts, and a count lost does no harm."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._answers = self._faults = 0
        self._since_s: float | None = None
        self._reason = ""

    def answered(self, x: NDArray[Any], answer: NDArray[Any]) -> None:
        """Take note of an answer."""
        if _is_finite(answer):
            self._answers += 1
        elif _is_finite(x):
            self.failed("it gave answers that are not finite")

    def failed(self, reason: str) -> None:
        """Take note of an answer that the model did not give, or should not have."""
        self._faults += 1
        self._reason = reason

    @property
    def is_over(self) -> bool:
        """Whether answers alone have decided it."""
        return self._answers >= self._terms.answers or self._faults >= FAULTS

    @property
    def fault(self) -> str:
        """What is wrong with the model; "" while nothing is for certain."""
        return self._reason if self._faults >= FAULTS else ""

    def is_proven(self, now_s: float | None) -> bool:
        """Whether the model has proved itself; time counts from the first `now_s` on."""
        if self._faults >= FAULTS:
            return False
        if self._since_s is None:
            self._since_s = now_s
        has_run = now_s is not None and now_s >= (self._since_s or 0.0) + self._terms.seconds
        return self._answers >= self._terms.answers or (has_run and not self._faults)


def error(
    loss: str, answers: NDArray[Any], labels: NDArray[Any], output: dict[str, Any]
) -> float | None:
    """Return how wrong answers are; None for a loss that does not say.

    For cross_entropy the share of wrong classes, for mse the mean squared error.
    """
    if len(labels) < LEAST_EXAMPLES:
        return None
    if loss == "cross_entropy":
        return float(np.mean(answers.reshape(len(answers), -1).argmax(1) != labels.ravel()))
    if loss == "mse":
        return float(np.mean(anomaly.errors(answers, labels, output)))
    return None


def is_worse(loss: str, new: float, old: float, margin: float) -> bool:
    """Whether an error is above another by more than a margin allows."""
    return new > (old + margin if loss == "cross_entropy" else old * (1 + margin))


def _is_finite(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())
