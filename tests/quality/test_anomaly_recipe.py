# SPDX-License-Identifier: Apache-2.0
"""The anomaly federation without its processes, for each digit that may be the one left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from federation import Plan, federate

from coordinator.compiler import adam, build, export
from coordinator.demo import detection, score
from coordinator.demo.data import dirichlet
from coordinator.recipes import recipe
from edge_sdk.bundle import Bundle

ROUNDS, EPOCHS, BATCH, LR, DEVICES = 15, 4, 16, 0.003, 10


def _found(digit: int, seed: int) -> dict[str, float]:
    """Return AUCs, and what the median of the devices' thresholds finds and mistakes."""
    anomaly = recipe("anomaly")
    rows, model = anomaly.split(seed, digit), anomaly.build(seed, digit)
    bundle: Bundle = build(model.SerializeToString(), loss="mse", optimizer=adam(lr=LR))
    x = np.concatenate([rows.test.x, rows.anomalies.x])
    odd = np.repeat([0, 1], [len(rows.test.x), len(rows.anomalies.x)])
    judge = score.Judge(bundle, x, odd)
    owner = dirichlet(rows.devices.y, DEVICES, 0.5, np.random.default_rng(seed))
    own: list[tuple[Any, Any]] = [(rows.devices.x[owner == i],) * 2 for i in range(DEVICES)]
    plan = Plan(ROUNDS, DEVICES, EPOCHS, BATCH, LR, seed=seed)
    done = federate(bundle, own, plan, lambda _: 0.0)
    together = export(bundle, done.params)
    steps = [ROUNDS * EPOCHS * -(-len(one[0]) // BATCH) for one in own]
    alone = score.alone(judge, own, steps, batch=BATCH, seed=seed)
    agreed = detection.agree([judge.threshold(together, one) for one in own])
    found = judge.detection(together, agreed)
    return {
        "shipped": judge.score(bundle.params()),
        "alone": float(np.mean([judge.score_of(model) for model in alone])),
        "together": found.auc,
        "found": found.detected,
        "false alarms": found.false_alarms,
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whichever_digit_is_left_out_devices_find_it_better_together(
    seeds: Callable[[int], range], figure: Callable[..., None]
) -> None:
    table = []
    for digit in range(10):
        runs = [_found(digit, seed) for seed in seeds(3)]
        means = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        table.append(means)
        for name, value in means.items():
            figure(f"anomaly, digit {digit}: {name}", value)
    mean = {name: float(np.mean([row[name] for row in table])) for name in table[0]}
    for name, value in mean.items():
        figure(f"anomaly, mean of the digits: {name}", value)
    assert mean["together"] >= mean["shipped"] + 0.04
    assert mean["together"] >= mean["alone"] + 0.06
    assert sum(row["together"] > max(row["shipped"], row["alone"]) for row in table) >= 9
    assert mean["false alarms"] <= 0.12
