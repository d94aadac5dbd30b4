# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a bundle, each device's rows, and the rows that measure the outcome."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from coordinator.compiler import build, momentum
from coordinator.demo.data import Split, dirichlet, divide, load
from coordinator.demo.settings import Settings
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError

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
    recipe = _recipe("digits")
    rows = recipe.split(settings.seed)
    rng = np.random.default_rng(settings.seed)
    owner = dirichlet(rows.devices.y, settings.devices, ALPHA, rng)
    arrays = {"x_train": rows.devices.x, "y_train": rows.devices.y, "client_train": owner}
    arrays |= {"x_test": rows.test.x, "y_test": rows.test.y}
    model = recipe.build(settings.seed).SerializeToString()
    return Start(_bundle(settings, model), divide(arrays, settings.devices))


def _bundle(settings: Settings, model: Path | bytes) -> Bundle:
    optimizer = momentum(0.9, lr=settings.lr)
    name = "digits" if isinstance(model, bytes) else model.stem
    return build(model, loss="cross_entropy", train=settings.train, optimizer=optimizer, name=name)


def _recipe(name: str) -> ModuleType:
    """Load `models/<name>/build.py`: beside the packages in a checkout, inside ours in a wheel."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2] / "models", here.parent / "recipes"):
        file = folder / name / "build.py"
        if file.exists():
            return _module(f"fedge_recipe_{name}", file)
    raise ConfigError(f"expected the recipe models/{name}/build.py, it is not installed; reinstall")


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
