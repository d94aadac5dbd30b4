# SPDX-License-Identifier: Apache-2.0
"""Errors, thresholds, and what they find; the device's part of it and the demo's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_bundles import mlp

from coordinator.compiler import adam, build
from coordinator.demo import detection
from coordinator.recipes import recipe
from edge_sdk import anomaly
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError
from edge_sdk.local import Local, NoModelError
from edge_sdk.store import Store


def test_auc_is_the_share_of_pairs_in_order_ties_half() -> None:
    errors, odd = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert detection.auc(errors, odd) == (1 + 0.5 + 1 + 1) / 4
    assert detection.auc(-errors, odd) == 1 - detection.auc(errors, odd)


def test_auc_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    errors, odd = rng.integers(0, 20, 300) + 0.0, rng.random(300) < 0.3
    assert detection.auc(errors, odd) == pytest.approx(roc_auc_score(odd, errors), abs=1e-12)


def test_a_threshold_finds_what_is_above_it() -> None:
    errors = np.concatenate([np.arange(100.0), [95.5, 200.0]])
    found = detection.detect(errors, np.arange(102) >= 100, threshold=97.0)
    assert (found.detected, found.false_alarms) == (0.5, 0.02)
    assert found.detected_at_level == 1.0  # 0.95 of the normal rows stay within 94


def test_one_lying_device_moves_the_threshold_no_further_than_its_neighbour() -> None:
    honest = [0.9, 1.0, 1.1, 1.2]
    assert 0.9 <= detection.agree([*honest, 1e9]) <= 1.2
    assert 0.9 <= detection.agree([*honest, -1e9]) <= 1.2


def test_errors_are_of_what_int8_answers_stand_for() -> None:
    output = {"scale": 0.5, "zero_point": -2}
    found = anomaly.errors(np.array([[0, 2], [-2, -2]], np.int8), np.zeros((2, 2)), output)
    assert found.tolist() == [(1.0 + 4.0) / 2, 0.0]


def test_a_quantile_is_an_error_that_was_seen() -> None:
    assert anomaly.quantile(np.arange(1.0, 101.0), 0.95) == 95.0
    assert anomaly.quantile(np.array([7.0]), 0.95) == 7.0
    with pytest.raises(ValueError, match="there are none"):
        anomaly.quantile(np.empty(0), 0.95)
    with pytest.raises(ValueError, match="above 0"):
        anomaly.quantile(np.ones(3), 0.0)


def autoencoder() -> Bundle:
    return build(recipe("anomaly").network(), loss="mse", optimizer=adam(lr=0.01))


def local(folder: Path, bundle: Bundle | None, **options: Any) -> Local:
    return Local(Store(folder), bundle, engine="ort", **options)


def test_a_device_knows_the_error_that_most_of_its_own_rows_stay_within(tmp_path: Path) -> None:
    device = local(tmp_path, autoencoder(), quantile=0.9)
    assert device.threshold is None  # nothing was learned yet
    x = np.random.default_rng(0).normal(size=(150, 64)).astype(np.float32)
    device.learn(x, x)
    apart = np.mean((device.predict(x).astype(np.float64) - x) ** 2, axis=1)
    assert device.threshold == pytest.approx(np.quantile(apart, 0.9, method="inverted_cdf"))
    before = device.threshold
    device.learn(10 * x, 10 * x)
    assert device.threshold is not None
    assert device.threshold > before  # reckoned anew


def test_no_quantile_is_asked_of_a_classifier_or_of_nothing(tmp_path: Path) -> None:
    classifier = local(tmp_path / "c", mlp())
    classifier.learn(np.zeros((3, 6), np.float32), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="loss mse"):
        classifier.error_quantile(0.9)
    with pytest.raises(NoModelError):
        local(tmp_path / "n", None).error_quantile(0.9)


def test_a_quantile_out_of_range_is_refused_in_the_configuration() -> None:
    from edge_sdk import device_config

    table = {"broker": "mqtt://localhost", "task": "t", "error_quantile": 1.5}
    with pytest.raises(ConfigError, match="error_quantile: expected above 0"):
        device_config.parse(table)
