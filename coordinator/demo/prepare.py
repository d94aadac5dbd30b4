# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a bundle, each device's rows, and the rows that measure the outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordinator.compiler import adam, build, momentum
from coordinator.demo.data import Split, dirichlet, divide, load
from coordinator.demo.score import Judge
from coordinator.demo.settings import Settings
from coordinator.recipes import recipe
from edge_sdk.bundle import Bundle
from edge_sdk.engine import AUTO, ENGINES

ALPHA = 0.5
"""Of the Dirichlet split of the digits: a device has many of some digits and none of others."""


class Start(NamedTuple):
    """The bundle that every process is given, and whose rows are whose."""

    bundle: Bundle
    split: Split

    @property
    def judge(self) -> Judge:
        """What scores models on the test rows."""
        return Judge(self.bundle, self.split.x_test, self.split.y_test)


def prepare(settings: Settings) -> Start:
    """Build the bundle and split the rows; the same seed gives the same start."""
    if settings.model is not None and settings.data is not None:
        bundle = _bundle(settings, settings.model, settings.model.stem)
        return Start(bundle, load(settings.data, settings.devices))
    return _anomaly(settings) if settings.recipe == "anomaly" else _digits(settings)


def _digits(settings: Settings) -> Start:
    digits = recipe("digits")
    rows = digits.split(settings.seed)
    split = _shared_out(rows.devices, rows.devices.y, settings)
    model = digits.build(settings.seed).SerializeToString()
    return Start(_bundle(settings, model, "digits"), Split(split.devices, *rows.test))


def _anomaly(settings: Settings) -> Start:
    """Rows that are to be given back as they came; the test asks which of them are odd."""
    anomaly = recipe("anomaly")
    rows = anomaly.split(settings.seed)
    split = _shared_out(rows.devices, rows.devices.x, settings)
    x = np.concatenate([rows.test.x, rows.anomalies.x])
    is_odd = np.repeat([0, 1], [len(rows.test.x), len(rows.anomalies.x)])
    model = anomaly.build(settings.seed).SerializeToString()
    return Start(_bundle(settings, model, "anomaly"), Split(split.devices, x, is_odd))


def _shared_out(rows: Any, targets: NDArray[Any], settings: Settings) -> Split:
    rng = np.random.default_rng(settings.seed)
    owner = dirichlet(rows.y, settings.devices, ALPHA, rng)
    arrays = {"x_train": rows.x, "y_train": targets, "client_train": owner}
    return divide(arrays | {"x_test": rows.x[:1], "y_test": targets[:1]}, settings.devices)


def _bundle(settings: Settings, model: Path | bytes, name: str) -> Bundle:
    is_anomaly = name == "anomaly" and isinstance(model, bytes)
    return build(
        model,
        loss="mse" if is_anomaly else "cross_entropy",
        train=settings.train,
        optimizer=adam(lr=settings.lr) if is_anomaly else momentum(0.9, lr=settings.lr),
        headroom=settings.headroom,
        ranges=settings.ranges,
        name=name,
        **_formats(settings),
    )


def _formats(settings: Settings) -> dict[str, Any]:
    """Return the formats to write training graphs in, where an engine was named."""
    if settings.engine == AUTO:
        return {}
    return {"engines": (ENGINES[settings.engine].format,)}
