# SPDX-License-Identifier: Apache-2.0
"""An int8 autoencoder learns what is normal everywhere, and each device says where odd begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest

from coordinator.compiler import adam, build
from coordinator.demo.cli import parser, settings
from coordinator.demo.report import Record
from coordinator.demo.run import demo
from coordinator.recipes import recipe
from edge_sdk.trainer import Trainer

Figure = Callable[[str, object, str], None]
Seeds = Callable[[int], range]


def test_nobody_holds_an_anomaly_and_no_row_is_used_twice() -> None:
    anomaly = recipe("anomaly")
    for seed in range(3):
        parts = anomaly.split(seed)
        for part in (parts.test, parts.pretrain, parts.devices):
            assert anomaly.ANOMALY not in part.y
        assert set(parts.anomalies.y) == {anomaly.ANOMALY}
        assert sum(len(part.y) for part in parts) == 1797


def test_the_shipped_model_is_int8_small_and_the_same_each_time() -> None:
    anomaly = recipe("anomaly")
    first, second = (anomaly.build(0).SerializeToString() for _ in range(2))
    assert first == second
    assert len(first) < 25_000
    bundle = build(first, loss="mse", optimizer=adam(lr=0.003))
    assert bundle.manifest["cost"]["trainable"] == 10_448
    rows = anomaly.split(0)
    trainer = Trainer(bundle)
    before = trainer.evaluate(rows.test.x, rows.test.x)["loss"]
    trainer.fit(rows.devices.x, rows.devices.x, epochs=5, batch=16)
    assert trainer.evaluate(rows.test.x, rows.test.x)["loss"] < 0.7 * before


def run(work: Path, seed: int) -> Record:
    chosen = settings(vars(parser().parse_args(["--recipe", "anomaly", "--seed", str(seed)])))
    return asyncio.run(demo(chosen, work, show=print))


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_together_devices_find_what_none_has_seen(
    tmp_path: Path, seeds: Seeds, figure: Figure
) -> None:
    records = [run(tmp_path / str(seed), seed) for seed in seeds(5)]

    def of(name: str, field: str) -> float:
        return mean(r.anomalies[name][field] for r in records)

    for name in ("shipped", "alone", "together"):
        figure(f"anomaly: AUC, {name}", of(name, "auc"), "")
        figure(f"anomaly: found at 5 % false alarms, {name}", of(name, "detected_at_level"), "")
        figure(f"anomaly: found by the devices' threshold, {name}", of(name, "detected"), "")
        figure(f"anomaly: false alarms at that threshold, {name}", of(name, "false_alarms"), "")
    assert of("together", "auc") >= 0.95
    assert of("together", "auc") >= of("shipped", "auc") + 0.04
    assert of("together", "auc") >= of("alone", "auc") + 0.06
    assert of("together", "detected") >= 0.75
    assert of("together", "false_alarms") <= 0.12
    assert of("alone", "false_alarms") >= 2 * of("together", "false_alarms")
    for record in records:
        told = record.anomalies["thresholds"]
        assert len(told) == len(record.devices)
        assert record.anomalies["together"]["threshold"] == median(told)
        assert np.all(np.asarray(told) > 0)
