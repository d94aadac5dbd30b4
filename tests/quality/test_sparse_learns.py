# SPDX-License-Identifier: Apache-2.0
"""A digit reader meets digits turned and inverted: what the chosen channels learn of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import Net
from loading import module_at

from coordinator.compiler import build, export, momentum
from edge_sdk.trainer import Trainer

Seeds = Callable[[int], range]


def _net(seed: int) -> Any:
    net = Net(("N", 1, 28, 28), seed=seed).conv("stem", 1, 16, 3, strides=[2, 2]).add("Relu")
    net.conv("second", 16, 32, 3, strides=[2, 2]).add("Relu").conv("third", 32, 48, 3).add("Relu")
    net.add("GlobalAveragePool").add("Flatten").dense("middle", 48, 48).add("Relu")
    return net.dense("head", 48, 10).model()


def _digits(shared: Path) -> dict[str, Any]:
    module = module_at(shared / "data" / "load.py")
    return {k: np.asarray(v) for k, v in module.load("mnist").items() if k[:2] in {"x_", "y_"}}


def _turned(x: Any) -> Any:
    return (1 - np.rot90(x.astype(np.float32), 1, (2, 3))).copy()


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(600)
def test_chosen_channels_learn_more_than_as_many_numbers_at_the_end(
    shared: Path, seeds: Seeds, figure: Callable[[str, object, str], None]
) -> None:
    data = _digits(shared)
    x, y = _turned(data["x_train"][6000:7000]), data["y_train"][6000:7000]
    tx, ty = _turned(data["x_test"][:3000]), data["y_test"][:3000]
    ways: dict[str, dict[str, Any]] = {
        "all": {"train": "all"},
        "sparse:0.25": {"train": "sparse:0.25"},
        "sparse:0.125": {"train": "sparse:0.125"},
        "sparse:0.125 by gradients": {"train": "sparse:0.125", "calibration": (x[:256], y[:256])},
        "last:2": {"train": "last:2"},
        "last:1": {"train": "last:1"},
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    numbers = {}
    for seed in seeds(3):
        start = build(_net(seed), loss="cross_entropy", optimizer=momentum(0.9, lr=0.05))
        first = Trainer(start, seed=seed)
        first.fit(data["x_train"][:6000], data["y_train"][:6000], epochs=6, batch=32)
        model = export(start, first.params())
        for name, asked in ways.items():
            made = build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.02), **asked)
            numbers[name] = made.manifest["cost"]["trainable"]
            trainer = Trainer(made, seed=seed)
            trainer.fit(x, y, epochs=8, batch=32)
            found[name].append(trainer.evaluate(tx, ty)["accuracy"])
    mean = {name: float(np.mean(scores)) for name, scores in found.items()}
    for name, score in mean.items():
        figure(f"digits turned and inverted, {name}: {numbers[name]} numbers", score, "")
    assert numbers["sparse:0.125"] < numbers["last:2"]
    assert mean["sparse:0.125"] > mean["last:2"] > mean["last:1"]
    assert mean["all"] > mean["sparse:0.25"] > mean["sparse:0.125"]
