# SPDX-License-Identifier: Apache-2.0
"""The measurement of int8 training runs, and its integer units do what the derivation says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forward_models import Steps, blobs, cnn

from coordinator.bench import int8
from coordinator.compiler import build, chain, momentum
from coordinator.compiler.graph import Graph
from edge_sdk.errors import ConfigError

X, LABELS = blobs((1, 8, 8), 4)


def test_every_way_is_measured_next_to_float() -> None:
    tables = int8.measure(seeds=1, steps=6)
    assert list(tables) == ["int8", "scaling"]
    ways = [(row["calibration"], row["ranges"]) for row in tables["int8"]]
    assert ways[0] == ("-", "-")
    assert len(set(ways)) == len(ways) == 1 + 2 * len(int8.SETTINGS)
    assert [row["units"] for row in tables["scaling"]] == ["masters", "integers", "integers, QAS"]
    for row in (*tables["int8"], *tables["scaling"]):
        assert 0 <= row["exported"] <= 1
        assert row["below_master"] == pytest.approx(100 * (row["master"] - row["exported"]))
        assert row["below_float"] == pytest.approx(100 * (row["float"] - row["exported"]), abs=1e-6)


def test_other_models_need_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data with rows for har"):
        int8.measure("har", seeds=1)
    rng = np.random.default_rng(0)
    rows = {
        "x_train": rng.standard_normal((90, 9, 128), np.float32),
        "y_train": rng.integers(0, 6, 90),
        "x_test": rng.standard_normal((10, 9, 128), np.float32),
        "y_test": rng.integers(0, 6, 10),
    }
    np.savez(tmp_path / "rows.npz", **rows)
    assert int8.measure("har", tmp_path / "rows.npz", seeds=1, steps=1)["int8"]


def test_a_poor_calibration_narrows_all_ranges_but_the_inputs() -> None:
    graphs = [Graph.from_model(int8.quantize(cnn(opset=17), X, share)) for share in (1.0, 0.25)]
    good, poor = (
        {
            n.inputs[0]: float(g.initializers[n.inputs[1]].reshape(()))
            for n in g.nodes
            if n.kind == "QuantizeLinear"
        }
        for g in graphs
    )
    assert poor["input"] == pytest.approx(good["input"])
    assert poor["relu_7"] < 0.6 * good["relu_7"]


def test_scaled_steps_in_integers_are_steps_of_masters_and_unscaled_ones_are_next_to_none() -> None:
    """s * s**-2 * s is 1; without the middle a weight moves by s**2 of its gradient."""
    model, optimizer = int8.quantize(cnn(opset=17), X), momentum(0.9, lr=0.05)
    levels = int8.steps_of(build(model, loss="cross_entropy"))
    ways = {
        "masters": optimizer,
        "scaled": chain(int8.in_levels(levels, is_scaled=True), optimizer),
        "unscaled": chain(int8.in_levels(levels, is_scaled=False), optimizer),
    }
    moved = {}
    for name, way in ways.items():
        run = Steps(build(model, loss="cross_entropy", optimizer=way))
        before = run.params()
        run.step(X, LABELS)
        moved[name] = {k: v - before[k] for k, v in run.params().items()}
    for i, (name, step) in enumerate(moved["masters"].items()):
        np.testing.assert_allclose(moved["scaled"][name], step, rtol=1e-3, atol=2e-7)
        slowest = np.broadcast_to(levels[i], step.shape)
        np.testing.assert_allclose(moved["unscaled"][name], slowest**2 * step, atol=2e-7)
