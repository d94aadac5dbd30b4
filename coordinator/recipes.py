# SPDX-License-Identifier: Apache-2.0
"""Finds the recipes of `models/`: beside the packages in a checkout, inside ours in a wheel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from edge_sdk.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def recipe(name: str) -> ModuleType:
    """Load `models/<name>/build.py`.

    Raises: ConfigError when it is not there.
    """
    for folder in (PACKAGE.parent / "models", PACKAGE / "models"):
        file = folder / name / "build.py"
        if file.exists():
            return _module(f"fedge_recipe_{name}", file)
    raise ConfigError(f"expected the recipe models/{name}/build.py, it is not here: reinstall")


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # typing looks modules up there while their classes are made
    spec.loader.exec_module(module)
    return module
