# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a bundle, each device's rows, and the rows that measure the outcome."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from coordinator.compiler import build, momentum
from coordinator.demo.data import Split, dirichlet, divide, load
from coordinator.demo.settings import Settings
from coordinator.recipes import recipe
from edge_sdk.bundle import Bundle

ALPHA = 0.5
"""Of the Dirichlet split of the digits: a device has many of some digits and none of others."""


class Start(NamedTuple):
    """The bundle that every process is given, and whose rows are whose."""

    bundle: Bundle
    split: Split


def prepare(settings: Settings) -> Start:
    """Build the bundle and split the rows; the same seed gives the same start."""
    if settings.model is None or settings.data is None:
        return _digits(settings)
    return Start(_bundle(settings, settings.model), load(settings.data, settings.devices))


def _digits(settings: Settings) -> Start:
    digits = recipe("digits")
    rows = digits.split(settings.seed)
    rng = np.random.default_rng(settings.seed)
    owner = dirichlet(rows.devices.y, settings.devices, ALPHA, rng)
    arrays = {"x_train": rows.devices.x, "y_train": rows.devices.y, "client_train": owner}
    arrays |= {"x_test": rows.test.x, "y_test": rows.test.y}
    model = digits.build(settings.seed).SerializeToString()
    return Start(_bundle(settings, model), divide(arrays, settings.devices))


def _bundle(settings: Settings, model: Path | bytes) -> Bundle:
    optimizer = momentum(0.9, lr=settings.lr)
    name = "digits" if isinstance(model, bytes) else model.stem
    return build(model, loss="cross_entropy", train=settings.train, optimizer=optimizer, name=name)
