# SPDX-License-Identifier: Apache-2.0
"""FedDyn's two halves are what its paper writes, and come to rest where FedAvg does not."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import optimizers, strategy
from edge_sdk.correction import CORRECTIONS

ALPHA = 0.5
CURVES = np.array([[1.0, 4.0], [3.0, 1.0], [2.0, 9.0], [5.0, 2.0]])
RESTS = np.array([[2.0, -1.0], [-3.0, 0.5], [1.0, 4.0], [0.0, -2.0]])
"""Device k has the loss sum(CURVES[k] / 2 * (w - RESTS[k])**2)."""
BEST = (CURVES * RESTS).sum(0) / CURVES.sum(0)


def minimum(k: int, pull: float, anchor: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return where device k's loss + pull/2 |w - anchor|^2 - slope . w is least."""
    return (CURVES[k] * RESTS[k] + pull * anchor + slope) / (CURVES[k] + pull)


def by_the_paper(cohorts: list[list[int]]) -> list[np.ndarray]:
    """Acar et al. 2021, algorithm 1, as it is written."""
    theta, h, slopes = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    made = []
    for cohort in cohorts:
        models = {k: minimum(k, ALPHA, theta, slopes[k]) for k in cohort}
        for k, model in models.items():
            slopes[k] = slopes[k] - ALPHA * (model - theta)
        h = h - ALPHA * sum(model - theta for model in models.values()) / 4
        theta = sum(models.values()) / len(cohort) - h / ALPHA
        made.append(theta)
    return made


def by_ours(cohorts: list[list[int]], kind: str = "feddyn") -> list[np.ndarray]:
    server = strategy.feddyn(ALPHA, devices=4).server if kind == "feddyn" else optimizers.sgd()
    state, params, owns = server.init(2), np.zeros(2, np.float32), np.zeros((4, 2), np.float32)
    made = []
    for cohort in cohorts:
        deltas = []
        for k in cohort:
            anchor = CORRECTIONS["feddyn"].anchor(params, owns[k])
            local = minimum(k, ALPHA, anchor, np.zeros(2)).astype(np.float32)
            deltas.append(local - params)
            if kind == "feddyn":
                owns[k] = CORRECTIONS["feddyn"].after(owns[k], deltas[-1])
        mean = np.mean(deltas, 0, dtype=np.float32)
        params, state = server.step(params, mean, state, len(cohort))
        made.append(params)
    return made


@pytest.mark.parametrize("cohort", [1, 2, 4])
def test_rounds_of_feddyn_are_those_of_its_paper(cohort: int) -> None:
    rng = np.random.default_rng(cohort)
    cohorts = [rng.choice(4, cohort, replace=False).tolist() for _ in range(25)]
    np.testing.assert_allclose(by_ours(cohorts), by_the_paper(cohorts), atol=2e-5)


def test_feddyn_comes_to_the_joint_optimum_and_the_mean_of_models_does_not() -> None:
    everybody = [[0, 1, 2, 3]] * 200
    assert np.abs(by_ours(everybody)[-1] - BEST).max() < 1e-3
    assert np.abs(by_ours(everybody, "fedprox")[-1] - BEST).max() > 0.1


def test_a_first_round_and_a_second_by_hand() -> None:
    """One device of two of loss (w - 1)^2 / 2, alpha 1: 0 -> 1/2, then the anchor is -1/2."""
    feddyn, server = CORRECTIONS["feddyn"], strategy.feddyn(1.0, devices=2).server
    own, w = np.zeros(1, np.float32), np.zeros(1, np.float32)
    delta = np.float32([0.5])
    own = feddyn.after(own, delta)
    w, state = server.step(w, delta, server.init(1), 1)
    assert w.tolist() == [0.75]  # 0 + 0.5 + (1 / 2) * 0.5
    assert feddyn.anchor(w, own).tolist() == [0.25]
    w, _ = server.step(w, np.float32([-0.125]), state, 1)
    assert w.tolist() == [0.8125]  # 0.75 - 0.125 + 0.25 - 0.0625
