# SPDX-License-Identifier: Apache-2.0
"""Python files that are no part of a package: recipes, scripts, the reader of reference data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def module_at(file: Path) -> Any:
    """Run a file as a module of its own, and return it."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
